// Cells whose step has stages, because units of a row need each other within it: at reductions over
// the units, and at products of the recurrent weights with another value than state 0. Such a
// generated struct also has
//   kGateParams, kSites (J), kSiteOf[entries of v], kOperand[J], kRows (R), kForward, kBackward
//   forward_rows(Number<k>, results, count, r)
//   forward(Number<k>, u[Gu], v[Gv], s[S], p[N], x, r, next[S], saved[K], x', part)
//   backward_rows(Number<k>, results, count, r)
//   backward(Number<k>, saved[K], s[S], p[N], next[S], dnext[S], x, back[J], r,
//            du[Gu], dv[Gv], ds[S], dp[N], operand[J], x', part)
// for every stage k; Gu and Gv count the gates with rows in w_ih and w_hh. Temporaries `x` carry
// values from one stage to later ones, and x' are those that the stage writes. Results are those of
// reductions, one number a row; the first R of a forward step are saved for the backward pass. A
// stage's row formulas make `r` of them, once a row. `part` is what a sum or a maximum reduces.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/math.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <int n>
struct Number {
  static constexpr int value = n;
};

// One stage: bits of the sites whose products, or transposed products, come before it; of the
// results that sums and maxima of its parts give; and of what it writes.
struct Stage {
  uint32_t sites = 0;
  uint64_t sums = 0, maxima = 0;
  uint64_t temporaries = 0;
  uint32_t states = 0;
  uint64_t saved = 0;  // states: next, or ds in the backward pass
  uint32_t du = 0, dv = 0, dp = 0, operands = 0;
};

// Mean, and sum of squared deviations from it, of values side by side, complete before a stage.
struct Moments {
  int stage = 0;
  int result = 0;  // of the mean; the deviation is the next
  int parts = 0;
  // Place of the first source; a source is a temporary, ~g for v[g], ~(entries of v + g) for u[g].
  int first = 0;
};

// The sizes of a program, with room for one stage and one reduction at least.
template <int kStages, int kMoments, int kSources>
struct Program {
  int temporaries = 0, results = 0, rows = 0;  // rows: most row formulas of a stage
  Stage stage[kStages] = {};
  int moments = 0;
  Moments moment[kMoments > 0 ? kMoments : 1] = {};
  int source[kSources > 0 ? kSources : 1] = {};
};

template <class Cell, class = void>
struct IsStaged : std::false_type {};
template <class Cell>
struct IsStaged<Cell, std::void_t<decltype(Cell::kForward)> > : std::true_type {};
template <class Cell>
inline constexpr bool kIsStaged = IsStaged<Cell>::value;

// Bits of the first rows of parameters that have a number for each gate.
template <class Cell, class = void>
struct GateParams {
  static constexpr uint32_t value = 0;
};
template <class Cell>
struct GateParams<Cell, std::void_t<decltype(Cell::kGateParams)> > {
  static constexpr uint32_t value = Cell::kGateParams;
};

constexpr bool has(uint64_t bits, int k) { return bits >> k & 1; }

// Whether a stage has formulas of units at all; it may be there for its products alone.
constexpr bool writes(const Stage& s) {
  return s.sums | s.maxima | s.temporaries | s.states | s.saved | s.du | s.dv | s.dp | s.operands;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
