// The backward pass of residency kStep: one launch per step, and one more that completes the
// gradients of the states before the chunk.

#include "cuda/step/product.cuh"

namespace fastrnn {
namespace step {

// A block has some units of some rows. The gradient of state 0 is dv * R of the next step of the
// recurrence, which the previous launch processed, over all G*H gates, plus the part that the cell
// passed on directly, in `ds`. Then comes the cell's derivative, a unit of a row per thread. If a
// row does not live at this step but did at the next one, only the sum is left to do, as it is for
// all rows at step begin - 1. Loads of weights and of the forward pass's values begin before this
// launch waits for the previous one, because they do not depend on it. Per block and step:
// G*H*kUnits weights and kRows*G*H of dv in, 2*kRows*G*H*kUnits FLOP.
template <class Cell, Precision precision, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    backward_step(const Sweep sweep, const int step) {
  constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  constexpr int kWidth = S - 1 + K, kSavedRoom = K > 0 ? K : 1;
  using Multiply = Product<precision, Shape, 1, true>;
  using Stored = typename Multiply::Stored;
  using Sum = typename Multiply::Sum;
  FASTRNN_SHARED(unsigned char, shared);

  const Recurrence recurrence(sweep, blockIdx.y);
  const Part<Shape> part(sweep);
  const int hidden = static_cast<int>(sweep.hidden);
  const int t = recurrence.time(step), t_after = recurrence.time(step + 1);
  const auto* const dy = static_cast<const Stored*>(sweep.dy);
  const auto* const y = static_cast<const Stored*>(sweep.y);
  const auto* const tape = static_cast<const Stored*>(sweep.tape);
  auto* const ds = static_cast<Sum*>(sweep.ds);
  auto* const du = static_cast<Stored*>(sweep.du);
  auto* const dv = static_cast<Stored*>(sweep.dv);
  auto* const h_prev = static_cast<Stored*>(sweep.h_prev);
  Multiply product(shared, static_cast<const Stored*>(sweep.w_hh) + recurrence.weights(G, 0),
                   hidden, G * hidden, part.first_unit, part.rows);

  if (threadIdx.x < Shape::kRows) {
    const int64_t b = part.first_row + threadIdx.x;
    auto& row = product.row(threadIdx.x);
    row = {};
    const int stop = recurrence.stop(b);
    row.alive = step >= sweep.begin && t < stop;
    if (row.alive) {
      row.at = recurrence.row(t, b);
      row.cut = recurrence.cut(t, b, stop);
      row.before = recurrence.initial(t, stop) ? -1 : recurrence.row(recurrence.time_before(t), b);
    }
    if (step + 1 < sweep.end && t_after < stop && !recurrence.cut(t_after, b, stop)) {
      row.operand = dv + recurrence.chunk_row(recurrence.row(t_after, b)) * G * hidden;
    }
    row.outer = recurrence.ended(t, stop);
  }
  platform::allow_next_launch();
  __syncthreads();
  product.start();

  // Inputs of a unit of a row: the forward pass's values, and gradients without the product.
  struct Element {
    Sum saved[kSavedRoom], before[S], after[S], dy, d[S];
  };
  const auto load_known = [&](int i, Element& e) {
    const auto& row = product.row(part.row(i));
    const int n = part.first_unit + part.unit(i);
    if (!row.alive || n >= hidden) return;
    const auto taped = [&](int64_t at, int j) {
      return platform::to_float(tape[recurrence.taped(at, kWidth, j) + n]);
    };
#pragma unroll
    for (int j = 0; j < K; ++j) e.saved[j] = taped(row.at, S - 1 + j);
    e.dy = dy ? platform::to_float(dy[recurrence.output(row.at) + n]) : Sum(0);
    e.after[0] = platform::to_float(y[recurrence.output(row.at) + n]);
#pragma unroll
    for (int j = 1; j < S; ++j) e.after[j] = taped(row.at, j - 1);
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (row.cut) {
        e.before[j] = 0;
      } else if (row.before < 0) {
        const auto* const s0 = static_cast<const Stored*>(sweep.s0[j]);
        const int64_t from = recurrence.own_state(part.first_row + part.row(i)) + n;
        e.before[j] = s0 ? platform::to_float(s0[from]) : Sum(0);
      } else if (j == 0) {
        e.before[j] = platform::to_float(y[recurrence.output(row.before) + n]);
      } else {
        e.before[j] = taped(row.before, j - 1);
      }
    }
  };
  const auto load_gradients = [&](int i, Element& e) {
    const int r = part.row(i), n = part.first_unit + part.unit(i);
    if (r >= part.rows || n >= hidden) return;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      const auto* const dlast = static_cast<const Stored*>(sweep.dlast[j]);
      if (!product.row(r).outer)
        e.d[j] = ds[recurrence.state(j, part.first_row + r) + n];
      else if (dlast)
        e.d[j] = platform::to_float(dlast[recurrence.own_state(part.first_row + r) + n]);
      else
        e.d[j] = 0;
    }
  };
  const auto finish = [&](int i, Element& e) {
    const int r = part.row(i), n = part.first_unit + part.unit(i);
    const int64_t b = part.first_row + r;
    if (r >= part.rows || n >= hidden) return;
    const auto& row = product.row(r);
    e.d[0] += product.sum(0, r, part.unit(i));
    if (step < 0) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        auto* const ds0 = static_cast<Stored*>(sweep.ds0[j]);
        if (ds0) platform::store(ds0 + recurrence.own_state(b) + n, e.d[j]);
      }
      return;
    }
    if (!row.alive) {
      if (row.operand) ds[recurrence.state(0, b) + n] = e.d[0];
      return;
    }
    e.d[0] += e.dy;
    Sum gradient_u[G], gradient_v[G], passed[S];
    Cell::backward(e.saved, e.before, e.after, e.d, gradient_u, gradient_v, passed);
    const int64_t at = recurrence.chunk_row(row.at);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      platform::store(dv + (at * G + g) * hidden + n, gradient_v[g]);
      if constexpr (!all_summed<Cell>())
        platform::store(du + (at * G + g) * hidden + n, gradient_u[g]);
    }
    platform::store(h_prev + at * hidden + n, e.before[0]);
#pragma unroll
    for (int j = 0; j < S; ++j) ds[recurrence.state(j, b) + n] = row.cut ? Sum(0) : passed[j];
  };

  pipelined<Element, Shape>(product, load_known, load_gradients, finish);
}

template <class Cell, Precision precision, class Shape>
int backward(const Sweep& sweep, void* stream) {
  using Multiply = Product<precision, Shape, 1, true>;
  platform::Launch how{grid<Shape>(sweep), dim3(Shape::kThreads), Multiply::kSharedBytes};
  bool wanted = sweep.begin > 0;  // what the launch before the first step is for
  for (void* ds0 : sweep.ds0) wanted |= ds0 != nullptr;
  for (int64_t step = sweep.end - 1; step >= sweep.begin - wanted; --step) {
    how.overlaps = step < sweep.end - 1;
    const int error = platform::launch(backward_step<Cell, precision, Shape>, how, stream, sweep,
                                       static_cast<int>(step));
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace step

int launch_step_backward(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return step::with_kernel<step::BackwardTiles>(
      cell, plan, [&](auto c, auto precision, auto shape) {
        return step::backward<decltype(c), decltype(precision)::kValue, decltype(shape)>(sweep,
                                                                                         stream);
      });
}

}  // namespace fastrnn
