// The CPU kernel on tensors. It knows neither plans nor Python: who calls it has chosen.
#pragma once

#include "binding/operands.h"

namespace fastrnn {

ScanOutputs forward_on_cpu(const Call& call, const CpuPlan& plan, bool tape);
// `y` and `tape` are those of the forward pass.
std::vector<Tensor> backward_on_cpu(const Call& call, const CpuPlan& plan, const OutputGrads& grads,
                                    const Tensor& y, const Tensor& tape, const Needs& needs);

// One scan's weights in the layout of the CPU kernel, for `packed`: of the compute type, flat.
Tensor pack(const CellFacts& cell, const Tensor& w_ih, const Tensor& w_hh,
            const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
            const std::optional<Tensor>& w_hr);
}  // namespace fastrnn
