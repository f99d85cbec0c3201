// The cells, generated from fastrnn/cells. A cell is a struct with
//   kName, kGates (G), kStates (S), kSaved (K), kParams (N)
//   kSummed[G], kSharedParams, kProjectable
//   forward(u[G], v[G], s[S], next[S], saved[K])
//   backward(saved[K], s[S], next[S], dnext[S], du[G], dv[G], ds[S])
// or, with learned parameters,
//   forward(u[G], v[G], s[S], p[N], next[S], saved[K])
//   backward(saved[K], s[S], p[N], next[S], dnext[S], du[G], dv[G], ds[S], dp[N])
// on a lane type V. If some gates have no rows in w_ih or in w_hh, the cell has kInputGates,
// kRecurrentGates and kInputOf (`GateRows` below): u and du have an entry for each gate with rows
// in w_ih, v, dv and kSummed for each with rows in w_hh. A cell that draws random numbers has
// kDraws, kSequenceDraws and kScaledDraws
// (`Draws` below), and finds its numbers in p behind the parameters. For a summed gate, v[g] is the
// sum of both projections, u[g] is not read, and du[g] equals dv[g]. A projectable cell does not
// read s[0] and sets ds[0] to zero: state 0 enters through v alone. If gradients are to be clipped,
// the cell has kLimit (`clip_gradient` below); its functions do not clip.
#pragma once

#include <type_traits>

#include "cells.gen.h"
#include "core/math.h"
#include "core/stages.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// The gates that have rows in w_ih and in w_hh: all of them, unless the cell says otherwise. u has
// an entry for each of the former, v for each of the latter; input_of(g) is the place in u of the
// gate of v[g], or -1.
template <class Cell, class = void>
struct GateRows {
  static constexpr int inputs = Cell::kGates, recurrent = Cell::kGates;
  static constexpr int input_of(int g) { return g; }
};
template <class Cell>
struct GateRows<Cell, std::void_t<decltype(Cell::kInputOf)> > {
  static constexpr int inputs = Cell::kInputGates, recurrent = Cell::kRecurrentGates;
  static constexpr int input_of(int g) { return Cell::kInputOf[g]; }
};
template <class Cell>
inline constexpr int kInputGates = GateRows<Cell>::inputs;
template <class Cell>
inline constexpr int kRecurrentGates = GateRows<Cell>::recurrent;

// The place in v of the summed gate of u[g], or -1 if that gate is not summed.
template <class Cell>
constexpr int summed_with(int g) {
  for (int v = 0; v < kRecurrentGates<Cell>; ++v)
    if (Cell::kSummed[v] && GateRows<Cell>::input_of(v) == g) return v;
  return -1;
}

// One bit for each entry of v, set if its gate is summed. Device code cannot index kSummed at run
// time, but it can shift these bits.
template <class Cell>
constexpr uint64_t summed_gates() {
  static_assert(Cell::kGates <= 64, "a bit for each gate");
  uint64_t gates = 0;
  for (int g = 0; g < kRecurrentGates<Cell>; ++g) gates |= uint64_t{Cell::kSummed[g]} << g;
  return gates;
}

template <class Cell>
inline constexpr uint64_t kSummedGates = summed_gates<Cell>();

template <class Cell>
FASTRNN_HD constexpr bool is_summed(int gate) {
  return kSummedGates<Cell> >> gate & 1;
}

template <class Cell>
FASTRNN_HD constexpr bool all_summed() {
  return kSummedGates<Cell> == ~uint64_t{0} >> (64 - Cell::kGates);
}

// The first parameter with the same gradient as parameter k, which may be k itself. A sweep
// computes that one alone.
template <class Cell, class = void>
struct SameGradient {
  static constexpr int of(int k) { return k; }
};
template <class Cell>
struct SameGradient<Cell, std::void_t<decltype(Cell::kSameGradient)> > {
  static constexpr int of(int k) { return Cell::kSameGradient[k]; }
};

// What a cell draws: how many numbers for each unit and, a bit for each, which of them are drawn
// once for all steps of a sequence, and which are scaled so that their mean is 1.
template <class Cell, class = void>
struct Draws {
  static constexpr int count = 0;
  static constexpr uint32_t per_sequence = 0, scaled = 0;
};
template <class Cell>
struct Draws<Cell, std::void_t<decltype(Cell::kDraws)> > {
  static constexpr int count = Cell::kDraws;
  static constexpr uint32_t per_sequence = Cell::kSequenceDraws, scaled = Cell::kScaledDraws;
};

// Values that a cell's functions find in p: its parameters, then its draws.
template <class Cell>
inline constexpr int kGiven = Cell::kParams + Draws<Cell>::count;

template <class Cell, class = void>
struct Limit {
  static constexpr double value = 0;
};
template <class Cell>
struct Limit<Cell, std::void_t<decltype(Cell::kLimit)> > {
  static constexpr double value = Cell::kLimit;
};

// The gradient of a state after a step as the cell wants it.
template <class Cell, class V>
FASTRNN_HD FASTRNN_INLINE V clip_gradient(V gradient) {
  constexpr double limit = Limit<Cell>::value;
  if constexpr (limit > 0)
    return maximum(minimum(gradient, splat<V>(limit)), splat<V>(-limit));
  else
    return gradient;
}

// The cell's functions, with the arguments of a cell that has learned parameters.
template <class Cell, class V>
FASTRNN_HD FASTRNN_INLINE void step_forward(const V* u, const V* v, const V* s, const V* p, V* next,
                                            V* saved) {
  if constexpr (kGiven<Cell> > 0)
    Cell::forward(u, v, s, p, next, saved);
  else
    Cell::forward(u, v, s, next, saved);
}
template <class Cell, class V>
FASTRNN_HD FASTRNN_INLINE void step_backward(const V* saved, const V* s, const V* p, const V* next,
                                             const V* dnext, V* du, V* dv, V* ds, V* dp) {
  if constexpr (kGiven<Cell> > 0)
    Cell::backward(saved, s, p, next, dnext, du, dv, ds, dp);
  else
    Cell::backward(saved, s, next, dnext, du, dv, ds);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
