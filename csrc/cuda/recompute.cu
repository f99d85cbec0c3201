// Recomputes the tape of steps whose output is known, after a forward pass that saved nothing else.
// No unit waits for another: the host computes the products with the recurrent weights, one product
// for all steps.

#include "core/cell.h"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace fastrnn {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 1024;  // along the steps, if these are independent

// ---- Kernels -----------------------------------------------------------------------------------

// Writes state 0 before each step: the output before it, zero if the step begins an episode, or the
// initial state at the first step of a row. A thread has a unit of a row of the batch, in some of
// the steps. Per step: B*H numbers in and out.
template <class Stored, class Sum>
__global__ void __launch_bounds__(kThreads) h_prev_rows(const Sweep sweep) {
  const Recurrence at(sweep, blockIdx.z);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= sweep.batch * sweep.hidden) return;
  const int64_t b = i / sweep.hidden, n = i % sweep.hidden;
  const int stop = at.stop(b), high = at.high(stop);
  const auto* const y = static_cast<const Stored*>(sweep.y);
  const auto* const s0 = static_cast<const Stored*>(sweep.s0[0]);
  auto* const h_prev = static_cast<Stored*>(sweep.h_prev);
  for (int step = at.low(stop) + blockIdx.y; step < high; step += gridDim.y) {
    const int t = at.time(step);
    Stored* const to = h_prev + at.chunk_row(at.row(t, b)) * sweep.hidden + n;
    const bool initial = at.initial(t, stop);
    if (at.cut(t, b, stop) || (initial && !s0)) {
      platform::store(to, Sum(0));
    } else if (initial) {
      *to = s0[at.own_state(b) + n];
    } else {
      *to = y[at.output(at.row(at.time_before(t), b)) + n];
    }
  }
}

// Applies the cell to both projections of every step. Units are independent, and so are the steps
// of a cell with one state; for other cells a thread walks through the steps and loads several
// ahead. The states before the chunk go into the tape's row before it, where the backward pass
// reads them. Per step: (2*G + 1)*B*H numbers in, (S - 1 + K)*B*H out.
template <class Cell, class Stored, class Sum>
__global__ void __launch_bounds__(kThreads) recompute(const Sweep sweep) {
  constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved, kWidth = S - 1 + K;
  constexpr int kAhead = S > 1 ? 4 : 1;
  const Recurrence at(sweep, blockIdx.z);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, hidden = sweep.hidden;
  if (i >= sweep.batch * hidden) return;
  const int64_t b = i / hidden, n = i % hidden;
  const int stop = at.stop(b), low = at.low(stop), high = at.high(stop);
  const auto* const u = static_cast<const Stored*>(sweep.u);
  const auto* const v = static_cast<const Stored*>(sweep.v);
  const auto* const b_hh = static_cast<const Stored*>(sweep.b_hh);
  const auto* const h_prev = static_cast<const Stored*>(sweep.h_prev);
  auto* const carry = static_cast<Sum*>(sweep.carry);
  auto* const tape = static_cast<Stored*>(sweep.tape);

  Sum bias[G], s[S];
#pragma unroll
  for (int g = 0; g < G; ++g)
    bias[g] = b_hh && !is_summed<Cell>(g) ? platform::to_float(b_hh[at.bias(G, g) + n]) : Sum(0);
#pragma unroll
  for (int k = 1; k < S; ++k) s[k] = carry[at.state(k, b) + n];
  const int begin = static_cast<int>(sweep.begin);
  if (S > 1 && tape && begin > 0 && at.time(begin - 1) < stop) {
    const int64_t row = at.row(at.time(begin - 1), b);
#pragma unroll
    for (int k = 1; k < S; ++k) platform::store(tape + at.taped(row, kWidth, k - 1) + n, s[k]);
  }

  struct Given {
    Stored u[G], v[G], before;
  };
  const int stride = gridDim.y;  // 1 if steps depend on each other
  for (int first = low + blockIdx.y; first < high; first += kAhead * stride) {
    Given ahead[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int step = first + a * stride;
      if (step >= high) continue;
      const int64_t row = at.chunk_row(at.row(at.time(step), b));
#pragma unroll
      for (int g = 0; g < G; ++g) {
        ahead[a].u[g] = u[(row * G + g) * hidden + n];
        ahead[a].v[g] = v[(row * G + g) * hidden + n];
      }
      ahead[a].before = h_prev[row * hidden + n];
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int step = first + a * stride;
      if (step >= high) continue;
      const int t = at.time(step);
      const bool cut = at.cut(t, b, stop);
      Sum us[G], vs[G], after[S], saved[K > 0 ? K : 1];
#pragma unroll
      for (int g = 0; g < G; ++g) {
        us[g] = platform::to_float(ahead[a].u[g]);
        vs[g] = platform::to_float(ahead[a].v[g]) + (is_summed<Cell>(g) ? us[g] : bias[g]);
      }
      s[0] = platform::to_float(ahead[a].before);
#pragma unroll
      for (int k = 1; k < S; ++k) s[k] = cut ? Sum(0) : s[k];
      Cell::forward(us, vs, s, after, saved);
      if (tape) {
        const int64_t row = at.row(t, b);
#pragma unroll
        for (int k = 1; k < S; ++k)
          platform::store(tape + at.taped(row, kWidth, k - 1) + n, after[k]);
#pragma unroll
        for (int k = 0; k < K; ++k)
          platform::store(tape + at.taped(row, kWidth, S - 1 + k) + n, saved[k]);
      }
#pragma unroll
      for (int k = 1; k < S; ++k) s[k] = after[k];
    }
  }
#pragma unroll
  for (int k = 1; k < S; ++k) carry[at.state(k, b) + n] = s[k];
}

// ---- Launches ----------------------------------------------------------------------------------

// Calls f with a number of the storage type and one of the type of sums.
template <class F>
int with_types(Precision precision, F f) {
  switch (precision) {
    case Precision::kFloat64:
      return f(double{}, double{});
    case Precision::kBfloat16:
      return f(platform::bfloat16{}, float{});
    case Precision::kFloat16:
      return f(platform::float16{}, float{});
    default:
      return f(float{}, float{});
  }
}

platform::Launch launch_of(const Sweep& sweep, bool steps_depend) {
  const int64_t steps = sweep.end - sweep.begin;
  const int64_t side_by_side = steps_depend ? 1 : steps < kMostBlocks ? steps : kMostBlocks;
  platform::Launch how;
  how.grid = dim3(static_cast<unsigned>((sweep.batch * sweep.hidden + kThreads - 1) / kThreads),
                  static_cast<unsigned>(side_by_side), static_cast<unsigned>(sweep.recurrences));
  how.block = dim3(kThreads);
  return how;
}

}  // namespace

// ---- Entry -------------------------------------------------------------------------------------

int launch_h_prev(int, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return with_types(plan.precision, [&](auto stored, auto sum) {
    return platform::launch(h_prev_rows<decltype(stored), decltype(sum)>, launch_of(sweep, false),
                            stream, sweep);
  });
}

// All sources are compiled for the same GPUs, so one kernel stands for all.
int usable(int* architecture) {
  const auto kernel = h_prev_rows<float, float>;
  const platform::KernelFacts facts = platform::facts_of(reinterpret_cast<const void*>(kernel));
  *architecture = facts.architecture;
  return facts.error;
}

int launch_recompute(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return with_cell(cell, [&](auto c) {
    using Cell = decltype(c);
    if constexpr (Cell::kStates + Cell::kSaved == 1) return 0;  // there is no tape
    return with_types(plan.precision, [&](auto stored, auto sum) {
      return platform::launch(recompute<Cell, decltype(stored), decltype(sum)>,
                              launch_of(sweep, Cell::kStates > 1), stream, sweep);
    });
  });
}

}  // namespace fastrnn
