// A recurrence's weights in the layout that the forward kernels read, and how they are packed into
// it. It depends on the cell, the format and the instruction set only: one packing serves every
// plan.
#pragma once

#include <cstdint>
#include <utility>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/pack.h"
#include "cpu/projection.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// The panels of a matrix with rows for kGates gates.
template <int kGates, int kUnitVectors, int kLanes>
struct Panel {
  static constexpr int G = kGates;
  static constexpr int kVectors = G * kUnitVectors;  // vectors in a panel's row
  static constexpr int kWidth = kVectors * kLanes;   // numbers in a panel's row

  // The first of the units of vector v of a panel, and the row of a matrix [G*H, *] at which they
  // begin.
  static FASTRNN_INLINE int64_t first_unit(int64_t panel, int v) {
    return (panel * kUnitVectors + v / G) * kLanes;
  }
  static FASTRNN_INLINE int64_t first_row(int64_t hidden, int64_t panel, int v) {
    const int64_t unit = first_unit(panel, v);
    return v % G * hidden + (unit < hidden ? unit : 0);
  }
};

// Vectors of units in a panel: as many as leave a tile of sums some rows.
constexpr int unit_vectors(int input_gates, int recurrent_gates) {
  int vectors = 4;
  while (vectors > 1 && (recurrent_gates * vectors > 4 || input_gates * vectors > 6)) vectors /= 2;
  return vectors;
}

template <class Cell, class F>
struct Prepacked {
  using T = typename F::Word;
  using V = Vec<T>;
  static constexpr int N = Cell::kParams;
  static constexpr int kLanes = lanes<V>();
  static constexpr int kUnitVectors = unit_vectors(kInputGates<Cell>, kRecurrentGates<Cell>);
  static constexpr int kUnits = kUnitVectors * kLanes;  // units in a panel
  static_assert(kPadding % kUnits == 0, "padded states hold whole panels");
  using Inputs = Panel<kInputGates<Cell>, kUnitVectors, kLanes>;
  using Recurrent = Panel<kRecurrentGates<Cell>, kUnitVectors, kLanes>;

  T *w_ih,
      *w_hh;  // [panel][words of I or Q][its kWidth]; absent if the kernel reads torch's layout
  T *bias_u, *bias_v;    // [panel][its kWidth]; bias_v serves gates that are not summed
  T* params;             // [N][padded H]
  Columnwise<F> ih, hh;  // as wide as bias_u and bias_v
  Projection<F> projection;

  static int64_t panels(const RecurrenceSizes& n) { return (n.hidden + kUnits - 1) / kUnits; }
  static int64_t padded(const RecurrenceSizes& n) { return panels(n) * kUnits; }

  // Takes memory by take(count), in an order that is part of the layout.
  template <class Take>
  void place(const RecurrenceSizes& n, bool matrices, const Take& take) {
    const int64_t of_u = panels(n) * Inputs::kWidth, of_v = panels(n) * Recurrent::kWidth;
    w_ih = take(matrices ? words_of<F>(n.inputs) * of_u : 0);
    w_hh = take(matrices ? words_of<F>(n.recurrent) * of_v : 0);
    bias_u = take(of_u);
    bias_v = take(of_v);
    params = take(N * padded(n));
    for (auto [to, count] : {std::pair(&ih, of_u), {&hh, of_v}}) {
      to->scale = take(F::kScaled ? count : 0);
      to->zero = reinterpret_cast<int32_t*>(take(F::kScaled ? count : 0));
    }
    // Formats whose rows are converted have no kernel for a projection in torch's layout.
    projection.place(n, matrices || F::kConverts, take);
  }

  // A view of memory, in one piece, that pack_all() wrote or will write.
  static Prepacked at(const RecurrenceSizes& n, const void* base) {
    Prepacked out;
    T* next = static_cast<T*>(const_cast<void*>(base));
    out.place(n, true, [&](int64_t count) {
      T* from = next;
      next += count;
      return from;
    });
    return out;
  }

  static int64_t bytes(const RecurrenceSizes& n) {
    Prepacked out;
    int64_t total = 0;
    out.place(n, true, [&](int64_t count) {
      total += count;
      return static_cast<T*>(nullptr);
    });
    return total * static_cast<int64_t>(sizeof(T));
  }

  static void pack_all(const RecurrenceSizes& n, const Recurrence& recurrence, void* base) {
    const Prepacked out = at(n, base);
    out.pack(n, recurrence, true, {0, panels(n)}, 0, 1);
    if constexpr (Cell::kProjectable)
      if (n.projected) out.projection.pack(n, recurrence, {0, Projection<F>::vectors(n)}, 0, 1);
  }

  // Packs every `turns`-th of these panels, beginning with number `turn`.
  void pack(const RecurrenceSizes& n, const Recurrence& recurrence, bool matrices, Range range,
            int32_t turn, int32_t turns) const {
    for (int64_t panel = range.begin + turn; panel < range.end; panel += turns) {
      if (matrices) {
        pack_matrix<Inputs>(recurrence.w_ih, recurrence.scale_ih, n.hidden, n.inputs, panel, w_ih,
                            ih);
        pack_matrix<Recurrent>(recurrence.w_hh, recurrence.scale_hh, n.hidden, n.recurrent, panel,
                               w_hh, hh);
      }
      for (int q = 0; q < kUnitVectors; ++q) {
        const int64_t unit = (panel * kUnitVectors + q) * kLanes;
        const auto bias = [&](const void* b, int g) {
          return row_of(b, g * n.hidden, unit, n.hidden);
        };
        for (int g = 0; g < Inputs::G; ++g) {
          const V b_ih = bias(recurrence.b_ih, g);
          const int v = summed_with<Cell>(g);
          store(bias_u + panel * Inputs::kWidth + (q * Inputs::G + g) * kLanes,
                v < 0 ? b_ih : b_ih + bias(recurrence.b_hh, v));
        }
        for (int g = 0; g < Recurrent::G; ++g)
          store(bias_v + panel * Recurrent::kWidth + (q * Recurrent::G + g) * kLanes,
                bias(recurrence.b_hh, g));
      }
      for (int k = 0; k < N; ++k)
        for (int64_t unit = panel * kUnits; unit < (panel + 1) * kUnits; unit += kLanes)
          store(params + k * padded(n) + unit,
                row_of(recurrence.params, k * n.hidden, unit, n.hidden));
    }
  }

  // The parameters of a vector of units.
  FASTRNN_INLINE void load_params(int64_t padded, int64_t unit, V* to) const {
    for (int k = 0; k < N; ++k) to[k] = load<V>(params + k * padded + unit);
  }

  // Packs one panel of a matrix [gates with rows * H, depth words].
  template <class Of>
  static void pack_panel(const void* weights, int64_t hidden, int64_t depth, int64_t panel,
                         T* out) {
    for (int v = 0; v < Of::kVectors; ++v)
      pack_transposed(static_cast<const T*>(weights) + Of::first_row(hidden, panel, v) * depth,
                      depth, live_units<Of>(hidden, panel, v), depth, out, Of::kVectors, v);
  }

  // The number of units in vector v of a panel.
  template <class Of>
  static int live_units(int64_t hidden, int64_t panel, int v) {
    return within<V>(Of::first_unit(panel, v), hidden);
  }

 private:
  // A vector of units of a row of numbers that begins at `first`; zeros if there are none.
  static V row_of(const void* rows, int64_t first, int64_t unit, int64_t hidden) {
    const int live = within<V>(unit, hidden);
    return rows ? load<V>(static_cast<const T*>(rows) + first + (live ? unit : 0), live)
                : splat<V>(0);
  }

  template <class Of>
  static void pack_matrix(const void* weights, const float* scale, int64_t hidden, int64_t inputs,
                          int64_t panel, T* matrix, const Columnwise<F>& columns) {
    if constexpr (Of::G == 0) return;
    const int64_t depth = words_of<F>(inputs);
    T* to = matrix + panel * depth * Of::kWidth;
    pack_panel<Of>(weights, hidden, depth, panel, to);
    if constexpr (F::kScaled)
      for (int v = 0; v < Of::kVectors; ++v)
        describe_columns<F>(
            to + v * kLanes, Of::kWidth, depth, scale + Of::first_row(hidden, panel, v),
            live_units<Of>(hidden, panel, v), columns, panel * Of::kWidth + v * kLanes);
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
