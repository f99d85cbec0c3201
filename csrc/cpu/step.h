// One layer of a stepper at one time step: no loop over time, no memory of its own, no waiting.
//
// A panel is read once: its accumulators start at the biases, add the products with x and then h,
// and end as gates.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/prepacked.h"
#include "cpu/product.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell, class T>
class Step {
  using Weights = Prepacked<Cell, T>;
  using V = Vec<T>;
  static constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  static constexpr int kLanes = Weights::kLanes, kUnits = Weights::kUnits, kWidth = Weights::kWidth;
  static constexpr int kVectors = Weights::kVectors;
  static constexpr int kRows = tile_rows(kVectors);

 public:
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
  explicit Step(const StepArgs& args) : args_(args), w_(Weights::at(args.sizes, args.prepacked)) {}

  void cells() const {
    const Range panels = part_of(Weights::panels(args_.sizes), args_.parts, args_.part);
    const T* x = static_cast<const T*>(args_.x);
    int64_t x_row = args_.x_row;
    if (args_.x_storage != Storage::kSame) {
      x = convert();
      x_row = args_.sizes.inputs;
    }
    for (int64_t q = 0; q < panels.size(); ++q) {
      const int64_t panel = args_.descending ? panels.end - 1 - q : panels.begin + q;
      for_each_tile<kRows>(args_.batch, [&](int64_t first, auto n) {
        tile<decltype(n)::value>(panel, first, x + first * x_row, x_row);
      });
    }
  }

  const T* convert() const {
    const int64_t I = args_.sizes.inputs;
    T* to = static_cast<T*>(args_.converted);
    for (int64_t i = 0; i < args_.batch; ++i)
      for (int64_t k = 0; k < I; k += kLanes) {
        const int n = within<V>(k, I);
        store(to + i * I + k, load_as<V>(args_.x, i * args_.x_row + k, n, args_.x_storage), n);
      }
    return to;
  }

  template <int kTile>
  void tile(int64_t panel, int64_t first, const T* x, int64_t x_row) const {
    const int64_t I = args_.sizes.inputs, Q = args_.sizes.recurrent;
    const T* h = static_cast<const T*>(args_.h) + first * args_.stride;
    const T *inputs[kTile], *states[kTile];
    V u[kTile][kVectors], v[kTile][kVectors];
    for (int r = 0; r < kTile; ++r) {
      inputs[r] = x + r * x_row;
      states[r] = h + r * args_.stride;
      for (int j = 0; j < kVectors; ++j) u[r][j] = load<V>(w_.bias_u + panel * kWidth + j * kLanes);
    }
    const Packed<T> w_ih{w_.w_ih + panel * I * kWidth};
    multiply<kTile, kVectors, T>(u, w_ih, inputs, 0, I, sum_block(I));
    for (int r = 0; r < kTile; ++r)
      for (int j = 0; j < kVectors; ++j)
        v[r][j] = Cell::kSummed[j % G] ? u[r][j] : load<V>(w_.bias_v + panel * kWidth + j * kLanes);
    const Packed<T> w_hh{w_.w_hh + panel * Q * kWidth};
    multiply<kTile, kVectors, T>(v, w_hh, states, 0, Q, sum_block(Q));
    for (int r = 0; r < kTile; ++r)
      for (int q = 0; q < Weights::kUnitVectors; ++q)
        units(first + r, panel * kUnits + q * kLanes, &u[r][q * G], &v[r][q * G]);
  }

  // Applies the cell to one vector of units of one row.
  FASTRNN_INLINE void units(int64_t i, int64_t unit, const V* u, const V* v) const {
    const int live = within<V>(unit, args_.sizes.hidden);
    if (live == 0) return;
    const int64_t at = i * args_.stride + unit;
    V gates[G], before[S], next[S], saved[K + 1];
    for (int g = 0; g < G; ++g) gates[g] = Cell::kSummed[g] ? v[g] : u[g];
    before[0] = Cell::kProjectable ? splat<V>(0) : load<V>(static_cast<const T*>(args_.h) + at);
    for (int s = 1; s < S; ++s) before[s] = load<V>(static_cast<const T*>(args_.s[s]) + at);
    Cell::forward(gates, v, before, next, saved);
    for (int s = 1; s < S; ++s) store(static_cast<T*>(args_.s[s]) + at, next[s]);
    if (args_.sizes.projected) {
      store(static_cast<T*>(args_.m) + at, next[0]);
      return;
    }
    emit(i, unit, next[0], live);
  }

  void project() const {
    const Range columns = columns_of(Weights::columns(args_.sizes), true, args_.parts, args_.part);
    const Matrix<T> w_hr{w_.w_hr, args_.sizes.hidden, args_.sizes.recurrent, true};
    multiply_columns(static_cast<const T*>(args_.m), args_.stride, args_.batch, w_hr, columns.begin,
                     columns.end, [&](int64_t i, int64_t vector, V sum) {
                       const int64_t column = vector * kLanes;
                       emit(i, column, sum, within<V>(column, args_.sizes.recurrent));
                     });
  }

  FASTRNN_INLINE void emit(int64_t i, int64_t at, V h, int live) const {
    store(static_cast<T*>(args_.next_h) + i * args_.stride + at, h);
    if (args_.y) store_as(args_.y, i * args_.y_row + at, h, live, args_.y_storage);
  }

  const StepArgs& args_;
  const Weights w_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
