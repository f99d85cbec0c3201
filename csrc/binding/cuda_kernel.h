// The CUDA kernels, launched from C++: forward and backward, all steps at once, dense or packed.
// Python plans and launches the first call of a shape, then hands over how it did
// (`cuda_launches.h`); all other calls of the CUDA kernels are Python's (`kernels/gpu/`): those in
// several chunks of steps, with lengths, or of a cell with weights of its own.
#pragma once

#include <optional>

#include "binding/call.h"

namespace fastrnn {

// The passes, if C++ knows how to launch them.
std::optional<ScanOutputs> forward_on_cuda(const ScanInputs& in, bool tape);
std::optional<std::vector<Tensor>> backward_on_cuda(const ScanInputs& in, const OutputGrads& grads,
                                                    const Tensor& y, const Tensor& tape,
                                                    const Needs& needs);

}  // namespace fastrnn
