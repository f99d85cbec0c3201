// The regime kStep, backward: a launch a step, and one more that completes the gradients of the
// states before the chunk.

#include "cuda_step.cuh"

namespace fastrnn {
namespace step {

// Rows of the batch x units of a block.
using Small = Shape<1, 2, 1, 1, 4, 256, 4>;   // 16 x 16
using Middle = Shape<1, 2, 2, 1, 4, 256, 3>;  // 32 x 16
using Large = Shape<2, 2, 2, 2, 2, 128, 3>;   // 64 x 32

// A block has some units of some rows: d of state 0 is what the step processed before, one later in
// the lane, passes on through its gates, dv * R over all G*H of them, and what its cell passed on
// directly, which lies in `ds`; then the derivative of the cell, a unit of a row per thread. Where
// a row does not live here but did at the step processed before, only the sum is left to do; step
// begin - 1 does that for all rows. What the forward left does not depend on the step processed
// before, so it and the weights are on their way before this launch waits for that one. Per block
// and step: G*H*kUnits weights and kRows*G*H of dv in, 2*kRows*G*H*kUnits FLOPs.
template <class Cell, Number number, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    backward_step(const Sweep sweep, const int step) {
  constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kKept;
  constexpr int kWidth = S - 1 + K, kEach = Shape::kPerThread;
  constexpr int kValues = K + 2 * S + 1;
  constexpr bool kAhead = kEach * kValues <= 32;  // where registers can hold them meanwhile
  using Multiply = Product<number, Shape, 1, true>;
  using Stored = typename Multiply::Stored;
  using Sum = typename Multiply::Sum;
  FASTRNN_SHARED(unsigned char, shared);

  const Lane lane(sweep, blockIdx.y);
  const Part<Shape> part(sweep);
  const int hidden = static_cast<int>(sweep.hidden);
  const int t = lane.time(step), t_after = lane.time(step + 1);
  const auto* const dy = static_cast<const Stored*>(sweep.dy);
  const auto* const y = static_cast<const Stored*>(sweep.y);
  const auto* const tape = static_cast<const Stored*>(sweep.tape);
  const auto* const s0 = static_cast<const Sum*>(sweep.s0);
  auto* const ds = static_cast<Sum*>(sweep.ds);
  auto* const du = static_cast<Stored*>(sweep.du);
  auto* const dv = static_cast<Stored*>(sweep.dv);
  auto* const previous = static_cast<Stored*>(sweep.previous);
  Multiply product(shared, static_cast<const Stored*>(sweep.w_hh) + lane.weights(G, 0), hidden,
                   G * hidden, part.first_unit, part.rows);

  if (threadIdx.x < Shape::kRows) {
    const int64_t b = part.first_row + threadIdx.x;
    auto& row = product.row(threadIdx.x);
    row = {};
    const int stop = lane.stop(b);
    row.alive = step >= sweep.begin && t < stop;
    if (row.alive) {
      row.at = lane.row(t, b);
      row.cut = lane.cut(t, b, stop);
      row.before = lane.initial(t, stop) ? -1 : lane.row(lane.time_before(t), b);
    }
    if (step + 1 < sweep.end && t_after < stop && !lane.cut(t_after, b, stop)) {
      row.operand = dv + lane.chunk_row(lane.row(t_after, b)) * G * hidden;
    }
  }
  dev::allow_next_launch();
  __syncthreads();
  product.start();

  // Element i of this thread: its row and its unit, of the block.
  const auto row_of = [](int i) { return (threadIdx.x + i * Shape::kThreads) / Shape::kUnits; };
  const auto unit_of = [](int i) { return (threadIdx.x + i * Shape::kThreads) % Shape::kUnits; };
  // What the forward knew of an element, and the gradient of its output.
  struct Known {
    Sum kept[K > 0 ? K : 1], before[S], after[S], dy;
  };
  const auto recall = [&](int i, Known& known) {
    const auto& row = product.row(row_of(i));
    const int n = part.first_unit + unit_of(i);
    if (!row.alive || n >= hidden) return;
    const auto taped = [&](int64_t at, int j) {
      return dev::to_float(tape[lane.taped(at, kWidth, j) + n]);
    };
#pragma unroll
    for (int j = 0; j < K; ++j) known.kept[j] = taped(row.at, S - 1 + j);
    known.dy = dy ? dev::to_float(dy[lane.output(row.at) + n]) : Sum(0);
    known.after[0] = dev::to_float(y[lane.output(row.at) + n]);
#pragma unroll
    for (int j = 1; j < S; ++j) known.after[j] = taped(row.at, j - 1);
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (row.cut) {
        known.before[j] = 0;
      } else if (row.before < 0) {
        known.before[j] = s0[lane.state(j, part.first_row + row_of(i)) + n];
      } else {
        known.before[j] =
            j ? taped(row.before, j - 1) : dev::to_float(y[lane.output(row.before) + n]);
      }
    }
  };
  Known ahead[kAhead ? kEach : 1] = {};
  if constexpr (kAhead) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) recall(i, ahead[i]);
  }
  dev::wait_for_previous_launch();
  product.run();

#pragma unroll(kAhead ? kEach : 1)
  for (int i = 0; i < kEach; ++i) {
    const int r = row_of(i), n = part.first_unit + unit_of(i);
    const int64_t b = part.first_row + r;
    if (r >= part.rows || n >= hidden) continue;
    const auto& row = product.row(r);
    if (!row.alive) {
      if (row.operand) ds[lane.state(0, b) + n] += product.sum(0, r, unit_of(i));
      continue;
    }
    Known known;
    if constexpr (kAhead) {
      known = ahead[i];
    } else {
      recall(i, known);
    }
    Sum dnext[S], gradient_u[G], gradient_v[G], passed[S];
#pragma unroll
    for (int j = 0; j < S; ++j) dnext[j] = ds[lane.state(j, b) + n];
    dnext[0] += product.sum(0, r, unit_of(i)) + known.dy;
    Cell::backward(known.kept, known.before, known.after, dnext, gradient_u, gradient_v, passed);
    const int64_t at = lane.chunk_row(row.at);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      dev::store(dv + (at * G + g) * hidden + n, gradient_v[g]);
      if constexpr (!all_tied<Cell>()) dev::store(du + (at * G + g) * hidden + n, gradient_u[g]);
    }
    dev::store(previous + at * hidden + n, known.before[0]);
#pragma unroll
    for (int j = 0; j < S; ++j) ds[lane.state(j, b) + n] = row.cut ? Sum(0) : passed[j];
  }
}

template <class Cell, Number number, class Shape>
int backward(const Sweep& sweep, void* stream) {
  using Multiply = Product<number, Shape, 1, true>;
  dev::Launch how{grid<Shape>(sweep), dim3(Shape::kThreads), Multiply::kSharedBytes};
  for (int64_t step = sweep.end - 1; step >= sweep.begin - 1; --step) {
    how.overlaps = step < sweep.end - 1;
    const int error =
        dev::launch(backward_step<Cell, number, Shape>, how, stream, sweep, static_cast<int>(step));
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace step

int launch_step_backward(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return with_cell(cell, [&](auto c) {
    return step::with_number(plan.number, [&](auto n) {
      using Cell = decltype(c);
      constexpr Number number = decltype(n)::kValue;
      if (plan.batch_tile <= 16) return step::backward<Cell, number, step::Small>(sweep, stream);
      if (plan.batch_tile <= 32) return step::backward<Cell, number, step::Middle>(sweep, stream);
      return step::backward<Cell, number, step::Large>(sweep, stream);
    });
  });
}

}  // namespace fastrnn
