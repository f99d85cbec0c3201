// The cells, generated from fastrnn/cells. A cell is a struct with
//   kName, kGates (G), kStates (S), kKept (K), kTied[G], kProjectable
//   forward(u[G], v[G], s[S], next[S], kept[K])
//   backward(kept[K], s[S], next[S], dnext[S], du[G], dv[G], ds[S])
// on a lane type V. For a tied gate v[g] arrives as the sum of both projections, u[g] is not read,
// and du[g] equals dv[g]. A projectable cell does not read s[0], and ds[0] is zero: state 0
// comes in through v alone.
#pragma once

#include "cells.gen.h"
#include "core/math.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// A bit for each gate that is tied. Device code cannot index kTied at run time, but it can this.
template <class Cell>
constexpr uint64_t tied_gates() {
  static_assert(Cell::kGates <= 64, "a bit for each gate");
  uint64_t gates = 0;
  for (int g = 0; g < Cell::kGates; ++g) gates |= uint64_t{Cell::kTied[g]} << g;
  return gates;
}

template <class Cell>
inline constexpr uint64_t kTiedGates = tied_gates<Cell>();

template <class Cell>
FASTRNN_HD constexpr bool is_tied(int gate) {
  return kTiedGates<Cell> >> gate & 1;
}

template <class Cell>
FASTRNN_HD constexpr bool all_tied() {
  return kTiedGates<Cell> == ~uint64_t{0} >> (64 - Cell::kGates);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
