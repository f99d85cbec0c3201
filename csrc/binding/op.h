// The operator, through the dispatcher and below it.
#pragma once

#include "binding/call.h"

namespace fastrnn {

// `fastrnn::scan` through the dispatcher; `steps`, unless it is null, receives the states past the
// first after every step.
ScanOutputs call_scan(const ScanInputs& in, bool tape, bool recompute = false,
                      Tensor* steps = nullptr);

// `fastrnn::scan_packed`: y, the states and, with `steps`, those past the first after every step.
std::vector<Tensor> call_packed(const ScanInputs& in, const Tensor& expected, bool steps = false);
// The same two below the dispatcher, for tensors on a CPU; the tape has no rows unless it is asked
// for. The plan may name another kernel than the CPU kernel.
ScanOutputs scan_on_cpu(const ScanInputs& in, bool tape);
ScanOutputs scan_frozen(const ScanInputs& in, const Tensor& expected, bool tape = false);
// The first one below the dispatcher, for tensors on any device and kernels whose launch Python
// plans; C++ repeats those launches that it can.
ScanOutputs scan_launched(const ScanInputs& in, bool tape);

// The dtype that autocast gives all operands: autocast's own, as in torch.nn. As there, the GRU on
// CPUs is the exception: it stays in float32 if its state is.
at::ScalarType autocast_dtype(std::string_view cell, const Tensor& x, TensorList s0);

// `y.transpose(0, 1)` that autograd does not take for a view; a change in place counts for y, too.
Tensor transposed(const Tensor& y);

}  // namespace fastrnn
