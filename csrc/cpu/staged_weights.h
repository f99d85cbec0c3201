// The weights of cells whose step has stages, packed for staged.h.
#pragma once

#include <cstdint>
#include <utility>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/pack.h"
#include "cpu/projection.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// The weights of a recurrence: for each gate its block of either matrix, in bands of units.
template <class Cell, class F>
struct StagedWeights {
  using T = typename F::Word;
  using V = Vec<T>;
  static constexpr int Gu = kInputGates<Cell>, Gv = kRecurrentGates<Cell>, N = Cell::kParams;
  static constexpr int kLanes = lanes<V>();

  T *w_ih, *w_hh;        // [Gu][bands of H][words of I] and [Gv][bands of H][words of H]
  T *bias_u, *bias_v;    // [Gu or Gv][padded H]; bias_v serves gates that are not summed
  T* params;             // [N][padded H]
  Columnwise<F> ih, hh;  // as wide as bias_u and bias_v
  Projection<F> projection;

  static int64_t vectors(const RecurrenceSizes& n) { return (n.hidden + kLanes - 1) / kLanes; }
  static int64_t padded(const RecurrenceSizes& n) { return vectors(n) * kLanes; }

  // Takes memory by take(count), in an order that is part of the layout.
  template <class Take>
  void place(const RecurrenceSizes& n, const Take& take) {
    w_ih = take(Gu * padded(n) * words_of<F>(n.inputs));
    w_hh = take(Gv * padded(n) * words_of<F>(n.recurrent));
    bias_u = take(Gu * padded(n));
    bias_v = take(Gv * padded(n));
    params = take(N * padded(n));
    for (auto [to, gates] : {std::pair(&ih, Gu), {&hh, Gv}}) {
      to->scale = take(F::kScaled ? gates * padded(n) : 0);
      to->zero = reinterpret_cast<int32_t*>(take(F::kScaled ? gates * padded(n) : 0));
    }
    projection.place(n, true, take);
  }
  // A view of memory, in one piece, that pack_all() wrote or will write.
  static StagedWeights at(const RecurrenceSizes& n, const void* base) {
    StagedWeights out;
    T* next = static_cast<T*>(const_cast<void*>(base));
    out.place(n, [&](int64_t count) { return std::exchange(next, next + count); });
    return out;
  }
  static int64_t bytes(const RecurrenceSizes& n) {
    StagedWeights out;
    int64_t total = 0;
    out.place(n, [&](int64_t count) {
      total += count;
      return static_cast<T*>(nullptr);
    });
    return total * static_cast<int64_t>(sizeof(T));
  }
  static void pack_all(const RecurrenceSizes& n, const Recurrence& recurrence, void* base) {
    at(n, base).pack(n, recurrence, 0, 1);
  }

  // Packs every `turns`-th gate, and band of the projection, beginning with number `turn`.
  void pack(const RecurrenceSizes& n, const Recurrence& recurrence, int32_t turn,
            int32_t turns) const {
    for (int g = turn; g < Gu; g += turns) {
      pack_block(n, recurrence.w_ih, recurrence.scale_ih, n.inputs, g, w_ih, ih);
      const int v = summed_with<Cell>(g);
      for (int64_t unit = 0; unit < padded(n); unit += kLanes) {
        const V b_ih = numbers(recurrence.b_ih, g, n, unit);
        store(bias_u + g * padded(n) + unit,
              v < 0 ? b_ih : b_ih + numbers(recurrence.b_hh, v, n, unit));
      }
    }
    for (int g = turn; g < Gv; g += turns) {
      pack_block(n, recurrence.w_hh, recurrence.scale_hh, n.recurrent, g, w_hh, hh);
      for (int64_t unit = 0; unit < padded(n); unit += kLanes)
        store(bias_v + g * padded(n) + unit, numbers(recurrence.b_hh, g, n, unit));
    }
    for (int k = turn; k < N; k += turns)
      for (int64_t unit = 0; unit < padded(n); unit += kLanes)
        store(params + k * padded(n) + unit, numbers(recurrence.params, k, n, unit));
    if constexpr (Cell::kProjectable)
      if (n.projected) projection.pack(n, recurrence, {0, projection.vectors(n)}, turn, turns);
  }

  // The block of gate g of a packed matrix with rows of `inputs` numbers.
  static Matrix<T> block(const RecurrenceSizes& n, const T* matrix, int64_t inputs, int g) {
    const int64_t depth = words_of<F>(inputs);
    return {matrix + g * padded(n) * depth, depth, n.hidden, true};
  }

 private:
  static V numbers(const void* from, int row, const RecurrenceSizes& n, int64_t unit) {
    return from ? load<V>(static_cast<const T*>(from) + row * n.hidden + unit,
                          within<V>(unit, n.hidden))
                : splat<V>(0);
  }
  static void pack_block(const RecurrenceSizes& n, const void* weights, const float* scale,
                         int64_t inputs, int g, T* matrix, const Columnwise<F>& columns) {
    const int64_t depth = words_of<F>(inputs);
    const T* from = static_cast<const T*>(weights) + g * n.hidden * depth;
    T* to = matrix + g * padded(n) * depth;
    for_each_band(0, vectors(n), [&](int64_t vector, auto count) {
      constexpr int kWide = decltype(count)::value;
      for (int v = 0; v < kWide; ++v) {
        const int64_t unit = (vector + v) * kLanes;
        const int live = within<V>(unit, n.hidden);
        T* const band = to + vector * kLanes * depth;
        pack_transposed(from + unit * depth, depth, live, depth, band, kWide, v);
        if constexpr (F::kScaled)
          describe_columns<F>(band + v * kLanes, kWide * kLanes, depth, scale + g * n.hidden + unit,
                              live, columns, g * padded(n) + unit);
      }
    });
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
