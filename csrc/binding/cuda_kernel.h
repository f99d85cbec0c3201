// The CUDA kernels, launched from C++: forward and backward, dense rows, one recurrence. Python
// plans and launches the first call of a shape, then hands over how it did; all other calls of the
// CUDA kernels are Python's (`kernels/gpu/`).
#pragma once

#include <optional>

#include "binding/call.h"
#include "cpu/registry.h"
#include "cuda/contract.h"

namespace fastrnn {

enum class Pass { kForward, kForwardWithTape, kBackward };

// How Python launched a pass. Functions are those of csrc/cuda/contract.h, in the library of its
// plan; `run` is the one of the pass.
struct CudaLaunch {
  int (*run)(const char* cell, const Sweep*, const CudaPlan*, void* stream) = nullptr;
  const char* (*error)(int) = nullptr;
  CudaPlan plan;
  int64_t workspace = 0;  // bytes
  int64_t epoch = 0;      // plans_forgotten() before it was planned
};

// Launches this pass of calls of this shape in the same way, until plans are forgotten. Returns
// whether C++ can launch them, and the plan is still good.
bool keep_launch(const ScanInputs& in, Pass pass, const CudaLaunch& launch);

// The passes, if C++ knows how to launch them.
std::optional<ScanOutputs> forward_on_cuda(const ScanInputs& in, bool tape);
std::optional<std::vector<Tensor>> backward_on_cuda(const ScanInputs& in, const OutputGrads& grads,
                                                    const Tensor& y, const Tensor& tape,
                                                    const Needs& needs);

}  // namespace fastrnn
