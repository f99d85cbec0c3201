// The product in which a step ends if state 0 is projected: h = m * w_hr^T, where the cell gives m.
// Every sweep, and both steppers, end their steps with it; threads that share units own a range of
// the columns of h each.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/chunk.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/matrices.h"
#include "cpu/pack.h"
#include "cpu/product.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// Part `index` of `parts` of so many vectors of columns. With `whole_bands`, for weights that were
// packed for any number of threads, no part begins within a band.
FASTRNN_INLINE Range columns_of(int64_t vectors, bool whole_bands, int64_t parts, int64_t index) {
  if (!whole_bands) return part_of(vectors, parts, index);
  const Range bands = part_of((vectors + kBandVectors - 1) / kBandVectors, parts, index);
  const auto limit = [&](int64_t band) {
    return band * kBandVectors < vectors ? band * kBandVectors : vectors;
  };
  return {limit(bands.begin), limit(bands.end)};
}

// The packed weights.
template <class F>
struct Projection {
  using Word = typename F::Word;
  static constexpr int kLanes = lanes<Vec<Word>>();

  Word* w_hr;             // bands of w_hr^T, [padded Q][words of H]
  Columnwise<F> columns;  // [padded Q]

  static int64_t vectors(const RecurrenceSizes& n) { return (n.recurrent + kLanes - 1) / kLanes; }

  // Takes memory by take(count), for the matrix only if it is `packed`.
  template <class Take>
  void place(const RecurrenceSizes& n, bool packed, const Take& take) {
    const int64_t width = n.projected ? vectors(n) * kLanes : 0;
    w_hr = take(packed ? width * words_of<F>(n.hidden) : 0);
    columns.scale = take(F::kScaled ? width : 0);
    columns.zero = reinterpret_cast<int32_t*>(take(F::kScaled ? width : 0));
  }

  // Packs every `turns`-th band of these vectors, beginning with number `turn`.
  void pack(const RecurrenceSizes& n, const Recurrence& recurrence, Range range, int32_t turn,
            int32_t turns) const {
    const int64_t depth = words_of<F>(n.hidden);
    int64_t band = 0;
    for_each_band(range.begin, range.end, [&](int64_t vector, auto count) {
      constexpr int kWide = decltype(count)::value;
      if (band++ % turns != turn) return;
      for (int v = 0; v < kWide; ++v) {
        const int64_t column = (vector + v) * kLanes;
        const int live = within<Vec<Word>>(column, n.recurrent);
        Word* to = w_hr + vector * kLanes * depth;
        pack_transposed(static_cast<const Word*>(recurrence.w_hr) + column * depth, depth, live,
                        depth, to, kWide, v);
        if constexpr (F::kScaled)
          describe_columns<F>(to + v * kLanes, kWide * kLanes, depth, recurrence.scale_hr + column,
                              live, columns, column);
      }
    });
  }

  // Writes the vectors `range` of columns of `count` rows m to rows that are `stride` apart. The
  // weights are those that were packed, or lie in torch's layout, if these are given.
  void multiply(const RecurrenceSizes& n, const WordRows<F>& m, int64_t count, Range range,
                typename F::Number* to, int64_t stride, const void* unpacked = nullptr) const {
    if constexpr (!F::kConverts)
      if (unpacked)
        return multiply_rows_into<Word>(
            {to, stride}, m.first, m.stride, count,
            {static_cast<const Word*>(unpacked), n.hidden, n.recurrent, false}, range.begin,
            range.end);
    multiply_into<F>({to, stride}, m, count, {w_hr, words_of<F>(n.hidden), n.recurrent, true},
                     columns, range.begin, range.end);
  }
};

// Its gradients, in the backward sweeps.
template <class Cell, class F>
class ProjectionGradient {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;
  static constexpr int kLanes = lanes<V>();

 public:
  ProjectionGradient(const BackwardArgs& args, const Chunk& chunk)
      : args_(args), chunk_(chunk), row_(gradient_row(F::kFormat, args.recurrent)) {}

  // Writes the gradient of h of a row, all of which goes on to m, and h before the step, for the
  // vectors `columns` of them.
  void gather(int64_t p, const Place& at, Range columns) const {
    const int64_t Q = args_.recurrent;
    Word* dh = static_cast<Word*>(args_.dh[p]) + at.out * row_;
    T* h_prev = static_cast<T*>(args_.h_prev[p]) + at.out * Q;
    T* ds = static_cast<T*>(args_.ds[p * Cell::kStates]) + at.b * Q;
    for (int64_t column = columns.begin * kLanes; column < columns.end * kLanes; column += kLanes) {
      const int n = within<V>(column, Q);
      V gradient = load<V>(ds + column, n);
      if (args_.dy)
        gradient = gradient + load_as<V>(args_.dy, at.row * Q + column, n, args_.storage);
      gradient = clip_gradient<Cell>(gradient);
      F::put(dh, column, gradient, n);
      store(ds + column, splat<V>(0), n);
      store(h_prev + column,
            chunk_.state_before<V>(args_.recurrence[p], 0, at, column, n, args_.storage), n);
    }
    if (columns.end * kLanes >= Q) F::end_row(dh, Q);
  }

  // Writes dm = dh * w_hr, for the vectors `units` of `count` rows of dh from `first` on, to rows
  // that are `stride` apart.
  void multiply(int64_t p, int64_t first, int64_t count, const Matrix<Word>& w_hr, Range units,
                T* to, int64_t stride) const {
    const Word* dh = static_cast<const Word*>(args_.dh[p]) + first * row_;
    multiply_into<F>({to, stride}, {dh, row_, nullptr}, count, w_hr, {}, units.begin, units.end);
  }

 private:
  const BackwardArgs& args_;
  const Chunk& chunk_;
  const int64_t row_;  // words of a row of dh
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
