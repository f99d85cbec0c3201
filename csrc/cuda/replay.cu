// The tape of steps whose output is known, for a way back that kept nothing else. No unit waits for
// another here: the products with the recurrent weights are one for all steps, and the host's.

#include "core/cell.h"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace fastrnn {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 1024;  // along the steps, where these do not depend on each other

// ---- Kernels -----------------------------------------------------------------------------------

// State 0 before each step, from the output: where the step begins an episode zero, at the first
// step of a row the initial state. A thread has a unit of a row of the batch, in some of the steps.
template <class Stored, class Sum>
__global__ void __launch_bounds__(kThreads) previous_rows(const Sweep sweep) {
  const Lane at(sweep, blockIdx.z);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= sweep.batch * sweep.hidden) return;
  const int64_t b = i / sweep.hidden, n = i % sweep.hidden;
  const int stop = at.stop(b), high = at.high(stop);
  const auto* const y = static_cast<const Stored*>(sweep.y);
  const auto* const s0 = static_cast<const Sum*>(sweep.s0);
  auto* const previous = static_cast<Stored*>(sweep.previous);
  for (int step = at.low(stop) + blockIdx.y; step < high; step += gridDim.y) {
    const int t = at.time(step);
    Stored* const to = previous + at.chunk_row(at.row(t, b)) * sweep.hidden + n;
    if (at.cut(t, b, stop)) {
      dev::store(to, Sum(0));
    } else if (at.initial(t, stop)) {
      dev::store(to, s0[at.state(0, b) + n]);
    } else {
      *to = y[at.output(at.row(at.time_before(t), b)) + n];
    }
  }
}

// The cell at every step, from both projections. Units are independent, and so are steps of a cell
// that has no state but the output; the others walk through them, and load several ahead. Before
// the first step of a chunk stand the states that the way back wants to see there.
// Per step: 2*G*B*H numbers in, (S - 1 + K)*B*H out.
template <class Cell, class Stored, class Sum>
__global__ void __launch_bounds__(kThreads) replay(const Sweep sweep) {
  constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kKept, kWidth = S - 1 + K;
  constexpr int kAhead = S > 1 ? 4 : 1;
  const Lane at(sweep, blockIdx.z);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, hidden = sweep.hidden;
  if (i >= sweep.batch * hidden) return;
  const int64_t b = i / hidden, n = i % hidden;
  const int stop = at.stop(b), low = at.low(stop), high = at.high(stop);
  const auto* const u = static_cast<const Stored*>(sweep.u);
  const auto* const v = static_cast<const Stored*>(sweep.v);
  const auto* const b_hh = static_cast<const Stored*>(sweep.b_hh);
  const auto* const previous = static_cast<const Stored*>(sweep.previous);
  auto* const carry = static_cast<Sum*>(sweep.carry);
  auto* const tape = static_cast<Stored*>(sweep.tape);

  Sum bias[G], s[S];
#pragma unroll
  for (int g = 0; g < G; ++g)
    bias[g] = b_hh && !is_tied<Cell>(g) ? dev::to_float(b_hh[at.bias(G, g) + n]) : Sum(0);
#pragma unroll
  for (int k = 1; k < S; ++k) s[k] = carry[at.state(k, b) + n];
  const int begin = static_cast<int>(sweep.begin);
  if (S > 1 && tape && begin > 0 && at.time(begin - 1) < stop) {
    const int64_t row = at.row(at.time(begin - 1), b);
#pragma unroll
    for (int k = 1; k < S; ++k) dev::store(tape + at.taped(row, kWidth, k - 1) + n, s[k]);
  }

  struct Given {
    Stored u[G], v[G], before;
  };
  const int stride = gridDim.y;  // 1, where steps depend on each other
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
      ahead[a].before = previous[row * hidden + n];
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int step = first + a * stride;
      if (step >= high) continue;
      const int t = at.time(step);
      const bool cut = at.cut(t, b, stop);
      Sum us[G], vs[G], after[S], kept[K > 0 ? K : 1];
#pragma unroll
      for (int g = 0; g < G; ++g) {
        us[g] = dev::to_float(ahead[a].u[g]);
        vs[g] = dev::to_float(ahead[a].v[g]) + (is_tied<Cell>(g) ? us[g] : bias[g]);
      }
      s[0] = dev::to_float(ahead[a].before);
#pragma unroll
      for (int k = 1; k < S; ++k) s[k] = cut ? Sum(0) : s[k];
      Cell::forward(us, vs, s, after, kept);
      if (tape) {
        const int64_t row = at.row(t, b);
#pragma unroll
        for (int k = 1; k < S; ++k) dev::store(tape + at.taped(row, kWidth, k - 1) + n, after[k]);
#pragma unroll
        for (int k = 0; k < K; ++k)
          dev::store(tape + at.taped(row, kWidth, S - 1 + k) + n, kept[k]);
      }
#pragma unroll
      for (int k = 1; k < S; ++k) s[k] = after[k];
    }
  }
#pragma unroll
  for (int k = 1; k < S; ++k) carry[at.state(k, b) + n] = s[k];
}

// ---- Launches ----------------------------------------------------------------------------------

// f(a stored number, a number of sums)
template <class F>
int with_types(Number number, F f) {
  switch (number) {
    case Number::kFloat64:
      return f(double{}, double{});
    case Number::kBfloat16:
      return f(dev::bfloat16{}, float{});
    case Number::kFloat16:
      return f(dev::float16{}, float{});
    default:
      return f(float{}, float{});
  }
}

dev::Launch launch_of(const Sweep& sweep, bool steps_depend) {
  const int64_t steps = sweep.end - sweep.begin;
  const int64_t side_by_side = steps_depend ? 1 : steps < kMostBlocks ? steps : kMostBlocks;
  dev::Launch how;
  how.grid = dim3(static_cast<unsigned>((sweep.batch * sweep.hidden + kThreads - 1) / kThreads),
                  static_cast<unsigned>(side_by_side), static_cast<unsigned>(sweep.lanes));
  how.block = dim3(kThreads);
  return how;
}

}  // namespace

// ---- Entry -------------------------------------------------------------------------------------

int launch_previous(int, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return with_types(plan.number, [&](auto stored, auto sum) {
    return dev::launch(previous_rows<decltype(stored), decltype(sum)>, launch_of(sweep, false),
                       stream, sweep);
  });
}

int launch_replay(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return with_cell(cell, [&](auto c) {
    using Cell = decltype(c);
    if constexpr (Cell::kStates + Cell::kKept == 1) return 0;  // there is no tape
    return with_types(plan.number, [&](auto stored, auto sum) {
      return dev::launch(replay<Cell, decltype(stored), decltype(sum)>,
                         launch_of(sweep, Cell::kStates > 1), stream, sweep);
    });
  });
}

}  // namespace fastrnn
