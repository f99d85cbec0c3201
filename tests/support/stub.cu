// The C interface of csrc/cuda/contract.h without kernels: launches do nothing. Tests choose what
// the GPU and its driver answer, and a benchmark measures what the host does in a call. On demand
// launches echo what they were given, in float and double.
#include <cstring>

#include "cuda/contract.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using fastrnn::CudaPlan;
using fastrnn::Precision;
using fastrnn::Sweep;

namespace {

struct Answers {
  int usable = 0;
  int architecture = 90;
  int cooperative = 0;  // of launches that need all their blocks at the same time
  int launches = 0;
  bool echoes = false;
  bool capturing = false;
} answers;

// Make of all inputs some output, in which each counts and has its place.

struct Sizes {
  int64_t gates, states;
};

Sizes sizes_of(const char* cell) {
  if (!std::strcmp(cell, "lstm")) return {4, 2};
  return {!std::strcmp(cell, "gru") ? 3 : 1, 1};
}

// Whether it is all steps of a call, in arrays that vectors can read.
template <int kArrays>
int refused(const Sweep& sweep, const void* const (&arrays)[kArrays]) {
  for (const void* array : arrays)
    if (reinterpret_cast<uintptr_t>(array) % 16) return 716;  // cudaErrorMisalignedAddress
  const bool whole = sweep.begin == 0 && sweep.end == sweep.steps && sweep.base == 0 &&
                     sweep.base_reverse == 0 && sweep.tape_base == 0 &&
                     !sweep.first == !sweep.length;
  return !whole;
}

// A row of a recurrence and where its numbers lie, in units of H.
struct Row {
  int64_t t, b, p;
  int64_t chunk;   // in u, du, dv and h_prev
  int64_t output;  // in y, dy and tape
  int64_t length;  // steps of a sequence of a packed batch
  bool reset;
};

// Calls f(row) for every row of every recurrence.
template <class F>
void for_each_row(const Sweep& sweep, const F& f) {
  for (int64_t p = 0; p < sweep.recurrences; ++p)
    for (int64_t t = 0; t < sweep.steps; ++t)
      for (int64_t b = 0; b < sweep.batch; ++b) {
        if (sweep.length && t >= sweep.length[b]) continue;
        const int64_t row = (sweep.first ? sweep.first[t] : t * sweep.batch) + b;
        f(Row{t, b, p, p * sweep.chunk_rows + row, row * sweep.recurrences + p,
              sweep.length ? sweep.length[b] : 0, sweep.resets && sweep.resets[row]});
      }
}

// The part of a row's numbers that is the same for all its units.
template <class T>
T common(const Sweep& sweep, const Row& row) {
  return static_cast<T>((sweep.reverse >> row.p & 1) + 2 * row.reset + 3 * row.length + row.t);
}

// A number of a state, of which null is zeros.
template <class T>
T number(const void* state, int64_t at) {
  return state ? static_cast<const T*>(state)[at] : T{0};
}

template <class T>
int echo_forward(const Sizes& n, const Sweep& sweep) {
  const int64_t G = n.gates, H = sweep.hidden, B = sweep.batch, P = sweep.recurrences;
  const auto* u = static_cast<const T*>(sweep.u);
  const auto* b_hh = static_cast<const T*>(sweep.b_hh);
  const auto* w_hh = static_cast<const T*>(sweep.w_hh);
  auto* y = static_cast<T*>(sweep.y);
  auto* tape = static_cast<T*>(sweep.tape);
  if (const int error = refused(sweep, {u, b_hh, w_hh, y, tape})) return error;
  for_each_row(sweep, [&](const Row& row) {
    for (int64_t h = 0; h < H; ++h) {
      T sum = common<T>(sweep, row);
      for (int64_t k = h; k < G * H; k += H)
        sum += (k + 1) * (u[row.chunk * G * H + k] + (b_hh ? 3 * b_hh[row.p * G * H + k] : T{0}) +
                          w_hh[(row.p * G * H + k) * H + h]);
      for (int64_t s = 0; s < n.states; ++s)
        sum += (s + 5) * number<T>(sweep.s0[s], (row.p * B + row.b) * H + h);
      y[row.output * H + h] = sum;
      if (tape) tape[row.output * H + h] = 2 * sum;
    }
  });
  for (int64_t s = 0; s < n.states; ++s)
    for (int64_t k = 0; k < P * B * H; ++k)
      static_cast<T*>(sweep.last[s])[k] =
          number<T>(sweep.s0[s], k) + y[k % H] * static_cast<T>(k + s + 1);
  return 0;
}

template <class T>
int echo_backward(const Sizes& n, const Sweep& sweep) {
  const int64_t G = n.gates, H = sweep.hidden, B = sweep.batch, P = sweep.recurrences;
  const auto *w_hh = static_cast<const T*>(sweep.w_hh), *y = static_cast<const T*>(sweep.y);
  const auto *tape = static_cast<const T*>(sweep.tape), *dy = static_cast<const T*>(sweep.dy);
  auto *h_prev = static_cast<T*>(sweep.h_prev), *du = static_cast<T*>(sweep.du),
       *dv = static_cast<T*>(sweep.dv);
  if (const int error = refused(sweep, {w_hh, y, tape, dy, h_prev, du, dv})) return error;
  for_each_row(sweep, [&](const Row& row) {
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = row.output * H + h;
      T sum =
          y[at] + (dy ? 2 * dy[at] : T{0}) + (tape ? 3 * tape[at] : T{0}) + common<T>(sweep, row);
      for (int64_t s = 0; s < n.states; ++s) {
        const int64_t state = (row.p * B + row.b) * H + h;
        sum += (s + 5) * number<T>(sweep.s0[s], state) + (s + 7) * number<T>(sweep.dlast[s], state);
      }
      h_prev[row.chunk * H + h] = sum;
      for (int64_t k = h; k < G * H; k += H) {
        dv[row.chunk * G * H + k] = (k + 1) * sum + w_hh[(row.p * G * H + k) * H + h];
        if (du != dv) du[row.chunk * G * H + k] = (k + 2) * sum;
      }
    }
  });
  for (int64_t s = 0; s < n.states; ++s)
    for (int64_t k = 0; sweep.ds0[s] && k < P * B * H; ++k)
      static_cast<T*>(sweep.ds0[s])[k] =
          number<T>(sweep.dlast[s], k) + h_prev[k % H] * static_cast<T>(k + s + 1);
  return 0;
}

int launched(const CudaPlan& plan) {
  ++answers.launches;
  return plan.residency == fastrnn::kGrid ? answers.cooperative : 0;
}

}  // namespace

EXPORT void fastrnn_stub_answer(int usable, int architecture, int cooperative) {
  answers = {usable, architecture, cooperative};
}
EXPORT void fastrnn_stub_echo() { answers.echoes = true; }
EXPORT void fastrnn_stub_capturing(int whether) { answers.capturing = whether != 0; }
EXPORT int fastrnn_stub_launches() { return answers.launches; }

EXPORT int fastrnn_cuda_forward(const char* cell, const Sweep* sweep, const CudaPlan* plan, void*) {
  if (const int error = launched(*plan)) return error;
  if (!answers.echoes) return 0;
  if (plan->precision == Precision::kFloat64) return echo_forward<double>(sizes_of(cell), *sweep);
  return echo_forward<float>(sizes_of(cell), *sweep);
}
EXPORT int fastrnn_cuda_backward(const char* cell, const Sweep* sweep, const CudaPlan* plan,
                                 void*) {
  if (const int error = launched(*plan)) return error;
  if (!answers.echoes) return 0;
  if (plan->precision == Precision::kFloat64) return echo_backward<double>(sizes_of(cell), *sweep);
  return echo_backward<float>(sizes_of(cell), *sweep);
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
EXPORT int fastrnn_cuda_capturing(void*) { return answers.capturing; }
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
