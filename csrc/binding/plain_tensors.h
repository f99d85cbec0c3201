// What fast calls do with tensors: they take plain ones alone, and leave out the dispatcher where
// nothing has to see an operation.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

#include "binding/output_memory.h"

namespace fastrnn {

// The tensor in `object` if it is plain: of torch's own classes and dense; else null.
inline const Tensor* plain_tensor(pybind11::handle object) {
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(THPVariableClass) &&
      Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(ParameterClass))
    return nullptr;
  const Tensor& t = THPVariable_Unpack(object.ptr());
  using c10::DispatchKey;
  // Wrappers of transforms may outlive their transform.
  constexpr c10::DispatchKeySet unusual{DispatchKey::Python,
                                        DispatchKey::Negative,
                                        DispatchKey::Conjugate,
                                        DispatchKey::ZeroTensor,
                                        DispatchKey::Functionalize,
                                        DispatchKey::FuncTorchBatched,
                                        DispatchKey::FuncTorchGradWrapper};
  const bool plain = t.layout() == at::kStrided && !t.is_nested() && !t.key_set().has_any(unusual);
  return plain ? &t : nullptr;
}

// The same for a tensor that must be on a device.
inline const Tensor* plain_tensor(pybind11::handle object, c10::Device device) {
  const Tensor* t = plain_tensor(object);
  return t && t->device() == device ? t : nullptr;
}

// The same for a tensor that must have a size and a dtype, too.
inline const Tensor* plain_tensor(pybind11::handle object, c10::Device device, at::IntArrayRef size,
                                  at::ScalarType dtype) {
  const Tensor* t = plain_tensor(object, device);
  return t && t->scalar_type() == dtype && t->sizes() == size ? t : nullptr;
}

// Copies a tensor that was found; whether it was.
inline bool keep(const Tensor* from, Tensor& to) {
  if (from) to = *from;
  return from != nullptr;
}

// Whether something in torch's state has to see operations: a mode, transform, tracer or profiler.
// Otherwise the dispatcher is left out, which takes as long as a small layer.
inline bool observed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !c10::default_included_set.has_all(included) ||
         at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
}

// Runs f, below autograd unless its operations are `tracked` by something.
template <class F>
auto run_tracked(bool tracked, const F& f) {
  if (tracked) return f();
  at::AutoDispatchBelowADInplaceOrView below;
  return f();
}

// `torch.cat(parts)`. Memory of the host (`on_host`) is copied without an operation where nothing
// has to see one.
inline Tensor joined(TensorList parts, bool on_host) {
  bool tracked = observed(), whole = true;
  for (const Tensor& part : parts) {
    tracked = tracked || (part.requires_grad() && at::GradMode::is_enabled());
    whole = whole && part.is_contiguous();
  }
  if (tracked || !whole || !on_host) return run_tracked(tracked, [&] { return at::cat(parts); });
  auto size = parts[0].sizes().vec();
  size[0] *= static_cast<int64_t>(parts.size());
  Tensor all = fresh(size, parts[0].scalar_type());
  char* to = static_cast<char*>(all.mutable_data_ptr());
  for (const Tensor& part : parts) {
    if (part.nbytes() > 0) std::memcpy(to, part.const_data_ptr(), part.nbytes());
    to += part.nbytes();
  }
  return all;
}

}  // namespace fastrnn
