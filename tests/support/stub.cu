// The C interface of csrc/cuda/contract.h without kernels: launches do nothing. Tests choose what
// the GPU and its driver answer, and a benchmark measures what the host does in a call.
#include "cuda/contract.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using fastrnn::CudaPlan;
using fastrnn::Sweep;

namespace {

struct Answers {
  int usable = 0;
  int architecture = 90;
  int cooperative = 0;  // of launches that need all their blocks at the same time
  int launches = 0;
} answers;

int launched(const CudaPlan& plan) {
  ++answers.launches;
  return plan.residency == fastrnn::kGrid ? answers.cooperative : 0;
}

}  // namespace

EXPORT void fastrnn_stub_answer(int usable, int architecture, int cooperative) {
  answers = {usable, architecture, cooperative, 0};
}
EXPORT int fastrnn_stub_launches() { return answers.launches; }

EXPORT int fastrnn_cuda_forward(const char*, const Sweep*, const CudaPlan* plan, void*) {
  return launched(*plan);
}
EXPORT int fastrnn_cuda_backward(const char*, const Sweep*, const CudaPlan* plan, void*) {
  return launched(*plan);
}
EXPORT int fastrnn_cuda_h_prev(const char*, const Sweep*, const CudaPlan*, void*) { return 0; }
EXPORT int fastrnn_cuda_recompute(const char*, const Sweep*, const CudaPlan*, void*) { return 0; }
EXPORT int64_t fastrnn_cuda_workspace_bytes(const char*, const Sweep*, const CudaPlan* plan, int) {
  return plan->residency == fastrnn::kGrid ? 4096 : 0;
}
EXPORT int64_t fastrnn_cuda_shared_bytes(const char*, const Sweep*, const CudaPlan*, int) {
  return 1 << 16;
}
EXPORT int fastrnn_cuda_usable(int* architecture) {
  *architecture = answers.architecture;
  return answers.usable;
}
EXPORT int fastrnn_cuda_resident_clusters(int blocks, int, int64_t) { return 128 / blocks; }
EXPORT const char* fastrnn_cuda_error(int error) {
  switch (error) {
    case 35:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case 209:
      return "no kernel image is available for execution on the device";
    case 720:
      return "too many blocks in cooperative launch";
    default:
      return "unknown error";
  }
}
EXPORT const char* fastrnn_cuda_cells() { return "rnn_tanh rnn_relu lstm gru "; }
EXPORT int fastrnn_cuda_simulated() { return 1; }
