// The backward sweep on a CPU: one chunk of steps, from its end.
//
// Per step: the cell's derivative for every unit gives du and dv, then dh = dv * w_hh. Every thread
// owns a recurrence, a range of sequences, a range of units and a range of the columns of h;
// threads that share sequences need each other's dv once per step. If the output is projected, the
// product dm = dh * w_hr comes first and needs the others' dh. Sums run over the gates in the same
// order for every split, so the result does not depend on the split.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/chunk.h"
#include "cpu/contract.h"
#include "cpu/drawn.h"
#include "cpu/formats.h"
#include "cpu/gradient_row.h"
#include "cpu/matrices.h"
#include "cpu/product.h"
#include "cpu/projection.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell, class F>
class Backward {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;
  static constexpr int Gu = kInputGates<Cell>, Gv = kRecurrentGates<Cell>;
  static constexpr int S = Cell::kStates, K = Cell::kSaved, N = Cell::kParams;
  static constexpr int kLanes = lanes<V>();

 public:
  static bool run(const BackwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden + args.recurrent == 0) return true;
    return run_sweep<Backward>(args, plan);
  }

  Backward(const BackwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        vectors_((args.hidden + kLanes - 1) / kLanes),
        columns_((args.recurrent + kLanes - 1) / kLanes),
        depth_(Gv * args.hidden),
        dv_row_(gradient_row(F::kFormat, depth_)),
        chunk_(args, S - 1 + K + args.projected),
        projection_(args, chunk_) {}

  void place(Arena& arena) {
    w_hh_ = static_cast<Word*>(args_.prepacked);
    w_hr_ = w_hh_ + args_.recurrences * columns_ * kLanes * words_of<F>(depth_);
    const int64_t B = args_.rows.batch;
    dh_ = arena.take<T>(args_.recurrences * B * columns_ * kLanes);
    dm_ = arena.take<T>(projected() ? args_.recurrences * B * vectors_ * kLanes : 0);
    const int64_t own_vectors = (vectors_ + plan_.split_units - 1) / plan_.split_units;
    drawn_ = arena.take<Drawn<Cell, T>>(plan_.threads());
    for (int32_t i = 0; i < plan_.threads(); ++i) {
      Drawn<Cell, T> own;
      own.place(B, own_vectors * kLanes, [&](int64_t n) { return arena.take<T>(n); });
      if (arena.ready()) drawn_[i] = own;
    }
  }

  // Each step adds to the gradients of the states.
  static constexpr bool kRepeatable = true;
  template <class Visit>
  void each_changed(const Visit& visit) const {
    chunk_.each_changed<T>(S, N, visit);
  }

  void thread(Member& me) const {
    const Rows& rows = args_.rows;
    const Range own = part_of(args_.recurrences, plan_.split_recurrences, me.recurrence);
    const Range units = part_of(vectors_, plan_.split_units, me.unit);
    const Range columns = part_of(columns_, plan_.split_units, me.unit);
    const bool pack_now = prepacks() && *args_.prepacked_for != plan_.split_units;
    for (int64_t p = own.begin; p < own.end && pack_now; ++p) {
      pack(args_.recurrence[p].w_hh, args_.recurrent, depth_, columns, me.sequence, w_hh(p));
      if (projected())
        pack(args_.recurrence[p].w_hr, args_.hidden, args_.recurrent, units, me.sequence, w_hr(p));
    }
    int64_t done = 1;
    me.publish(done);
    me.wait_for_all(done);
    if (me.index == 0 && pack_now) *args_.prepacked_for = plan_.split_units;
    const auto meet = [&] {
      ++done;
      if (me.alone()) return;
      me.publish(done);
      me.wait_for_peers(done);
    };
    for (int64_t p = own.begin; p < own.end; ++p) {
      const bool reverse = args_.recurrence[p].reverse;
      const Range sequences = chunk_.sequences(p, plan_.split_sequences, me.sequence);
      const Drawn<Cell, T>& drawn = drawn_[me.index];
      drawn.begin(args_, p, sequences, numbers_of(units));
      for (int64_t step = args_.end - 1; step >= args_.begin; --step) {
        const int64_t t = rows.time(step, reverse);
        const int64_t last = sequences.end < rows.live(t) ? sequences.end : rows.live(t);
        if (projected()) {
          for (int64_t i = sequences.begin; i < last; ++i)
            projection_.gather(p, chunk_.locate(p, step, t, i), columns);
          meet();
          if (last > sequences.begin) unproject(p, t, {sequences.begin, last}, units);
        }
        if (last > sequences.begin)
          drawn.step(args_, p, t, {sequences.begin, last}, numbers_of(units));
        for (int64_t i = sequences.begin; i < last; ++i)
          differentiate(p, step, t, i, units, drawn, i - sequences.begin);
        if constexpr (Gv == 0) continue;  // units do not need each other
        meet();
        if (last <= sequences.begin) continue;
        Ahead ahead;
        if (looks_ahead(units))
          ahead = chunk_.before(p, step, sequences, S, stored_bytes<T>(args_.storage));
        ahead.spread(asks_of<F>(last - sequences.begin, words_of<F>(depth_), columns.size()));
        propagate(p, step, t, {sequences.begin, last}, columns, &ahead);
      }
      copy_same_gradients<Cell, T>(args_, p, sequences, numbers_of(units));
    }
  }

 private:
  bool projected() const { return Cell::kProjectable && __builtin_expect(args_.projected, false); }
  // Whether a thread reads whole values, and products have enough rows to pack weights for.
  bool looks_ahead(Range units) const { return prepacks() && units.size() == vectors_; }
  bool prepacks() const {
    return backward_layout(F::kFormat, plan_.weights) == WeightLayout::kPrepacked;
  }
  // The weights that a product reads: `packed`, if they were packed.
  Matrix<Word> matrix(const Word* packed, const void* unpacked, int64_t depth,
                      int64_t width) const {
    return {prepacks() ? packed : static_cast<const Word*>(unpacked), words_of<F>(depth), width,
            prepacks()};
  }
  Word* w_hh(int64_t p) const { return w_hh_ + p * columns_ * kLanes * words_of<F>(depth_); }
  Word* w_hr(int64_t p) const {
    return w_hr_ + p * vectors_ * kLanes * words_of<F>(args_.recurrent);
  }
  T* dh(int64_t p, int64_t i) const { return dh_ + (p * args_.rows.batch + i) * columns_ * kLanes; }
  T* dm(int64_t p, int64_t i) const { return dm_ + (p * args_.rows.batch + i) * vectors_ * kLanes; }

  // Packs the bands `own` of the columns of w [depth, width]; threads that own the same take turns.
  void pack(const void* w, int64_t width, int64_t depth, Range own, int32_t turn, Word* out) const {
    int64_t band = 0;
    for_each_band(own.begin, own.end, [&](int64_t v, auto count) {
      if (band++ % plan_.split_sequences != turn) return;
      const int64_t column = v * kLanes;
      pack_columns<F>(static_cast<const T*>(w) + column, width, width - column, depth,
                      out + column * words_of<F>(depth), decltype(count)::value);
    });
  }

  // dm = dh * w_hr
  void unproject(int64_t p, int64_t t, Range sequences, Range units) const {
    projection_.multiply(p, chunk_.out(p, t, sequences.begin), sequences.size(),
                         matrix(w_hr(p), args_.recurrence[p].w_hr, args_.recurrent, args_.hidden),
                         units, dm(p, sequences.begin), vectors_ * kLanes);
  }

  static Range numbers_of(Range vectors) { return {vectors.begin * kLanes, vectors.end * kLanes}; }

  // Writes du, dv and the gradients that reach the previous states without passing w_hh.
  void differentiate(int64_t p, int64_t step, int64_t t, int64_t i, Range units,
                     const Drawn<Cell, T>& of_thread, int64_t drawn_row) const {
    const Place place = chunk_.locate(p, step, t, i);
    const GradientRow<Cell, F> at(args_, chunk_, p, place);
    const Drawn<Cell, T> drawn = of_thread;
    const Storage storage = args_.storage;
    const Range numbers = numbers_of(units);
    const T* const params = static_cast<const T*>(args_.recurrence[p].params);
    const T* const dm = projected() ? this->dm(p, i) : nullptr;
    T* const h_prev =
        Gv > 0 && !dm ? static_cast<T*>(args_.h_prev[p]) + place.out * at.hidden : nullptr;
    for (int64_t begin = numbers.begin; begin < numbers.end; begin += kLanes) {
      const int64_t unit = opaque_index(begin), H = at.hidden;
      const int n = within<V>(unit, H);
      V saved[K + 1], before[S], next[S], dnext[S], gates_u[Gu], gates_v[Gv + 1], dbefore[S];
      V given[kGiven<Cell> + 1], dlearned[N + 1];
      at.read(unit, n, storage, saved, before, next);
      for (int s = 0; s < S; ++s)
        dnext[s] = s == 0 && dm ? load<V>(dm + unit) : at.gradient(s, unit, n, storage);
      if (h_prev) store(h_prev + unit, before[0], n);
      for (int k = 0; k < N; ++k) given[k] = load<V>(params + k * H + unit, n);
      drawn.load(drawn_row, numbers, unit, given + N);
      step_backward<Cell>(saved, before, given, next, dnext, gates_u, gates_v, dbefore, dlearned);

      // In turns: all of dv and then all of du made the sweep of a GRU 8 % slower.
      for (int g = 0; g < Gu || g < Gv; ++g) {
        if (g < Gv) F::put(at.dv, g * H + unit, gates_v[g], n);
        if (g < Gu && !all_summed<Cell>()) F::put(at.du, g * H + unit, gates_u[g], n);
      }
      at.add_params(~uint64_t{0}, dlearned, unit, n);
      for (int s = 0; s < S; ++s) at.hand_on(s, dbefore[s], unit, n);
    }
    if (units.end == vectors_) {
      if constexpr (Gv > 0) F::end_row(at.dv, depth_);
      if constexpr (!all_summed<Cell>()) F::end_row(at.du, Gu * at.hidden);
    }
  }

  // ds0 += dv * w_hh, but no gradient crosses a cut: it is that of the state given there.
  void propagate(int64_t p, int64_t step, int64_t t, Range sequences, Range columns,
                 Ahead* ahead) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.recurrence[p].reverse;
    const int64_t Q = args_.recurrent;
    const Word* dv =
        static_cast<const Word*>(args_.dv[p]) + chunk_.out(p, t, sequences.begin) * dv_row_;
    T* ds = static_cast<T*>(args_.ds[p * S]);
    T* dreset = args_.dreset ? static_cast<T*>(args_.dreset[p * S]) : nullptr;
    multiply_into<F>({dh(p, sequences.begin), columns_ * kLanes}, {dv, dv_row_, nullptr},
                     sequences.size(), matrix(w_hh(p), args_.recurrence[p].w_hh, depth_, Q), {},
                     columns.begin, columns.end, ahead);
    for (int64_t i = sequences.begin; i < sequences.end; ++i) {
      T* const all = rows.cut_before(step, i, reverse) ? dreset : ds;
      if (!all) continue;
      T* const to = all + rows.batch_index(i) * Q;
      const T* const from = dh(p, i);
      for (int64_t at = columns.begin * kLanes; at < columns.end * kLanes; at += kLanes) {
        const int n = within<V>(at, Q);
        store(to + at, load<V>(to + at, n) + load<V>(from + at), n);
      }
    }
  }

  const BackwardArgs& args_;
  const CpuPlan& plan_;
  const int64_t vectors_, columns_;  // vectors of units, and of the columns of h
  const int64_t depth_;              // rows of w_hh
  const int64_t dv_row_;             // words of a row of dv
  const Chunk chunk_;
  const ProjectionGradient<Cell, F> projection_;
  Word *w_hh_ = nullptr, *w_hr_ = nullptr;  // [P], bands of columns
  T* dh_ = nullptr;                         // [P][B][padded Q], what a step adds to dh
  T* dm_ = nullptr;                         // [P][B][padded H]
  Drawn<Cell, T>* drawn_ = nullptr;         // [threads]
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
