// The forward pass of residency kStep: one launch per step, for any H, precision and cell. Weights
// come from the L2 cache or from memory at every step.

#include "cuda/step/product.cuh"

namespace fastrnn {
namespace step {

// A block computes all gates of its units for its rows: the product in parts of the depth, which
// pass through shared memory in a ring of stages, then the cell, a unit of a row per thread. The
// operand is `y` in 16 bits, otherwise state 0 of `carry`, for which steps use two buffers in turn;
// at the first step of a row it is `s0`. Loads of weights and inputs begin before this launch waits
// for the previous one, because they do not depend on it. Per block and step: G*kUnits*H weights
// and kRows*H of h in, 2*kRows*G*kUnits*H FLOP.
template <class Cell, Precision precision, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    forward_step(const Sweep sweep, const int step, const bool odd) {
  constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  constexpr int kWidth = S - 1 + K, kSavedRoom = K > 0 ? K : 1;
  using Multiply = Product<precision, Shape, G, false>;
  using Stored = typename Multiply::Stored;
  using Sum = typename Multiply::Sum;
  FASTRNN_SHARED(unsigned char, shared);

  const Recurrence recurrence(sweep, blockIdx.y);
  const Part<Shape> part(sweep);
  const int hidden = static_cast<int>(sweep.hidden), t = recurrence.time(step);
  const auto* const u = static_cast<const Stored*>(sweep.u);
  const auto* const bias = static_cast<const Stored*>(sweep.b_hh);
  auto* const carry = static_cast<Sum*>(sweep.carry);
  auto* const y = static_cast<Stored*>(sweep.y);
  auto* const tape = static_cast<Stored*>(sweep.tape);
  const int place = odd ? S : 0, next_place = odd ? 0 : S;  // of state 0
  Multiply product(shared, static_cast<const Stored*>(sweep.w_hh) + recurrence.weights(G, 0),
                   hidden, hidden, part.first_unit, part.rows);

  if (threadIdx.x < Shape::kRows) {
    const int64_t b = part.first_row + threadIdx.x;
    auto& row = product.row(threadIdx.x);
    row = {};
    const int stop = recurrence.stop(b);
    row.alive = t < stop;
    if (row.alive) {
      row.at = recurrence.row(t, b);
      row.cut = recurrence.cut(t, b, stop);
      if (row.cut) {
      } else if (recurrence.initial(t, stop)) {
        const auto* const s0 = static_cast<const Stored*>(sweep.s0[0]);
        if (s0) row.operand = s0 + recurrence.own_state(b);
      } else if constexpr (kSame<Stored, Sum>) {
        row.operand = carry + recurrence.state(place, b);
      } else {
        row.operand = y + recurrence.output(recurrence.row(recurrence.time_before(t), b));
      }
    }
    row.outer = recurrence.unstarted(t, stop);
  }
  platform::allow_next_launch();
  __syncthreads();
  product.start();

  // The inputs of a unit of a row: u, v without the product, the states before.
  struct Element {
    Sum u[G], v[G], s[S];
  };
  const auto load_inputs = [&](int i, Element& e) {
    const auto& row = product.row(part.row(i));
    const int n = part.first_unit + part.unit(i);
    if (!row.alive || n >= hidden) return;
    const Stored* const from = u + recurrence.chunk_row(row.at) * G * hidden + n;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      e.u[g] = platform::to_float(from[g * sweep.hidden]);
      if (is_summed<Cell>(g)) {
        e.v[g] = e.u[g];
      } else {
        e.v[g] = bias ? platform::to_float(bias[recurrence.bias(G, g) + n]) : Sum(0);
      }
    }
  };
  const auto load_states = [&](int i, Element& e) {
    const int r = part.row(i), n = part.first_unit + part.unit(i);
    if (r >= part.rows || n >= hidden) return;
    const auto& row = product.row(r);
    const int64_t b = part.first_row + r;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      const auto* const s0 = static_cast<const Stored*>(sweep.s0[j]);
      if (row.cut || (row.outer && !s0)) {
        e.s[j] = 0;
      } else if (row.outer) {
        e.s[j] = platform::to_float(s0[recurrence.own_state(b) + n]);
      } else {
        e.s[j] = carry[recurrence.state(j ? j : place, b) + n];
      }
    }
  };
  const auto finish = [&](int i, Element& e) {
    const int r = part.row(i), n = part.first_unit + part.unit(i);
    const int64_t b = part.first_row + r;
    if (r >= part.rows || n >= hidden) return;
    const auto& row = product.row(r);
    const auto leave = [&](const Sum(&states)[S]) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        if (step + 1 == sweep.steps)
          platform::store(static_cast<Stored*>(sweep.last[j]) + recurrence.own_state(b) + n,
                          states[j]);
        else
          carry[recurrence.state(j ? j : next_place, b) + n] = states[j];
      }
    };
    if (!row.alive) {
      leave(e.s);
      return;
    }
    Sum next[S], saved[kSavedRoom];
#pragma unroll
    for (int g = 0; g < G; ++g) e.v[g] += product.sum(g, r, part.unit(i));
    Cell::forward(e.u, e.v, e.s, next, saved);
    platform::store(y + recurrence.output(row.at) + n, next[0]);
    leave(next);
    if (tape) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Sum value =
            j < S - 1 ? next[j < S - 1 ? 1 + j : 0] : saved[j < S - 1 ? 0 : j - (S - 1)];
        platform::store(tape + recurrence.taped(row.at, kWidth, j) + n, value);
      }
    }
  };

  pipelined<Element, Shape>(product, load_inputs, load_states, finish);
}

template <class Cell, Precision precision, class Shape>
int forward(const Sweep& sweep, void* stream) {
  using Multiply = Product<precision, Shape, Cell::kGates, false>;
  platform::Launch how{grid<Shape>(sweep), dim3(Shape::kThreads), Multiply::kSharedBytes};
  bool odd = false;
  for (int64_t step = sweep.begin; step < sweep.end; ++step, odd = !odd) {
    how.overlaps = step > sweep.begin;
    const int error = platform::launch(forward_step<Cell, precision, Shape>, how, stream, sweep,
                                       static_cast<int>(step), odd);
    if (error != 0) return error;
  }
  if (!odd || sweep.end == sweep.steps) return 0;
  // State 0 is in the second buffer.
  auto* const carry = static_cast<typename Multiply::Sum*>(sweep.carry);
  const int64_t size = sweep.recurrences * sweep.batch * sweep.hidden;
  return platform::copy(carry, carry + Cell::kStates * size, size * sizeof *carry, stream);
}

}  // namespace step

int launch_step_forward(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return step::with_kernel<step::ForwardTiles>(cell, plan, [&](auto c, auto precision, auto shape) {
    return step::forward<decltype(c), decltype(precision)::kValue, decltype(shape)>(sweep, stream);
  });
}

}  // namespace fastrnn
