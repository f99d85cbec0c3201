// The stepper as a Python type. A step of a small layer takes less time than pybind11 needs to
// call a function, so this one is bound by hand: no argument is converted, no memory is allocated.
#include "cpu/stepper.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>

#include "binding/callbacks.h"
#include "binding/cpu_kernel.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

// A dtype, and how its numbers are recognised.
struct Kind {
  at::ScalarType type;
  const char* name;
  char code;  // of the buffer protocol; none for bfloat16
};
constexpr Kind kKinds[] = {{at::kFloat, "float32", 'f'},
                           {at::kDouble, "float64", 'd'},
                           {at::kHalf, "float16", 'e'},
                           {at::kBFloat16, "bfloat16", '\0'}};

struct StepperObject {
  PyObject_HEAD std::unique_ptr<Stepper> stepper;
  const Kind* kind;
  int64_t itemsize;
  bool release_gil;
  std::atomic<bool> busy;
};

// The rows of x or of out, and its number of dimensions.
struct View {
  View() { buffer.obj = nullptr; }
  ~View() {
    if (buffer.obj) PyBuffer_Release(&buffer);
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  char* data = nullptr;
  int64_t row = 0;  // numbers from row to row
  int dims = 0;
  Py_buffer buffer;  // keeps the memory of x or out in place, if that is a buffer
};

StepperObject* as_stepper(PyObject* self) { return reinterpret_cast<StepperObject*>(self); }

// Checks that x or out is [B, width] or, for a batch of one, [width], with the numbers of a row
// side by side, that is `step` apart. Raises and returns false otherwise.
template <class Int>
bool check_rows(const StepperObject* self, const char* name, int64_t width, bool written, int dims,
                const Int* sizes, const Int* strides, int64_t step, View& view) {
  const int64_t B = self->stepper->batch();
  const bool fits =
      dims == 2 ? sizes[0] == B && sizes[1] == width : dims == 1 && B == 1 && sizes[0] == width;
  if (__builtin_expect(!fits, false)) {
    std::string got;
    for (int d = 0; d < dims; ++d) got += (d ? ", " : "") + std::to_string(sizes[d]);
    PyErr_Format(PyExc_ValueError,
                 "%s should have shape (%lld, %lld)%s, the batch size of the stepper and its "
                 "features, got (%s%s)",
                 name, static_cast<long long>(B), static_cast<long long>(width),
                 B == 1 ? " or without the first dimension" : "", got.c_str(),
                 dims == 1 ? "," : "");
    return false;
  }
  view.dims = dims;
  view.row = B == 1 ? width : static_cast<int64_t>(strides[0]) / step;
  const bool dense = (width == 1 || strides[dims - 1] == step) &&
                     (B == 1 || strides[0] % step == 0) &&
                     reinterpret_cast<uintptr_t>(view.data) % self->itemsize == 0;
  if (__builtin_expect(!dense, false)) {
    PyErr_Format(PyExc_ValueError,
                 "the numbers of %s should lie side by side within a row, aligned: pass "
                 "%s.contiguous() or numpy.ascontiguousarray(%s)",
                 name, name, name);
    return false;
  }
  if (written && B > 1 && view.row < width && view.row > -width) {
    PyErr_Format(PyExc_ValueError, "the rows of %s overlap in memory", name);
    return false;
  }
  return true;
}

bool wrong_dtype(const StepperObject* self, const char* name, const char* got) {
  PyErr_Format(PyExc_ValueError,
               "%s should be %s, the dtype of the weights, got %s; convert it, or the layer before "
               "layer.stream()",
               name, self->kind->name, got);
  return false;
}

bool view_of(const StepperObject* self, const at::Tensor& t, const char* name, int64_t width,
             bool written, View& view) {
  if (t.scalar_type() != self->kind->type) {
    for (const Kind& kind : kKinds)
      if (kind.type == t.scalar_type()) return wrong_dtype(self, name, kind.name);
    return wrong_dtype(self, name, c10::toString(t.scalar_type()));
  }
  const c10::DispatchKeySet unusual{
      c10::DispatchKey::Python,           c10::DispatchKey::Negative,
      c10::DispatchKey::Conjugate,        c10::DispatchKey::ZeroTensor,
      c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper};
  if (!t.is_cpu() || t.layout() != at::kStrided || t.key_set().has_any(unusual)) {
    PyErr_Format(PyExc_ValueError,
                 "%s should be a plain dense tensor on the CPU: torch cannot trace, transform or "
                 "move a stepper",
                 name);
    return false;
  }
  if (t.requires_grad() && (written || at::GradMode::is_enabled())) {
    PyErr_Format(PyExc_RuntimeError,
                 "%s requires gradients, but a stepper has no derivative: pass %s.detach()%s", name,
                 name, written ? "" : ", or call it under torch.no_grad()");
    return false;
  }
  if (written) {
    view.data = static_cast<char*>(t.mutable_data_ptr());
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  } else {
    view.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  }
  return check_rows(self, name, width, written, static_cast<int>(t.dim()), t.sizes().data(),
                    t.strides().data(), 1, view);
}

// numpy.ndarray, or null until NumPy is loaded. Nothing here needs NumPy, so it is not imported.
PyTypeObject* ndarray() {
  static PyTypeObject* type = nullptr;
  if (!type) {
    PyObject* key = PyUnicode_FromString("numpy");
    PyObject* numpy = key ? PyImport_GetModule(key) : nullptr;
    if (numpy) type = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(numpy, "ndarray"));
    Py_XDECREF(numpy);
    Py_XDECREF(key);
    PyErr_Clear();
  }
  return type;
}

bool is_array(PyObject* object) {
  PyTypeObject* type = ndarray();
  return type && PyObject_TypeCheck(object, type);
}

// Reads NumPy's own fields: its buffer protocol allocates memory and takes three times as long.
bool view_of_array(const StepperObject* self, PyObject* object, const char* name, int64_t width,
                   bool written, View& view) {
  using py::detail::npy_api;
  const auto* array = py::detail::array_proxy(static_cast<const void*>(object));
  const auto* dtype = py::detail::array_descriptor_proxy(array->descr);
  if (dtype->type != self->kind->code || dtype->byteorder != '=') {
    PyObject* text = PyObject_Str(array->descr);
    if (text) wrong_dtype(self, name, PyUnicode_AsUTF8(text));
    Py_XDECREF(text);
    return false;
  }
  if (written && !(array->flags & npy_api::NPY_ARRAY_WRITEABLE_)) {
    PyErr_Format(PyExc_ValueError, "%s is read-only", name);
    return false;
  }
  view.data = array->data;
  return check_rows(self, name, width, written, array->nd, array->dimensions, array->strides,
                    self->itemsize, view);
}

// For any other object with a buffer.
bool view_of_buffer(const StepperObject* self, PyObject* object, const char* name, int64_t width,
                    bool written, View& view) {
  Py_buffer& buffer = view.buffer;
  if (PyObject_GetBuffer(object, &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    buffer.obj = nullptr;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError,
                 "%s should be a torch.Tensor, a numpy.ndarray or another buffer, got %s", name,
                 Py_TYPE(object)->tp_name);
    return false;
  }
  const char* format = buffer.format ? buffer.format : "B";
  const char* code = *format == '@' || *format == '=' ? format + 1 : format;
  if (*code != self->kind->code || *code == '\0' || code[1] != '\0')
    return wrong_dtype(self, name, format);
  if (written && buffer.readonly) {
    PyErr_Format(PyExc_ValueError, "%s is read-only", name);
    return false;
  }
  view.data = static_cast<char*>(buffer.buf);
  return check_rows(self, name, width, written, buffer.ndim, buffer.shape, buffer.strides,
                    self->itemsize, view);
}

bool view_of(const StepperObject* self, PyObject* object, const char* name, int64_t width,
             bool written, View& view) {
  // Exact types first: torch takes 50 ns to tell whether an object is an instance of a tensor.
  if (!THPVariable_CheckExact(object) && is_array(object))
    return view_of_array(self, object, name, width, written, view);
  if (THPVariable_Check(object))
    return view_of(self, THPVariable_Unpack(object), name, width, written, view);
  return view_of_buffer(self, object, name, width, written, view);
}

// Allocates a result like x, which `view` describes; a new reference, or null with an error set.
PyObject* result_like(const StepperObject* self, PyObject* x, const View& view) {
  const int64_t B = self->stepper->batch(), Q = self->stepper->outputs();
  const std::vector<int64_t> size = view.dims == 2 ? std::vector<int64_t>{B, Q} : std::vector{Q};
  if (THPVariable_Check(x)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return THPVariable_Wrap(at::empty(size, at::TensorOptions(self->kind->type)));
  }
  if (is_array(x))
    return py::array(py::dtype(std::string(1, self->kind->code)), size).release().ptr();
  PyErr_Format(PyExc_TypeError,
               "pass out=: a result is made only if x is a tensor or an array, and x is a %s",
               Py_TYPE(x)->tp_name);
  return nullptr;
}

bool take_arguments(PyObject* const* args, Py_ssize_t count, PyObject* names, PyObject*& x,
                    PyObject*& out) {
  if (count > 0) x = args[0];
  if (count > 1) out = args[1];
  bool valid = count <= 2;
  for (Py_ssize_t k = 0; valid && names && k < PyTuple_GET_SIZE(names); ++k) {
    PyObject* name = PyTuple_GET_ITEM(names, k);
    PyObject*& to = PyUnicode_CompareWithASCIIString(name, "out") == 0 ? out : x;
    valid = !to && (&to == &out || PyUnicode_CompareWithASCIIString(name, "x") == 0);
    to = args[count + k];
  }
  if (valid && x) return true;
  PyErr_SetString(PyExc_TypeError, "step(x, out=None) takes x and optionally out");
  return false;
}

// Held while a thread uses the states, which one thread can do at a time.
class InUse {
 public:
  explicit InUse(StepperObject* self) : self_(self->busy.exchange(true) ? nullptr : self) {
    if (!self_)
      PyErr_SetString(PyExc_RuntimeError,
                      "this stepper is in use by another thread: make one stepper per stream");
  }
  ~InUse() {
    if (self_) self_->busy = false;
  }
  explicit operator bool() const { return self_; }

 private:
  StepperObject* self_;
};

PyObject* step(PyObject* object, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  HANDLE_TH_ERRORS
  StepperObject* self = as_stepper(object);
  PyObject *x = nullptr, *out = nullptr;
  if (!take_arguments(args, count, names, x, out)) return nullptr;
  View from, to;
  if (!view_of(self, x, "x", self->stepper->inputs(), false, from)) return nullptr;
  if (out && out != Py_None) {
    Py_INCREF(out);
  } else {
    out = result_like(self, x, from);
    if (!out) return nullptr;
  }
  py::object result = py::reinterpret_steal<py::object>(out);
  if (!view_of(self, out, "out", self->stepper->outputs(), true, to)) return nullptr;
  InUse use(self);
  if (!use) return nullptr;
  if (self->release_gil) {
    PyThreadState* state = PyEval_SaveThread();
    self->stepper->step(from.data, from.row, to.data, to.row);
    PyEval_RestoreThread(state);
  } else {
    self->stepper->step(from.data, from.row, to.data, to.row);
  }
  return result.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* reset(PyObject* object, PyObject*) {
  StepperObject* self = as_stepper(object);
  InUse use(self);
  if (!use) return nullptr;
  self->stepper->reset();
  Py_RETURN_NONE;
}

at::Tensor computed(const StepperObject* self, int64_t state) {
  const Stepper& stepper = *self->stepper;
  const auto type = self->kind->type == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty({stepper.layers(), stepper.batch(), stepper.width(static_cast<int32_t>(state))},
                   at::TensorOptions(type));
}

PyObject* read(PyObject* object, PyObject*) {
  HANDLE_TH_ERRORS
  StepperObject* self = as_stepper(object);
  at::AutoDispatchBelowADInplaceOrView below;
  InUse use(self);
  if (!use) return nullptr;
  py::list states;
  for (int32_t s = 0; s < self->stepper->states(); ++s) {
    const at::Tensor state = computed(self, s);
    self->stepper->read(s, state.mutable_data_ptr());
    states.append(state.to(self->kind->type));
  }
  return states.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* write(PyObject* object, PyObject* value) {
  HANDLE_TH_ERRORS
  StepperObject* self = as_stepper(object);
  const auto states = py::cast<std::vector<at::Tensor>>(py::handle(value));
  at::AutoDispatchBelowADInplaceOrView below;
  const int32_t S = self->stepper->states();
  TORCH_CHECK_VALUE(static_cast<int32_t>(states.size()) == S, "state should hold ", S,
                    " tensors, got ", states.size());
  std::vector<at::Tensor> ready;
  for (int32_t s = 0; s < S; ++s) {
    const at::Tensor to = computed(self, s);
    TORCH_CHECK_VALUE(states[s].sizes() == to.sizes() && states[s].is_floating_point(), "state ", s,
                      " should be floating-point ", to.sizes(), " (layers, batch, width), got ",
                      states[s].scalar_type(), " ", states[s].sizes());
    ready.push_back(states[s].detach().to(to.options()).contiguous());
  }
  InUse use(self);
  if (!use) return nullptr;
  for (int32_t s = 0; s < S; ++s) self->stepper->write(s, ready[s].const_data_ptr());
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// A layer as fastrnn's Weights: w_ih, w_hh, b_ih, b_hh, w_hr, of which some may be missing, and
// then the cell's learned parameters.
using LayerWeights = std::vector<std::optional<at::Tensor>>;

RecurrenceSizes sizes_of(const CellFacts& cell, const LayerWeights& layer) {
  TORCH_CHECK(
      layer.size() >= 5 && layer[0] && layer[1] && layer[0]->dim() == 2 && layer[1]->dim() == 2 &&
          layer[2].has_value() == layer[3].has_value(),
      "a stepper's layer should be (w_ih, w_hh, b_ih, b_hh, w_hr, *params), with matrices and with "
      "both biases or none");
  const bool projected = layer[4].has_value();
  const int64_t H = layer[1]->size(0) / cell.gates;
  return {layer[0]->size(1), H, projected ? layer[1]->size(1) : H, projected};
}

// The arguments are (cell, like, layers, format, scales, batch_size, threads, release_gil), as
// fastrnn/nn/stream.py checks them: `like` has the dtype of x, and the weights of a layer with
// their scales are those of pack().
PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const char *name = nullptr, *format_name = nullptr;
  PyObject *like = nullptr, *layer_list = nullptr, *scale_list = nullptr;
  long long batch = 0;
  int threads = 1, release_gil = 1;
  if (!PyArg_ParseTuple(args, "sOOsOLip", &name, &like, &layer_list, &format_name, &scale_list,
                        &batch, &threads, &release_gil))
    return nullptr;
  const auto weights = py::cast<std::vector<LayerWeights>>(py::handle(layer_list));
  const auto scales = py::cast<std::vector<std::vector<at::Tensor>>>(py::handle(scale_list));
  TORCH_CHECK(batch >= 1 && threads >= 1 && !weights.empty() && scales.size() == weights.size(),
              "a stepper needs a batch, a thread and a layer");
  const at::ScalarType stored = py::cast<at::Tensor>(py::handle(like)).scalar_type();
  const Format format = format_named(format_name);
  const CellFacts& cell = known_cell(name, at::kCPU, format);
  const Kind* kind = nullptr;
  for (const Kind& candidate : kKinds)
    if (candidate.type == stored) kind = &candidate;
  TORCH_CHECK(kind && (format == Format::kDouble) == (stored == at::kDouble),
              "a stepper computes float32, float64, bfloat16 and float16, not ", stored, " in ",
              format_name);
  at::AutoDispatchBelowADInplaceOrView below;
  std::vector<RecurrenceSizes> sizes;
  for (const LayerWeights& layer : weights) {
    sizes.push_back(sizes_of(cell, layer));
    TORCH_CHECK(sizes.back().hidden == sizes[0].hidden &&
                    (sizes.size() < 2 || sizes.back().inputs == sizes.end()[-2].recurrent),
                "a stepper needs layers that fit onto each other");
  }
  auto stepper = std::make_unique<Stepper>(cell.code(format), format, storage_of(stored), batch,
                                           sizes, threads);
  for (size_t l = 0; l < weights.size(); ++l) {
    const at::Tensor packed = pack(cell, format, weights[l], scales[l]);
    stepper->set_weights(static_cast<int64_t>(l), packed.const_data_ptr());
  }

  PyObject* object = type->tp_alloc(type, 0);
  if (!object) return nullptr;
  StepperObject* self = as_stepper(object);
  new (&self->stepper) std::unique_ptr<Stepper>(std::move(stepper));
  new (&self->busy) std::atomic<bool>(false);
  self->kind = kind;
  self->itemsize = static_cast<int64_t>(c10::elementSize(stored));
  self->release_gil = release_gil;
  return object;
  END_HANDLE_TH_ERRORS
}

void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  as_stepper(object)->stepper.~unique_ptr();
  type->tp_free(object);
  Py_DECREF(type);
}

template <int64_t (Stepper::*number)() const>
PyObject* get(PyObject* object, void*) {
  return PyLong_FromLongLong((as_stepper(object)->stepper.get()->*number)());
}

PyObject* threads(PyObject* object, void*) {
  return PyLong_FromLong(as_stepper(object)->stepper->threads());
}

PyObject* weights(PyObject* object, void*) {
  return PyUnicode_FromString(name_of(as_stepper(object)->stepper->format()));
}

}  // namespace

void bind_stepper(py::module_& m) {
  static PyMethodDef methods[] = {
      {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)),
       METH_FASTCALL | METH_KEYWORDS, nullptr},
      {"reset", reset, METH_NOARGS, nullptr},
      {"_read", read, METH_NOARGS, nullptr},
      {"_write", write, METH_O, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef properties[] = {
      {"num_layers", get<&Stepper::layers>, nullptr, nullptr, nullptr},
      {"batch_size", get<&Stepper::batch>, nullptr, nullptr, nullptr},
      {"input_size", get<&Stepper::inputs>, nullptr, nullptr, nullptr},
      {"output_size", get<&Stepper::outputs>, nullptr, nullptr, nullptr},
      {"threads", threads, nullptr, nullptr, nullptr},
      {"weights", weights, nullptr, nullptr, nullptr},
      {"nbytes", get<&Stepper::weight_bytes>, nullptr, nullptr, nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                                {Py_tp_methods, methods},
                                {Py_tp_getset, properties},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastrnn._C.Stepper", sizeof(StepperObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  m.add_object("Stepper", py::reinterpret_steal<py::object>(PyType_FromSpec(&spec)));
}

}  // namespace fastrnn
