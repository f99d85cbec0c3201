// The CUDA kernels, launched from C++: forward and backward, all steps at once, dense or packed.
// Python plans and launches the first call of a shape, then hands over how it did; all other calls
// of the CUDA kernels are Python's (`kernels/gpu/`): those in several chunks of steps, with
// lengths, or of a cell with weights of its own.
#pragma once

#include <optional>

#include "binding/call.h"
#include "cpu/registry.h"
#include "cuda/contract.h"

namespace fastrnn {

// How Python launched a pass. Functions are those of csrc/cuda/contract.h, in the library of its
// plan; `run` is the one of the pass.
struct CudaLaunch {
  int (*run)(const char* cell, const Sweep*, const CudaPlan*, void* stream) = nullptr;
  const char* (*error)(int) = nullptr;
  int (*capturing)(void* stream) = nullptr;
  CudaPlan plan;
  int64_t workspace = 0;                    // bytes
  int64_t least_steps = 0, most_steps = 0;  // for which a call has this plan, and is one launch
  int64_t epoch = 0;                        // plans_forgotten() before it was planned
};

// Launches this pass of calls of this shape, of any such number of steps, in the same way, until
// plans are forgotten. Returns whether C++ can launch them, and the plan is still good.
bool keep_launch(const ScanInputs& in, bool backward, const CudaLaunch& launch);

// The passes, if C++ knows how to launch them.
std::optional<ScanOutputs> forward_on_cuda(const ScanInputs& in, bool tape);
std::optional<std::vector<Tensor>> backward_on_cuda(const ScanInputs& in, const OutputGrads& grads,
                                                    const Tensor& y, const Tensor& tape,
                                                    const Needs& needs);

}  // namespace fastrnn
