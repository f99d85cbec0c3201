// The launchers of the kernels, one per residency and direction, which the C interface,
// csrc/cuda/entry.cu, calls. Each returns 0 or a cudaError_t, and launches on `stream` without
// waiting for it.
#pragma once

#include "core/cell.h"
#include "cuda/contract.h"

namespace fastrnn {

// Errors of CUDA that launchers return for calls that they refuse themselves.
constexpr int kInvalidValue = 1;          // cudaErrorInvalidValue
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration: the plan does not fit

// Calls f with an object of the cell of that index in FASTRNN_CELLS, so that f is compiled once per
// cell: `with_cell(cell, [&](auto c) { ... decltype(c) ... })`.
template <class F>
int with_cell(int cell, F f) {
  int index = 0;
#define FASTRNN_CASE(Cell) \
  if (cell == index++) return f(Cell{});
  FASTRNN_CELLS(FASTRNN_CASE)
#undef FASTRNN_CASE
  return kInvalidValue;
}

// The precisions that are compiled, one bit each. A test that needs some compiles no others.
#ifndef FASTRNN_PRECISIONS
#define FASTRNN_PRECISIONS 0x3f
#endif
constexpr bool is_compiled(Precision precision) {
  return FASTRNN_PRECISIONS >> static_cast<int>(precision) & 1;
}

// The most recurrences of a sweep: `Sweep::reverse` has a bit for each.
constexpr int kMostRecurrences = 64;

// csrc/cuda/step/forward.cu, csrc/cuda/step/backward.cu
int launch_step_forward(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream);
int launch_step_backward(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream);

// csrc/cuda/recompute.cu
int launch_h_prev(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream);
int launch_recompute(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream);
int usable(int* architecture);

// The persistent kernels of a direction and a residency: how they are launched, and what a launch
// needs.
struct PersistentKernels {
  int (*launch)(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream);
  int64_t (*workspace_bytes)(int cell, const Sweep& sweep, const CudaPlan& plan);
  int64_t (*shared_bytes)(int cell, const Sweep& sweep, const CudaPlan& plan);
};

// csrc/cuda/persistent/forward_block.cu and its siblings
extern const PersistentKernels kForwardBlock, kForwardCluster, kForwardGrid;
extern const PersistentKernels kBackwardBlock, kBackwardCluster, kBackwardGrid;
int resident_clusters(int blocks, int threads, int64_t shared_bytes);

}  // namespace fastrnn
