// The C interface of csrc/cuda/contract.h: checks a call and hands it to its launcher.

#include <cstring>
#include <limits>
#include <string>

#include "cuda/launch.h"
#include "cuda/platform.cuh"

namespace fastrnn {
namespace {

// Index in FASTRNN_CELLS; -1 if there is no such cell.
int cell_index(const char* name) {
  int index = 0;
#define FASTRNN_NAME(Cell)                               \
  if (std::strcmp(name, Cell::kName) == 0) return index; \
  ++index;
  FASTRNN_CELLS(FASTRNN_NAME)
#undef FASTRNN_NAME
  return -1;
}

bool valid(int cell, const Sweep& s, const CudaPlan& plan) {
  const bool sizes = s.steps > 0 && s.batch > 0 && s.hidden > 0 && s.recurrences > 0 &&
                     s.recurrences <= kMostRecurrences;
  const bool chunk = 0 <= s.begin && s.begin <= s.end && s.end <= s.steps;
  // Kernels count times and blocks in 32 bits.
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const bool narrow = s.steps < most && s.batch < most && s.hidden < most / 64;
  const bool known = plan.precision >= Precision::kFloat64 &&
                     plan.precision <= Precision::kFloat16 && plan.residency >= kStep &&
                     plan.residency <= kGrid;
  return cell >= 0 && sizes && chunk && narrow && known;
}

// The kernels of a residency other than kStep.
const PersistentKernels& persistent_kernels(int residency, bool backward) {
  switch (residency) {
    case kBlock:
      return backward ? kBackwardBlock : kForwardBlock;
    case kCluster:
      return backward ? kBackwardCluster : kForwardCluster;
    default:
      return backward ? kBackwardGrid : kForwardGrid;
  }
}

using Launch = int (*)(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream);

// Launches what a call asks for. A sweep of no steps launches nothing.
int run(const char* cell, const Sweep& sweep, const CudaPlan& plan, void* stream, Launch launch) {
  const int index = cell_index(cell);
  if (!valid(index, sweep, plan)) return kInvalidValue;
  return sweep.begin == sweep.end ? 0 : launch(index, sweep, plan, stream);
}

// The number of bytes that `function` of the persistent kernels of a direction gives; `without` if
// the plan is for another kernel.
using Bytes = int64_t (*)(int cell, const Sweep& sweep, const CudaPlan& plan);
int64_t bytes(const char* cell, const Sweep& sweep, const CudaPlan& plan, int backward,
              Bytes PersistentKernels::* function, int64_t without) {
  const int index = cell_index(cell);
  if (plan.residency == kStep || !valid(index, sweep, plan)) return without;
  const PersistentKernels& kernels = persistent_kernels(plan.residency, backward != 0);
  return (kernels.*function)(index, sweep, plan);
}

}  // namespace
}  // namespace fastrnn

#define FASTRNN_EXPORT __attribute__((visibility("default")))

using fastrnn::CudaPlan;
using fastrnn::Sweep;

extern "C" {

FASTRNN_EXPORT int fastrnn_cuda_forward(const char* cell, const Sweep* sweep, const CudaPlan* plan,
                                        void* stream) {
  const auto launch = plan->residency == fastrnn::kStep
                          ? fastrnn::launch_step_forward
                          : fastrnn::persistent_kernels(plan->residency, false).launch;
  return fastrnn::run(cell, *sweep, *plan, stream, launch);
}

FASTRNN_EXPORT int fastrnn_cuda_backward(const char* cell, const Sweep* sweep, const CudaPlan* plan,
                                         void* stream) {
  const auto launch = plan->residency == fastrnn::kStep
                          ? fastrnn::launch_step_backward
                          : fastrnn::persistent_kernels(plan->residency, true).launch;
  return fastrnn::run(cell, *sweep, *plan, stream, launch);
}

FASTRNN_EXPORT int fastrnn_cuda_h_prev(const char* cell, const Sweep* sweep, const CudaPlan* plan,
                                       void* stream) {
  return fastrnn::run(cell, *sweep, *plan, stream, fastrnn::launch_h_prev);
}

FASTRNN_EXPORT int fastrnn_cuda_recompute(const char* cell, const Sweep* sweep,
                                          const CudaPlan* plan, void* stream) {
  return fastrnn::run(cell, *sweep, *plan, stream, fastrnn::launch_recompute);
}

FASTRNN_EXPORT int64_t fastrnn_cuda_workspace_bytes(const char* cell, const Sweep* sweep,
                                                    const CudaPlan* plan, int backward) {
  return fastrnn::bytes(cell, *sweep, *plan, backward, &fastrnn::PersistentKernels::workspace_bytes,
                        0);
}

FASTRNN_EXPORT int64_t fastrnn_cuda_shared_bytes(const char* cell, const Sweep* sweep,
                                                 const CudaPlan* plan, int backward) {
  return fastrnn::bytes(cell, *sweep, *plan, backward, &fastrnn::PersistentKernels::shared_bytes,
                        -1);
}

FASTRNN_EXPORT int fastrnn_cuda_usable(int* architecture) { return fastrnn::usable(architecture); }

FASTRNN_EXPORT int fastrnn_cuda_resident_clusters(int blocks, int threads, int64_t shared_bytes) {
  return fastrnn::resident_clusters(blocks, threads, shared_bytes);
}

FASTRNN_EXPORT int fastrnn_cuda_capturing(void* stream) {
  return fastrnn::platform::capturing(stream) ? 1 : 0;
}

FASTRNN_EXPORT const char* fastrnn_cuda_error(int error) {
  return fastrnn::platform::error_text(error);
}

FASTRNN_EXPORT const char* fastrnn_cuda_cells() {
  // A cell's name has no space in it.
  static const std::string names = [] {
    std::string all;
#define FASTRNN_NAME(Cell) all += std::string(fastrnn::Cell::kName) + " ";
    FASTRNN_CELLS(FASTRNN_NAME)
#undef FASTRNN_NAME
    return all;
  }();
  return names.c_str();
}

FASTRNN_EXPORT int fastrnn_cuda_simulated() { return fastrnn::platform::kSimulated ? 1 : 0; }

}  // extern "C"
