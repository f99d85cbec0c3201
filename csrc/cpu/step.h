// One layer of a stepper at one time step: no loop over time, no memory of its own, no waiting.
//
// A panel is read once: its accumulators start at the biases, add the products with x and then h,
// and end as gates.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/prepacked.h"
#include "cpu/product.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell, class F>
class Step {
  using T = typename F::Number;
  using Word = typename F::Word;
  using Weights = Prepacked<Cell, F>;
  using V = Vec<T>;
  using Inputs = typename Weights::Inputs;
  using Recurrent = typename Weights::Recurrent;
  static constexpr int S = Cell::kStates, K = Cell::kSaved, N = Cell::kParams;
  static constexpr int kLanes = Weights::kLanes, kUnits = Weights::kUnits;
  static constexpr int kVectors =
      Inputs::kVectors > Recurrent::kVectors ? Inputs::kVectors : Recurrent::kVectors;
  static constexpr int kRows = tile_rows(kVectors * F::kBlockSums);

 public:
  // Bytes of StepArgs::room.
  static int64_t room(const RecurrenceSizes& n, int64_t batch) {
    return (batch * (row_words<F>(n.inputs) + state_words(n)) + 2 * batch) * sizeof(Word);
  }
  static void run(const StepArgs& args) {
    FlushDenormals flush;
    const Step step(args);
    if (args.project) {
      if constexpr (Cell::kProjectable) step.project();
    } else {
      step.cells();
    }
  }

 private:
  explicit Step(const StepArgs& args)
      : args_(args),
        w_(Weights::at(args.sizes, args.prepacked)),
        x_words_(static_cast<Word*>(args.room)),
        state_words_(x_words_ + args.batch * row_words<F>(args.sizes.inputs)),
        x_scale_(state_words_ + args.batch * state_words(args.sizes)),
        state_scale_(x_scale_ + args.batch) {}

  // Words of a row of h or m, if it is converted.
  static int64_t state_words(const RecurrenceSizes& n) {
    return F::kConverts ? row_words<F>(n.hidden > n.recurrent ? n.hidden : n.recurrent) : 0;
  }

  void cells() const {
    const Range panels = part_of(Weights::panels(args_.sizes), args_.parts, args_.part);
    const int64_t I = args_.sizes.inputs, B = args_.batch;
    WordRows<F> x{static_cast<const Word*>(args_.x), args_.x_row, x_scale_};
    if (F::kConverts || args_.x_storage != Storage::kSame) {
      x = {x_words_, row_words<F>(I), x_scale_};
      for (int64_t i = 0; i < B; ++i)
        put_row<F>(x_words_ + i * x.stride, I, x_scale_ + i,
                   [&](int64_t k, int n) __attribute__((always_inline)) {
                     return load_as<V>(args_.x, i * args_.x_row + k, n, args_.x_storage);
                   });
    }
    WordRows<F> h{};
    if constexpr (Recurrent::G > 0) h = states(args_.h, args_.sizes.recurrent);
    for (int64_t q = 0; q < panels.size(); ++q) {
      const int64_t panel = args_.descending ? panels.end - 1 - q : panels.begin + q;
      for_each_tile<kRows>(
          B, [&](int64_t first, auto n) { tile<decltype(n)::value>(panel, first, x, h); });
    }
  }

  // The rows of h or m, in words.
  WordRows<F> states(const void* numbers, int64_t width) const {
    const T* from = static_cast<const T*>(numbers);
    if constexpr (F::kConverts) {
      const int64_t stride = state_words(args_.sizes);
      for (int64_t i = 0; i < args_.batch; ++i)
        put_row<F>(state_words_ + i * stride, width, state_scale_ + i,
                   [&](int64_t k, int n) __attribute__((always_inline)) {
                     return load<V>(from + i * args_.stride + k, n);
                   });
      return {state_words_, stride, state_scale_};
    } else {
      return {from, args_.stride, nullptr};
    }
  }

  template <int kTile>
  void tile(int64_t panel, int64_t first, const WordRows<F>& x, const WordRows<F>& h) const {
    V u[kTile][Inputs::kVectors], v[kTile][Recurrent::kVectors + 1];
    const T* const bias_u = w_.bias_u + panel * Inputs::kWidth;
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < Inputs::kVectors; ++j) u[r][j] = load<V>(bias_u + j * kLanes);
    add_product<Inputs>(u, w_.w_ih, w_.ih, panel, args_.sizes.inputs, x, first);
    if constexpr (Recurrent::G > 0) {
      constexpr int G = Recurrent::G;
      V sum[kTile][Recurrent::kVectors];
      const T* const bias_v = w_.bias_v + panel * Recurrent::kWidth;
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < Recurrent::kVectors; ++j)
          sum[r][j] = Cell::kSummed[j % G]
                          ? u[r][j / G * Inputs::G + GateRows<Cell>::input_of(j % G)]
                          : load<V>(bias_v + j * kLanes);
      add_product<Recurrent>(sum, w_.w_hh, w_.hh, panel, args_.sizes.recurrent, h, first);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < Recurrent::kVectors; ++j) v[r][j] = sum[r][j];
    }
    for (int r = 0; r < kTile; ++r)
      for (int q = 0; q < Weights::kUnitVectors; ++q)
        units(first + r, panel * kUnits + q * kLanes, &u[r][q * Inputs::G],
              &v[r][q * Recurrent::G]);
  }

  // to += rows [first, first + kTile) * a panel of weights
  template <class Of, int kTile, int kVectors>
  FASTRNN_INLINE void add_product(V (&to)[kTile][kVectors], const Word* weights,
                                  const Columnwise<F>& columns, int64_t panel, int64_t inputs,
                                  const WordRows<F>& source, int64_t first) const {
    const int64_t depth = words_of<F>(inputs), at = panel * Of::kWidth;
    const Word* rows[kTile];
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) rows[r] = source.first + (first + r) * source.stride;
    Sums<F, kTile, kVectors> sums;
    const auto each = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) f(r, at + j * kLanes, &sums[r][j * F::kSums], to[r][j]);
    };
    each([&](int, int64_t column, auto* sum, V& value) {
      begin_sum<F>(sum, columns, column, value);
    });
    multiply<kTile, kVectors, F>(sums, Packed<Word>{weights + depth * at}, rows, 0, depth,
                                 sum_block(depth));
    each([&](int r, int64_t column, auto* sum, V& value) {
      value = end_sum<F>(sum, columns, column, source.scale(first + r), value);
    });
  }

  // Applies the cell to one vector of units of one row.
  FASTRNN_INLINE void units(int64_t i, int64_t unit, const V* u, const V* v) const {
    const int live = within<V>(unit, args_.sizes.hidden);
    if (live == 0) return;
    const int64_t at = i * args_.stride + unit;
    V gates[Inputs::G], before[S], given[kGiven<Cell> + 1], next[S], saved[K + 1];
#pragma GCC unroll 64
    for (int g = 0; g < Inputs::G; ++g)
      gates[g] = summed_with<Cell>(g) < 0 ? u[g] : v[summed_with<Cell>(g)];
    before[0] = Cell::kProjectable ? splat<V>(0) : load<V>(static_cast<const T*>(args_.h) + at);
#pragma GCC unroll 64
    for (int s = 1; s < S; ++s) before[s] = load<V>(static_cast<const T*>(args_.s[s]) + at);
    w_.load_params(Weights::padded(args_.sizes), unit, given);
    step_forward<Cell>(gates, v, before, given, next, saved);
#pragma GCC unroll 64
    for (int s = 1; s < S; ++s) store(static_cast<T*>(args_.s[s]) + at, next[s]);
    if (args_.sizes.projected) {
      store(static_cast<T*>(args_.m) + at, next[0]);
      return;
    }
    emit(i, unit, next[0], live);
  }

  void project() const {
    const RecurrenceSizes& n = args_.sizes;
    const Range columns = columns_of(Projection<F>::vectors(n), true, args_.parts, args_.part);
    T* const next_h = static_cast<T*>(args_.next_h);
    w_.projection.multiply(n, states(args_.m, n.hidden), args_.batch, columns, next_h,
                           args_.stride);
    for (int64_t i = 0; i < args_.batch && args_.y; ++i)
      for (int64_t at = columns.begin * kLanes; at < columns.end * kLanes; at += kLanes)
        store_as(args_.y, i * args_.y_row + at, load<V>(next_h + i * args_.stride + at),
                 within<V>(at, n.recurrent), args_.y_storage);
  }

  FASTRNN_INLINE void emit(int64_t i, int64_t at, V h, int live) const {
    store(static_cast<T*>(args_.next_h) + i * args_.stride + at, h);
    if (args_.y) store_as(args_.y, i * args_.y_row + at, h, live, args_.y_storage);
  }

  const StepArgs& args_;
  const Weights w_;
  // In args_.room.
  Word *const x_words_, *const state_words_;
  T *const x_scale_, *const state_scale_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
