// The backward sweep in one launch: the recurrent weights stay on chip, the steps are a loop.
#pragma once

#include "cuda/persistent/launch.cuh"
#include "cuda/quick_math.cuh"
#include "cuda/rows.cuh"

namespace fastrnn {
namespace {

using persistent::Launched;
using tile::kWarp;
using tile::Layout;

// ---- Traits ------------------------------------------------------------------------------------

// A row group has kTiles times 16 units; its product adds up, over the gates of all units, the part
// of their gradients that reaches state 0 of these. An *item* is 8 units of the result in 8
// columns, two numbers per thread. The warps of a row group, each with a slice of the product,
// share the items, because the cell's arithmetic takes as long as the product.
template <class Cell_, Precision precision_, int kTiles_, int kColumnTiles_>
struct Traits {
  using Cell = Cell_;
  static constexpr Precision precision = precision_;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  static constexpr int kTiles = kTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kColumns = 8 * kColumnTiles;  // rows of the batch
  static constexpr int kUnits = 16 * kTiles;
  static constexpr int kItems = 2 * kTiles * kColumnTiles;
  static constexpr int kResident =
      tile::resident_k_blocks<tile::Backward, precision, kTiles, kColumnTiles>();
  static constexpr int kSize = tile::operand_bytes(precision);
  static constexpr int kGatePieces = 8 * kSize / tile::kPiece;  // of an item's column, per gate
  static constexpr int kPieces = kGates * kGatePieces;
  static constexpr int kTaped = kStates - 1 + kSaved;
  static constexpr bool kReadsInPlace = true;  // in a grid, the operand in global memory
  // In a grid a flag tells that all is visible that was stored before it. So a block raises it
  // before it stores anything else.
  template <int kResidency>
  static constexpr bool kPublishesFirst = kResidency == kGrid;
  // Shared memory of a row group: gradients of states, and steps of the rows of the batch.
  static constexpr int kGradients = kTiles * kColumnTiles * kStates * tile::kGradient;
  static constexpr int kOwn = kGradients + kColumns * tile::kStop;
  using Format = tile::Format<precision>;
  using Stored = typename Format::Stored;
  using Operand = typename Format::Operand;
  using Product = tile::Product<precision, kTiles, kColumnTiles, kResident>;

  static tile::Need need(int64_t hidden) {
    const int64_t padded = (hidden + 7) / 8 * 8;
    return {(hidden + kUnits - 1) / kUnits,
            kGates * padded * kSize,
            kTiles,
            kColumns,
            kResident,
            tile::staged_bytes<kPieces>(),
            kOwn,
            kReadsInPlace};
  }
};

// The inputs of the cell's derivative at a step, as stored, for both numbers of an item.
template <class X>
struct Values {
  typename X::Stored saved[2][X::kSaved + 1], before[2][X::kStates], after[2][X::kStates], dy[2];
  uint8_t resets[2];
  bool alive[2];
};

// The results of the cell's derivative that no other thread waits for.
template <class X>
struct Results {
  Quick du[2][X::kGates], dv[2][X::kGates];
  typename X::Stored h_prev[2];
  bool alive[2];
};

// ---- Gradients of states -----------------------------------------------------------------------

// That of unit n of state k of a row of the batch after the chunk, whose last step is at time t.
template <class X>
__device__ __forceinline__ float gradient_after(const Recurrence& at, int k, int64_t b, int n,
                                                int t) {
  if (!at.ended(t, at.stop(b))) return static_cast<const float*>(at.sweep.ds)[at.state(k, b) + n];
  const auto* dlast = static_cast<const typename X::Stored*>(at.sweep.dlast[k]);
  return dlast == nullptr ? 0.0f : platform::to_float(dlast[at.own_state(b) + n]);
}

// Leaves it before the chunk, for the next one or for the caller, who may not want it.
template <class X>
__device__ __forceinline__ void leave_gradient(const Recurrence& at, int k, int64_t b, int n,
                                               float value) {
  auto* const ds0 = static_cast<typename X::Stored*>(at.sweep.ds0[k]);
  if (at.sweep.begin > 0)
    static_cast<float*>(at.sweep.ds)[at.state(k, b) + n] = value;
  else if (ds0 != nullptr)
    platform::store(ds0 + at.own_state(b) + n, value);
}

// Passes the gradients of a tile that has no steps in the first chunk on to the caller.
template <class X>
__device__ void pass_gradients(const Recurrence& at, int64_t b0, int rank, int blocks, int t) {
  const int hidden = static_cast<int>(at.sweep.hidden);
  for (int c = 0; c < X::kColumns && b0 + c < at.sweep.batch; ++c) {
    for (int n = rank * blockDim.x + threadIdx.x; n < hidden; n += blocks * blockDim.x) {
#pragma unroll
      for (int k = 0; k < X::kStates; ++k)
        leave_gradient<X>(at, k, b0 + c, n, gradient_after<X>(at, k, b0 + c, n, t));
    }
  }
}

// ---- Kernel ------------------------------------------------------------------------------------

// A group of blocks takes one recurrence and one tile of kColumns rows of the batch through all
// steps, from the last. A block owns the columns of the weights for some units, in registers and
// then in shared memory, which also holds the gradients of these units' states, in float. A block
// waits only in the exchange of dv (see tile::Exchange), for the blocks of its group; operand i is
// the dv of the previous iteration:
//   wait for dv of all units -> R^T * dv -> add up the slices -> cell -> send dv -> store it.
// The cell's inputs are loaded two items ahead: for most plans that is a whole step. Per step and
// group, with C = kColumns: 2*G*H*H*C FLOP; (S + K + 2)*H*C numbers in, (G + 1)*H*C out.
template <class X, int kResidency>
__global__ void __launch_bounds__(tile::kThreads, 1)
    persistent_backward(const Sweep sweep, const Launched launched) {
  using Cell = typename X::Cell;
  using Format = typename X::Format;
  using Stored = typename X::Stored;
  constexpr int G = X::kGates, S = X::kStates, K = X::kSaved;
  constexpr int kColumnTiles = X::kColumnTiles;
  if constexpr (kResidency == kCluster && !platform::kClusters) return;  // never launched
  FASTRNN_SHARED(char, shared);
  const Layout& layout = launched.at;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = warp % layout.groups, slice = warp / layout.groups;
  const int rank = blockIdx.x % launched.blocks;
  const int task = launched.first + static_cast<int>(blockIdx.x) / launched.blocks;
  const Recurrence at(sweep, task / launched.tiles);
  const int64_t b0 = int64_t{task % launched.tiles} * X::kColumns;
  const int hidden = static_cast<int>(sweep.hidden), padded = (hidden + 7) / 8 * 8;

  char* own = shared + layout.own + group * X::kOwn;
  int* stops = reinterpret_cast<int*>(own + X::kGradients);  // [kColumns]
  int longest = 0;
  for (int n = lane; n < X::kColumns; n += kWarp) {
    const int stop = at.stop(b0 + n);
    longest = stop > longest ? stop : longest;
    if (slice == 0) stops[n] = stop;
  }
  longest = persistent::most_of_lanes<kWarp>(longest);
  const int low = at.low(longest), high = at.high(longest), steps = high - low;
  const int ends = at.time(static_cast<int>(sweep.end) - 1);
  if (steps <= 0) {  // in the whole group
    if (sweep.begin == 0) pass_gradients<X>(at, b0, rank, launched.blocks, ends);
    return;
  }

  const auto exchange =
      persistent::exchange_of<X, kResidency>(launched, task, rank, steps + 1, shared);
  if (rank >= layout.active) {
    exchange.ready();
    exchange.end();
    return;
  }
  exchange.begin();

  const int first_unit = (rank * layout.groups + group) * X::kUnits;
  const bool computes = first_unit < hidden;  // whether this warp has units
  typename X::Product product;
  if (computes) {
    const Stored* w_hh = static_cast<const Stored*>(sweep.w_hh) + at.weights(G, 0);
    product.load(layout, shared, warp, slice, [&](int row, int w) {
      const int n = first_unit + row, k = w * 4 / X::kSize;
      const int g = k / padded, from = k % padded;
      if (n >= hidden || g >= G) return 0u;
      const Stored* weights = w_hh + int64_t{g} * hidden * hidden + n;
      return tile::column_word<Format>(weights, hidden, from, hidden);
    });
  }

  // This warp's items are slice, slice + slices, ..., counted over octets of units and, within an
  // octet, column tiles.
  const auto item = [&](int i) { return slice + i * layout.slices; };
  const auto unit = [&](int i) { return first_unit + item(i) / kColumnTiles * 8; };
  const auto column = [&](int i) { return item(i) % kColumnTiles * 8; };
  int items = 0;
  while (item(items) < X::kItems && unit(items) < hidden) ++items;
  const int pair = lane % 4 * 2;  // this thread's columns of an item: this one and the next
  const auto gradient = [&](int i, int k) -> float2& {
    return reinterpret_cast<float2*>(own)[(item(i) * S + k) * kWarp + lane];
  };
  // Calls visit(i, k, n, b) for every state k of each item i, with this thread's unit n and the
  // first, b, of its two rows of the batch.
  const auto each_state = [&](const auto& visit) {
#pragma unroll 1
    for (int i = 0; i < items; ++i) {
#pragma unroll
      for (int k = 0; k < S; ++k) visit(i, k, unit(i) + lane / 4, b0 + column(i) + pair);
    }
  };
  each_state([&](int i, int k, int n, int64_t b) {
    float2 x = make_float2(0, 0);
    if (n < hidden && b < sweep.batch) x.x = gradient_after<X>(at, k, b, n, ends);
    if (n < hidden && b + 1 < sweep.batch) x.y = gradient_after<X>(at, k, b + 1, n, ends);
    gradient(i, k) = x;
  });

  // The time of a loop step, and the tile's first row at that time with its offset in `y`.
  const auto time = [&](int step) { return at.time(high - 1 - step > 0 ? high - 1 - step : 0); };
  struct Rows {
    int64_t first, offset;
  };
  const auto rows = [&](int step) {
    const int64_t first = at.row(time(step), b0);
    return Rows{first, at.output(first)};
  };
  const int y_row = static_cast<int>(sweep.recurrences) * hidden;
  const auto fetch = [&](Values<X>& to, int i, int t, Rows now, Rows earlier) {
    const int n = unit(i) + lane / 4, c = column(i) + pair;
    const Stored* y = static_cast<const Stored*>(sweep.y);
    const Stored* tape = static_cast<const Stored*>(sweep.tape) + at.tape_origin(X::kTaped);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int stop = stops[c + e];
      to.alive[e] = t < stop && n < hidden;
      if (!to.alive[e]) continue;
      const int from = (c + e) * y_row, taped = from * X::kTaped + n;
      const Stored* here = tape + now.offset * X::kTaped;
#pragma unroll
      for (int k = 0; k < K; ++k) to.saved[e][k] = here[taped + (S - 1 + k) * hidden];
      to.after[e][0] = y[now.offset + (from + n)];
#pragma unroll
      for (int k = 1; k < S; ++k) to.after[e][k] = here[taped + (k - 1) * hidden];
      if (sweep.dy != nullptr)
        to.dy[e] = static_cast<const Stored*>(sweep.dy)[now.offset + (from + n)];
      if (at.initial(t, stop)) {
        const int64_t own = at.own_state(b0 + c + e) + n;
#pragma unroll
        for (int k = 0; k < S; ++k) {
          const auto* s0 = static_cast<const Stored*>(sweep.s0[k]);
          to.before[e][k] = s0 == nullptr ? Stored(0.0f) : s0[own];
        }
      } else {
        to.before[e][0] = y[earlier.offset + (from + n)];
        const Stored* there = tape + earlier.offset * X::kTaped;
#pragma unroll
        for (int k = 1; k < S; ++k) to.before[e][k] = there[taped + (k - 1) * hidden];
      }
      if (sweep.resets != nullptr) {
        const int edge = at.reverse ? t + 1 : t;
        const int64_t row_of_edge = at.reverse ? earlier.first : now.first;
        to.resets[e] = edge < stop ? sweep.resets[row_of_edge + c + e] : 0;
      }
    }
  };
  Rows now = rows(0), earlier = rows(1);
  Values<X> even = {}, odd = {};
  if (items > 0) fetch(even, 0, time(0), now, earlier);
  if (items > 1) fetch(odd, 1, time(0), now, earlier);
  char* staging = shared + layout.staging + warp * layout.staged;
  const int gate_stride = kResidency == kBlock ? padded : 8;  // in a row at `place`
  uint32_t passes = 0;  // a bit per number: whether the next product is added to it
  const auto add_product = [&](int i, float2 x) {
    const float2 sum = tile::sum_of<X::kItems>(layout, shared, group, item(i));
    if (passes >> 2 * i & 1) x.x += sum.x;
    if (passes >> 2 * i & 2) x.y += sum.y;
    return x;
  };
  exchange.ready();

  for (int step = 0;; ++step) {
    const char* operand = exchange.wait(step, computes);
    if (computes && step > 0) {
      typename X::Product::Sums sum;
      if (kResidency == kGrid)
        product.run_in_place(operand, sum);
      else
        product.run(exchange, operand, sum);
      tile::share_sums(layout, shared, group, slice, sum);
    }
    if (step == steps) break;
    const int t = time(step);
    const Rows earliest = rows(step + 2);
    const int64_t into = at.chunk_row(now.first) * hidden;
    // What other threads wait for.
    const auto process = [&](const Values<X>& given, int i, Results<X>& result) {
      float2 ds[S];
#pragma unroll
      for (int k = 0; k < S; ++k) ds[k] = gradient(i, k);
      if (step > 0) ds[0] = add_product(i, ds[0]);
      const auto place =
          exchange.template place<X::kPieces>(step + 1, staging, column(i), unit(i) * X::kSize);
      auto& [du, dv, h_prev, alive] = result;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        alive[e] = given.alive[e];
        const bool cut = sweep.resets != nullptr && given.resets[e] != 0;
        Quick saved[K + 1], before[S], after[S], dafter[S], dbefore[S];
#pragma unroll
        for (int k = 0; k < K; ++k) saved[k] = platform::to_float(given.saved[e][k]);
#pragma unroll
        for (int k = 0; k < S; ++k) {
          before[k] = cut ? 0 : platform::to_float(given.before[e][k]);
          after[k] = platform::to_float(given.after[e][k]);
          dafter[k] = e == 0 ? ds[k].x : ds[k].y;
        }
        dafter[0] = dafter[0] + platform::to_float(given.dy[e]);
        h_prev[e] = cut ? Stored(0.0f) : given.before[e][0];
        Cell::backward(saved, before, after, dafter, du[e], dv[e], dbefore);
        auto* to = reinterpret_cast<typename X::Operand*>(place.to + e * place.pitch);
#pragma unroll
        for (int g = 0; g < G; ++g) {
          if (!alive[e]) dv[e][g] = 0;
          Format::store(to + g * gate_stride + lane / 4, dv[e][g].x);
        }
#pragma unroll
        for (int k = 0; k < S; ++k) {
          if (alive[e]) (e == 0 ? ds[k].x : ds[k].y) = cut ? 0 : dbefore[k].x;
        }
        const uint32_t bit = 1u << (2 * i + e);
        passes = alive[e] && !cut ? passes | bit : passes & ~bit;
      }
      exchange.template send<X::kPieces>(step + 1, staging, column(i), [&](int piece) {
        const int g = piece / X::kGatePieces, part = piece % X::kGatePieces;
        return (g * padded + unit(i)) * X::kSize + part * tile::kPiece;
      });
#pragma unroll
      for (int k = 0; k < S; ++k) gradient(i, k) = ds[k];
    };
    const auto finish = [&](Values<X>& given, int i, const Results<X>& result) {
      // Loads the item that is processed next from these values: of this step, or of the next.
      const bool still = i + 2 < items;
      if (still || step + 1 < steps) {
        fetch(given, still ? i + 2 : i % 2, still ? t : time(step + 1), still ? now : earlier,
              still ? earlier : earliest);
      }
      const int n = unit(i) + lane / 4, c = column(i) + pair;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!result.alive[e]) continue;
        const int from = (c + e) * hidden + n;
        (static_cast<Stored*>(sweep.h_prev) + into)[from] = result.h_prev[e];
#pragma unroll
        for (int g = 0; g < G; ++g) {
          const int gate = from + ((c + e) * (G - 1) + g) * hidden;
          platform::store(static_cast<Stored*>(sweep.dv) + into * G + gate, result.dv[e][g].x);
          if (!all_summed<Cell>())
            platform::store(static_cast<Stored*>(sweep.du) + into * G + gate, result.du[e][g].x);
        }
      }
    };
    if (items == 0) exchange.sent(step + 1);
#pragma unroll 1
    for (int i = 0; i < items; i += 2) {
      Results<X> first, second;
      const bool both = i + 1 < items;
      process(even, i, first);
      if (!X::template kPublishesFirst<kResidency>) finish(even, i, first);
      if (both) process(odd, i + 1, second);
      if (i + 2 >= items) exchange.sent(step + 1);
      if (X::template kPublishesFirst<kResidency>) finish(even, i, first);
      if (both) finish(odd, i + 1, second);
    }
    now = earlier;
    earlier = earliest;
  }
  each_state([&](int i, int k, int n, int64_t b) {
    const float2 x = k == 0 ? add_product(i, gradient(i, 0)) : gradient(i, k);
    if (n < hidden && b < sweep.batch) leave_gradient<X>(at, k, b, n, x.x);
    if (n < hidden && b + 1 < sweep.batch) leave_gradient<X>(at, k, b + 1, n, x.y);
  });
  exchange.end();
}

// ---- Launch ------------------------------------------------------------------------------------

// This struct names the kernel of this file, so each direction has one of the same shape.
struct Direction : tile::Backward {
  template <class Cell, Precision precision, int units, int kColumnTiles>
  using Traits = fastrnn::Traits<Cell, precision, units / 16, kColumnTiles>;
  template <class X, int kResidency>
  static auto kernel() {
    return persistent_backward<X, kResidency>;
  }
};

}  // namespace
}  // namespace fastrnn
