// The operator, through the dispatcher and below it.
#pragma once

#include "binding/call.h"

namespace fastrnn {

// The op through the dispatcher.
ScanOutputs call_scan(const ScanInputs& in, bool tape, bool recompute = false);

// `fastrnn::scan_packed`: y and the states.
std::vector<Tensor> call_packed(const ScanInputs& in, const Tensor& expected);
// The same below the dispatcher, for tensors on a CPU; without a tape.
ScanOutputs scan_frozen(const ScanInputs& in, const Tensor& expected);

// The dtype that autocast gives all operands: its own, as in torch.nn, whose GRU on CPUs alone
// computes in the dtype of its state.
at::ScalarType autocast_dtype(std::string_view cell, const Tensor& x, TensorList s0);

// `y.transpose(0, 1)` that is no view to autograd: in place changes of it are those of y.
Tensor transposed(const Tensor& y);

}  // namespace fastrnn
