// The forward sweep in one launch: the recurrent weights stay on chip, the steps are a loop.
#pragma once

#include <type_traits>

#include "cuda/persistent/launch.cuh"
#include "cuda/quick_math.cuh"
#include "cuda/rows.cuh"

namespace fastrnn {
namespace {

using persistent::Launched;
using tile::kWarp;
using tile::Layout;

// ---- Traits ------------------------------------------------------------------------------------

// A row group has the rows of all gates for kOctets times 8 units, in the order octet, gate, unit:
// the units of a gate are half a tile of 16 rows. So a thread gets the sums of all gates of unit
// lane / 4 of each octet, and the cell's arithmetic needs nothing from other threads.
template <class Cell_, Precision precision_, int kOctets_, int kColumnTiles_>
struct Traits {
  using Cell = Cell_;
  static constexpr Precision precision = precision_;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  static constexpr int kOctets = kOctets_;
  static constexpr int kHalves = kGates * kOctets;
  static_assert(kHalves % 2 == 0, "whole tiles");
  static constexpr int kTiles = kHalves / 2;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kColumns = 8 * kColumnTiles;  // rows of the batch
  static constexpr int kResident =
      tile::resident_k_blocks<tile::Forward, precision, kTiles, kColumnTiles>();
  static constexpr int kSize = tile::operand_bytes(precision);
  static constexpr int kPieces = kOctets * 8 * kSize / tile::kPiece;  // of a column
  static constexpr int kTaped = kStates - 1 + kSaved;
  static constexpr bool kReadsInPlace = false;  // in a grid, the operand in global memory
  using Format = tile::Format<precision>;
  using Stored = typename Format::Stored;
  using Operand = typename Format::Operand;
  using Value = std::conditional_t<precision == Precision::kBfloat16, Rough, Quick>;
  using Product = tile::Product<precision, kTiles, kColumnTiles, kResident>;

  // In a grid a flag tells that all is visible that was stored before it. So a block raises it
  // before it stores anything else, if there are registers for the values of all columns. In a
  // cluster the order does not matter, but one kernel spills registers without it.
  template <int kResidency>
  static constexpr bool kPublishesFirst =
      kResidency == kGrid
          ? kOctets == 1 || kColumnTiles == 1 || (kColumnTiles == 2 && kSize == 2)
          : kResidency == kCluster && kOctets == 1 && kColumnTiles == 4 && kSize == 4;

  static tile::Need need(int64_t hidden) {
    const int64_t octets = (hidden + 7) / 8;
    return {(octets + kOctets - 1) / kOctets, octets * 8 * kSize, kTiles, kColumns, kResident,
            tile::staged_bytes<kPieces>()};
  }
};

// ---- States ------------------------------------------------------------------------------------

// Unit n of state k of a row of the batch before the chunk, whose first step is at time t.
template <class X>
__device__ __forceinline__ float state_before(const Recurrence& at, int k, int64_t b, int n,
                                              int t) {
  if (!at.unstarted(t, at.stop(b)))
    return static_cast<const float*>(at.sweep.carry)[at.state(k, b) + n];
  const auto* s0 = static_cast<const typename X::Stored*>(at.sweep.s0[k]);
  return s0 == nullptr ? 0.0f : platform::to_float(s0[at.own_state(b) + n]);
}

// Leaves it after the chunk, for the next one or for the caller.
template <class X>
__device__ __forceinline__ void leave_state(const Recurrence& at, int k, int64_t b, int n,
                                            float value) {
  if (at.sweep.end < at.sweep.steps)
    static_cast<float*>(at.sweep.carry)[at.state(k, b) + n] = value;
  else
    platform::store(static_cast<typename X::Stored*>(at.sweep.last[k]) + at.own_state(b) + n,
                    value);
}

// Passes the states of a tile that has no steps in the last chunk on to the caller.
template <class X>
__device__ void pass_states(const Recurrence& at, int64_t b0, int rank, int blocks, int t) {
  const int hidden = static_cast<int>(at.sweep.hidden);
  for (int c = 0; c < X::kColumns && b0 + c < at.sweep.batch; ++c) {
    for (int n = rank * blockDim.x + threadIdx.x; n < hidden; n += blocks * blockDim.x) {
#pragma unroll
      for (int k = 0; k < X::kStates; ++k)
        leave_state<X>(at, k, b0 + c, n, state_before<X>(at, k, b0 + c, n, t));
    }
  }
}

// ---- Kernel ------------------------------------------------------------------------------------

// A group of blocks takes one recurrence and one tile of kColumns rows of the batch through all
// steps. A block owns the weights of some units, in registers and then in shared memory; a warp of
// slice 0 owns their states, in float, and updates them at each step:
//   wait for h of all units -> R*h -> add up the slices -> cell -> send h -> store y and tape.
// u of the next step is loaded before the wait, so that it is there when it is needed. A block
// waits only in the exchange (see tile::Exchange), for the blocks of its group. Per step and group,
// with C = kColumns: 2*G*H*H*C FLOP; G*H*C numbers of u in, (S + K)*H*C of y and tape out.
template <class X, int kResidency>
__global__ void __launch_bounds__(tile::kThreads, 1)
    persistent_forward(const Sweep sweep, const Launched launched) {
  using Cell = typename X::Cell;
  using Format = typename X::Format;
  using Stored = typename X::Stored;
  using Value = typename X::Value;
  constexpr int G = X::kGates, S = X::kStates;
  constexpr int kOctets = X::kOctets, kColumnTiles = X::kColumnTiles;
  if constexpr (kResidency == kCluster && !platform::kClusters) return;  // never launched
  FASTRNN_SHARED(char, shared);
  const Layout& layout = launched.at;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = warp % layout.groups, slice = warp / layout.groups;
  const int rank = blockIdx.x % launched.blocks;
  const int task = launched.first + static_cast<int>(blockIdx.x) / launched.blocks;
  const Recurrence at(sweep, task / launched.tiles);
  const int64_t b0 = int64_t{task % launched.tiles} * X::kColumns;
  const int hidden = static_cast<int>(sweep.hidden);

  // The columns and the units of this thread: 8j + 2 (lane % 4) + e, and 8o + lane / 4.
  const int column = lane % 4 * 2;
  const int unit = (rank * layout.groups + group) * kOctets * 8 + lane / 4;
  const bool computes = unit - lane / 4 < hidden;  // whether this warp has units
  int stop[kColumnTiles][2];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) stop[j][e] = at.stop(b0 + 8 * j + column + e);
  }
  int longest = 0;
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) longest = stop[j][e] > longest ? stop[j][e] : longest;
  }
  longest = persistent::most_of_lanes<4>(longest);
  const int low = at.low(longest), steps = at.high(longest) - low;
  const int begins = at.time(static_cast<int>(sweep.begin));
  if (steps <= 0) {  // in the whole group
    if (sweep.end == sweep.steps) pass_states<X>(at, b0, rank, launched.blocks, begins);
    return;
  }

  const auto exchange = persistent::exchange_of<X, kResidency>(launched, task, rank, steps, shared);
  if (rank >= layout.active) {
    exchange.ready();
    exchange.end();
    return;
  }
  exchange.begin();

  // Operand 0 is state 0 of all units before the chunk; every block reads all of it.
  for (int n = warp; n < X::kColumns && b0 + n < sweep.batch; n += blockDim.x / kWarp) {
    auto* to = reinterpret_cast<typename X::Operand*>(exchange.first() + n * layout.pitch);
    for (int k = lane; k < hidden; k += kWarp)
      Format::store(to + k, state_before<X>(at, 0, b0 + n, k, begins));
  }
  typename X::Product product;
  if (computes) {
    const Stored* w_hh = static_cast<const Stored*>(sweep.w_hh) + at.weights(G, 0);
    const auto load = [&](auto aligned) {
      product.load(layout, shared, warp, slice, [&](int row, int w) {
        const int half = row / 8, g = half % G;
        const int n = unit - lane / 4 + half / G * 8 + row % 8;
        const Stored* from = w_hh + (int64_t{g} * hidden + n) * hidden;
        return n < hidden ? tile::row_word<Format, aligned.value>(from, w, hidden) : 0u;
      });
    };
    if (hidden % 2 == 0)
      load(std::true_type{});
    else
      load(std::false_type{});
  }

  const bool owns = computes && slice == 0;
  float s[S][kOctets][kColumnTiles][2] = {};
  float bias[kOctets][G] = {};
  Stored u[kOctets][G][kColumnTiles][2] = {};
  // Calls visit(k, o, j, e) for every state of this thread.
  const auto each_state = [&](const auto& visit) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int k = 0; k < S; ++k) visit(k, o, j, e);
        }
      }
    }
  };
  if (owns) {
    each_state([&](int k, int o, int j, int e) {
      const int64_t b = b0 + 8 * j + column + e;
      const int n = unit + 8 * o;
      if (b < sweep.batch && n < hidden) s[k][o][j][e] = state_before<X>(at, k, b, n, begins);
    });
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      const int n = unit + 8 * o;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (!is_summed<Cell>(g) && sweep.b_hh != nullptr && n < hidden) {
          bias[o][g] =
              platform::to_float(static_cast<const Stored*>(sweep.b_hh)[at.bias(G, g) + n]);
        }
      }
    }
  }
  // The rows of this thread's first column at a step, from its first unit on. They are carried from
  // step to step, because it takes long to compute 64-bit addresses from a time.
  int t = at.time(low);
  const int y_row = static_cast<int>(sweep.recurrences) * hidden;
  const int64_t row = at.row(t, b0) + column;
  const Stored* u_from =
      static_cast<const Stored*>(sweep.u) + at.chunk_row(row) * (G * sweep.hidden) + unit;
  Stored* y_to = static_cast<Stored*>(sweep.y) + at.output(row) + unit;
  // The forward pass has the tape of all rows: no `tape_base`.
  Stored* tape_to = static_cast<Stored*>(sweep.tape) + at.output(row) * X::kTaped + unit;
  // Loads u of eight columns at time t, to which `u_from` belongs.
  const auto fetch = [&](int t, int j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int gates = (8 * j + e) * G;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
          if (t < stop[j][e] && unit + 8 * o < hidden)
            u[o][g][j][e] = platform::moved(u_from, gates + g, hidden)[8 * o];
        }
      }
    }
  };
  if (owns) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) fetch(t, j);
  }
  char* staging = shared + layout.staging + group * layout.staged;
  const int offset = (unit - lane / 4) * X::kSize;  // of this warp's units in an operand's row
  exchange.ready();

  for (int i = 0; i < steps; ++i) {
    uint32_t cuts = 0;  // a bit for each column

    if (owns && sweep.resets != nullptr) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          cuts |= uint32_t{at.cut(t, b0 + 8 * j + column + e, stop[j][e])} << (2 * j + e);
      }
    }
    const bool sends = i + 1 < steps;
    const int later = at.reverse ? t - 1 : t + 1;
    const int ahead = sends ? at.rows_between(t, later) : 0;
    const char* operand = exchange.wait(i, computes);
    Value saved[kColumnTiles][kOctets][2][X::kSaved + 1];
    // Loads u of the next step, and stores what no other thread waits for.
    const auto finish = [&](int j) {
      if (sends) {
        if (j == 0) u_from = platform::moved(u_from, ahead, G * hidden);
        fetch(later, j);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (t >= stop[j][e]) continue;
        Stored* y = platform::moved(y_to, 8 * j + e, y_row);
        Stored* tape = platform::moved(tape_to, (8 * j + e) * X::kTaped, y_row);
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          if (unit + 8 * o >= hidden) continue;
          platform::store(y + 8 * o, s[0][o][j][e]);
          if (sweep.tape == nullptr) continue;
#pragma unroll
          for (int k = 0; k < X::kTaped; ++k) {
            const float value = k < S - 1 ? s[k + 1][o][j][e] : saved[j][o][e][k - (S - 1)].x;
            platform::store(tape + k * hidden + 8 * o, value);
          }
        }
      }
    };
    exchange.template arrive<false>();
    if (computes) {
      typename X::Product::Sums sum;
      product.run(exchange, operand, sum);
      tile::add_slices(layout, shared, group, slice, sum);
      if (owns) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const auto place = exchange.template place<X::kPieces>(i + 1, staging, 8 * j, offset);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            auto* to = reinterpret_cast<typename X::Operand*>(place.to + e * place.pitch);
#pragma unroll
            for (int o = 0; o < kOctets; ++o) {
              const bool cut = cuts >> (2 * j + e) & 1;
              Value us[G], vs[G], before[S], after[S];
#pragma unroll
              for (int g = 0; g < G; ++g) {
                const int half = o * G + g;
                const float product_of_h = sum[half / 2][j][half % 2 * 2 + e];
                const float own = platform::to_float(u[o][g][j][e]);
                us[g] = own;
                vs[g] = (cut ? 0 : product_of_h) + (is_summed<Cell>(g) ? own : bias[o][g]);
              }
#pragma unroll
              for (int k = 0; k < S; ++k) before[k] = cut ? 0 : s[k][o][j][e];
              Cell::forward(us, vs, before, after, saved[j][o][e]);
              const bool here = t < stop[j][e] && unit + 8 * o < hidden;
#pragma unroll
              for (int k = 0; k < S; ++k) s[k][o][j][e] = here ? after[k].x : s[k][o][j][e];
              if (sends && (kOctets == 1 || offset + o * 8 * X::kSize < layout.exchanged))
                Format::store(to + 8 * o + lane / 4, s[0][o][j][e]);
            }
          }
          if (sends) {
            exchange.template send<X::kPieces>(
                i + 1, staging, 8 * j, [&](int piece) { return offset + piece * tile::kPiece; });
          }
          if (!X::template kPublishesFirst<kResidency>) finish(j);
        }
      }
    } else {
      exchange.template arrive<true>();
    }
    if (sends) exchange.sent(i + 1);
    if (owns && X::template kPublishesFirst<kResidency>) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) finish(j);
    }
    t = later;
    y_to = platform::moved(y_to, ahead, y_row);
    tape_to = platform::moved(tape_to, ahead, y_row * X::kTaped);
  }

  exchange.settle();
  if (owns) {
    // Places are computed anew: those from before the loop would hold registers in it.
    const int same = platform::opaque(task), from = platform::opaque(unit);
    const Recurrence ended(sweep, same / launched.tiles);
    const int64_t first = int64_t{same % launched.tiles} * X::kColumns + column;
    each_state([&](int k, int o, int j, int e) {
      const int64_t b = first + 8 * j + e;
      const int n = from + 8 * o;
      if (b < sweep.batch && n < hidden) leave_state<X>(ended, k, b, n, s[k][o][j][e]);
    });
  }
  exchange.end();
}

// ---- Launch ------------------------------------------------------------------------------------

// This struct names the kernel of this file, so each direction has one of the same shape.
struct Direction : tile::Forward {
  template <class Cell, Precision precision, int units, int kColumnTiles>
  using Traits = fastrnn::Traits<Cell, precision, units / 8, kColumnTiles>;
  template <class X, int kResidency>
  static auto kernel() {
    return persistent_forward<X, kResidency>;
  }
};

}  // namespace
}  // namespace fastrnn
