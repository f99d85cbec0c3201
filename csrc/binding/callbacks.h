// Calls from C++ to Python: for plans, for cells that are not compiled yet, for kernels in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "binding/call.h"
#include "cpu/registry.h"

namespace fastrnn {

// Functions of Python, set once on import. They are leaked on purpose: no destructor may run after
// the interpreter is gone.
struct Callbacks {
  pybind11::object plan, find, forward, backward, reference_backward, tables;
  int significant_bits;  // of numbers of steps and rows; problems that agree in them share a plan
};
void set_callbacks(Callbacks* functions);
// The functions that were set; raises if none were.
const Callbacks& python();

// The facts of a cell that is to run on that device; raises for an unknown cell. On a CPU the cell
// is compiled first, if it has no code in the format and can be compiled.
const CellFacts& known_cell(std::string_view name, at::DeviceType device, Format format);

// All kernels but the CPU kernel: Python plans the call and launches it.
ScanOutputs python_forward(const ScanInputs& in, bool tape);
std::vector<Tensor> python_backward(const ScanInputs& in, const OutputGrads& grads, const Tensor& y,
                                    const Tensor& tape, const Needs& needs);
// The tables of a packed batch on a device, and the stream on which they were copied there; the
// current stream may read them.
std::pair<Tensor, void*> python_tables(const Tensor& sizes, int64_t batch, c10::Device device);
// Gradients that can be differentiated again.
std::vector<Tensor> python_differentiable_backward(const ScanInputs& in, const OutputGrads& grads,
                                                   const Needs& needs);

}  // namespace fastrnn
