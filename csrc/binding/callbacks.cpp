#include "binding/callbacks.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

namespace fastrnn {
namespace {

Callbacks* callbacks = nullptr;

py::tuple inputs_to_python(const ScanInputs& in) {
  return py::make_tuple(std::string(in.cell), in.x, in.w_ih.vec(), in.w_hh.vec(), in.b_ih.vec(),
                        in.b_hh.vec(), in.w_hr.vec(), in.params.vec(), in.s0.vec(),
                        in.reset_states.vec(), in.batch_sizes, in.lengths, in.resets, in.noise,
                        in.reverse);
}

py::list output_grads_to_python(const OutputGrads& grads) {
  py::list list;
  list.append(grads.dy.defined() ? py::cast(grads.dy) : py::none());
  for (const Tensor& grad : grads.dstates)
    list.append(grad.defined() ? py::cast(grad) : py::none());
  list.append(grads.dsteps.defined() ? py::cast(grads.dsteps) : py::none());
  return list;
}

// Enables autograd, below which an operator's kernels run: the reference differentiates by it.
class WithAutograd {
 public:
  WithAutograd()
      : guard_(c10::impl::tls_local_dispatch_key_set().included_,
               c10::impl::tls_local_dispatch_key_set().excluded_ -
                   c10::autograd_dispatch_keyset_with_ADInplaceOrView) {}

 private:
  c10::impl::ForceDispatchKeyGuard guard_;
};

std::vector<Tensor> reference_backward(const ScanInputs& in, const OutputGrads& grads,
                                       const Needs& needs, bool differentiable) {
  py::gil_scoped_acquire gil;
  return python()
      .reference_backward(inputs_to_python(in), output_grads_to_python(grads), needs,
                          differentiable)
      .cast<std::vector<Tensor>>();
}

}  // namespace

void set_callbacks(Callbacks* functions) { callbacks = functions; }

const Callbacks& python() {
  TORCH_CHECK(callbacks, "fastrnn._C was loaded without `import fastrnn`");
  return *callbacks;
}

const CellFacts& known_cell(std::string_view name, at::DeviceType device, Format format) {
  const CellFacts* cell = find_cell(std::string(name));
  if (!cell || (device == at::kCPU && !cell->has_code(format))) {
    // An exported program may use a cell that is declared but not yet used in this process, or a
    // format that the cell is not compiled for yet.
    py::gil_scoped_acquire gil;
    python().find(std::string(name), c10::DeviceTypeName(device, /*lower_case=*/true),
                  name_of(format));
    cell = find_cell(std::string(name));
  }
  TORCH_CHECK(cell, "fastrnn: no cell is registered under '", name,
              "'; import the module that declares it before it is used");
  return *cell;
}

ScanOutputs python_forward(const ScanInputs& in, bool tape) {
  py::gil_scoped_acquire gil;
  return python().forward(inputs_to_python(in), tape).cast<ScanOutputs>();
}

std::vector<Tensor> python_backward(const ScanInputs& in, const OutputGrads& grads, const Tensor& y,
                                    const Tensor& tape, const Needs& needs) {
  {
    py::gil_scoped_acquire gil;
    const py::object found =
        python().backward(inputs_to_python(in), output_grads_to_python(grads), y, tape, needs);
    if (!found.is_none()) return found.cast<std::vector<Tensor>>();
  }
  WithAutograd autograd;
  return reference_backward(in, grads, needs, false);
}

std::pair<Tensor, void*> python_tables(const Tensor& sizes, int64_t batch, c10::Device device) {
  py::gil_scoped_acquire gil;
  const auto [tables, stream] =
      python().tables(sizes, batch, device).cast<std::pair<Tensor, uintptr_t>>();
  return {tables, reinterpret_cast<void*>(stream)};
}

std::vector<Tensor> python_differentiable_backward(const ScanInputs& in, const OutputGrads& grads,
                                                   const Needs& needs) {
  return reference_backward(in, grads, needs, true);
}

}  // namespace fastrnn
