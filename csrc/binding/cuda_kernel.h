// The CUDA kernels, launched from C++: forward, without a tape, dense rows, one recurrence. Python
// plans and launches the first call of a shape, then hands over how it did; all other calls of the
// CUDA kernels are Python's (`kernels/gpu/`).
#pragma once

#include <optional>

#include "binding/call.h"
#include "cpu/registry.h"
#include "cuda/contract.h"

namespace fastrnn {

// How Python launched a call. Functions are those of csrc/cuda/contract.h, in the library of its
// plan.
struct CudaLaunch {
  int (*forward)(const char* cell, const Sweep*, const CudaPlan*, void* stream) = nullptr;
  const char* (*error)(int) = nullptr;
  CudaPlan plan;
  int64_t workspace = 0;  // bytes
};

// Launches calls of the shape of this one in the same way, until plans are forgotten. Returns
// whether C++ can launch them.
bool keep_launch(const ScanInputs& in, const CudaLaunch& launch);

// The forward pass, if C++ knows how to launch it.
std::optional<ScanOutputs> forward_on_cuda(const ScanInputs& in);

}  // namespace fastrnn
