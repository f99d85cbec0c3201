// The C interface of csrc/cuda/contract.h without kernels: launches do nothing. Tests choose what
// the GPU and its driver answer, and a benchmark measures what the host does in a call. On demand a
// forward launch echoes what it was given, in float and double.
#include <cstring>

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
  bool echoes = false;
} answers;

// Makes of all inputs some output, in which each counts and has its place.
template <class T>
int echo(const char* cell, const Sweep& sweep) {
  const bool lstm = !std::strcmp(cell, "lstm"), gru = !std::strcmp(cell, "gru");
  const int64_t G = lstm ? 4 : gru ? 3 : 1, S = lstm ? 2 : 1, H = sweep.hidden, B = sweep.batch;
  const auto* u = static_cast<const T*>(sweep.u);
  const auto* b_hh = static_cast<const T*>(sweep.b_hh);
  const auto* w_hh = static_cast<const T*>(sweep.w_hh);
  auto *y = static_cast<T*>(sweep.y), *carry = static_cast<T*>(sweep.carry);
  const void* const arrays[] = {u, b_hh, w_hh, y, carry};
  for (const void* array : arrays)
    if (reinterpret_cast<uintptr_t>(array) % 16) return 716;  // cudaErrorMisalignedAddress
  const bool all = sweep.begin == 0 && sweep.end == sweep.steps && sweep.recurrences == 1 &&
                   sweep.base == 0 && sweep.base_reverse == 0 && !sweep.tape && !sweep.first &&
                   !sweep.length && !sweep.resets;
  if (!all || sweep.chunk_rows != sweep.steps * B) return 1;
  for (int64_t row = 0; row < sweep.chunk_rows; ++row)
    for (int64_t h = 0; h < H; ++h) {
      T sum = static_cast<T>(sweep.reverse);
      for (int64_t k = h; k < G * H; k += H)
        sum += (k + 1) * (u[row * G * H + k] + (b_hh ? 3 * b_hh[k] : T{0}) + w_hh[k * H + h]);
      for (int64_t s = 0; s < S; ++s) sum += (s + 5) * carry[(s * B + row % B) * H + h];
      y[row * H + h] = sum;
    }
  for (int64_t k = 0; k < S * B * H; ++k) carry[k] += y[k % (B * H)] * static_cast<T>(k + 1);
  return 0;
}

int launched(const CudaPlan& plan) {
  ++answers.launches;
  return plan.residency == fastrnn::kGrid ? answers.cooperative : 0;
}

}  // namespace

EXPORT void fastrnn_stub_answer(int usable, int architecture, int cooperative) {
  answers = {usable, architecture, cooperative, 0, false};
}
EXPORT void fastrnn_stub_echo() { answers.echoes = true; }
EXPORT int fastrnn_stub_launches() { return answers.launches; }

EXPORT int fastrnn_cuda_forward(const char* cell, const Sweep* sweep, const CudaPlan* plan, void*) {
  if (const int error = launched(*plan)) return error;
  if (!answers.echoes) return 0;
  if (plan->precision == fastrnn::Precision::kFloat64) return echo<double>(cell, *sweep);
  return echo<float>(cell, *sweep);
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
