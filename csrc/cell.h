// The cells, generated from fastrnn/cells.py. A cell is a struct with
//   kName, kGates (G), kStates (S), kKept (K), kTied[G], kProjectable
//   forward(u[G], v[G], s[S], next[S], kept[K])
//   backward(kept[K], s[S], next[S], dnext[S], du[G], dv[G], ds[S])
// on a lane type V. For a tied gate v[g] arrives as the sum of both projections, u[g] is not read,
// and du[g] equals dv[g]. A projectable cell does not read s[0], and ds[0] is zero: state 0
// comes in through v alone.
#pragma once

#include "cells.gen.h"
#include "math.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell>
constexpr bool all_tied() {
  for (bool tied : Cell::kTied)
    if (!tied) return false;
  return true;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
