// The CPU kernel on tensors. It knows neither plans nor Python: who calls it has chosen.
#pragma once

#include "binding/operands.h"

namespace fastrnn {

ScanOutputs forward_on_cpu(const Call& call, const CpuPlan& plan, bool tape);
// `y` and `tape` are those of the forward pass.
std::vector<Tensor> backward_on_cpu(const Call& call, const CpuPlan& plan, const OutputGrads& grads,
                                    const Tensor& y, const Tensor& tape, const Needs& needs);

// One scan's weights (w_ih, w_hh, b_ih, b_hh, w_hr, *params) in the layout of the CPU kernel for a
// format, for `packed`: flat, of the compute type. In a format with scales, matrices are int8, and
// `scales` has those of the rows of w_ih, of w_hh and, if there is one, of w_hr, in float32.
Tensor pack(const CellFacts& cell, Format format, const std::vector<std::optional<Tensor>>& weights,
            const std::vector<Tensor>& scales);
}  // namespace fastrnn
