// What C++ knows about launches of the CUDA kernels: how Python launched the first call of a shape.
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

// How such a pass is launched; nothing if C++ does not know, or an operand is wrong: Python has
// such calls, and raises its errors.
std::optional<CudaLaunch> launch_of(const CellFacts& cell, const ScanInputs& in, bool backward);

// Whether C++ knows how to launch the forward pass of a call whose operands fit together, in these
// numbers of steps and sequences: neither the shape of x nor states are looked at.
bool knows_launch(const CellFacts& cell, const ScanInputs& in, int64_t steps, int64_t batch);

int64_t steps_in(const ScanInputs& in);
int64_t batch_in(const ScanInputs& in);

// The stream on which the next operation on a device runs; nothing if this torch does not tell.
std::optional<void*> current_stream(c10::Device device);

}  // namespace fastrnn
