// The backward sweep on a CPU: one stretch of steps, from its end.
//
// Per step: the cell's derivative for every unit gives du and dv, then dh = dv * w_hh. Every thread
// owns a lane, a range of slots and a range of units; threads that share slots need each other's
// dv once per step. Sums run over the gates in one order whatever the split, so the result does
// not depend on it.
#pragma once

#include <cstdint>

#include "cell.h"
#include "cpu_panel.h"
#include "cpu_team.h"
#include "math.h"
#include "scan.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell, class T>
class Backward {
  using V = Vec<T>;
  static constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kKept;
  static constexpr int kLanes = lanes<V>();
  static constexpr int kVectors = 4;  // vectors of units in a band of columns of w_hh
  static constexpr int kUnits = kVectors * kLanes;
  static constexpr int kRows = tile_rows(kVectors);
  static constexpr int kTape = S - 1 + K;

 public:
  static bool run(const BackwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden == 0) return true;
    Backward sweep(args, plan);
    if (!sweep.allocate()) return false;
    if (run_team(plan.threads(), [&](int32_t index) { sweep.thread(index); })) return true;
    CpuPlan serial = plan;
    serial.split_lanes = serial.split_slots = serial.split_units = 1;
    return run(args, serial);
  }

 private:
  Backward(const BackwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        vectors_((args.hidden + kLanes - 1) / kLanes),
        depth_(G * args.hidden) {
    const int64_t first = args.begin, last = args.end - 1;
    const Rows& rows = args.rows;
    for (int32_t p = 0; p < args.lanes; ++p) {
      const bool reverse = args.lane[p].reverse;
      const int64_t a = rows.time(first, reverse), b = rows.time(last, reverse);
      origin_[reverse] = rows.compact_row(a < b ? a : b, 0);
    }
  }

  bool allocate() {
    place();
    if (!arena_.allocate()) return false;
    place();
    for (int32_t i = 0; i < plan_.threads(); ++i) progress_[i].value = 0;
    return true;
  }

  void place() {
    progress_ = arena_.take<Progress>(plan_.threads());
    bands_ = arena_.take<T>(args_.lanes * band_offset(vectors_));
  }

  // A thread's units as whole bands, then single vectors; where vector `v`'s weights begin.
  int64_t band_offset(int64_t v) const { return v * kLanes * depth_; }

  void thread(int32_t index) const {
    Member me(progress_, plan_, index);
    const Rows& rows = args_.rows;
    const Range own = part_of(args_.lanes, plan_.split_lanes, me.lane);
    const Range units = part_of(vectors_, plan_.split_units, me.unit);
    for (int64_t p = own.begin; p < own.end; ++p) pack(p, units, me.slot);
    me.publish(1);
    me.wait_for_all(1);
    int64_t done = 1;
    for (int64_t p = own.begin; p < own.end; ++p) {
      const bool reverse = args_.lane[p].reverse;
      const int64_t a = rows.time(args_.begin, reverse), b = rows.time(args_.end - 1, reverse);
      const Range slots =
          slots_of(rows, a < b ? a : b, (a < b ? b : a) + 1, plan_.split_slots, me.slot);
      for (int64_t step = args_.end - 1; step >= args_.begin; --step) {
        const int64_t t = rows.time(step, reverse);
        const int64_t last = slots.end < rows.live(t) ? slots.end : rows.live(t);
        for (int64_t i = slots.begin; i < last; ++i) differentiate(p, step, t, i, units);
        ++done;
        if (!me.alone()) {
          me.publish(done);
          me.wait_for_peers(done);
        }
        if (last > slots.begin) propagate(p, step, t, {slots.begin, last}, units);
      }
    }
  }

  // Calls f(vector, constant number of vectors) over the bands of [units.begin, units.end).
  template <class F>
  FASTRNN_INLINE void for_each_band(Range units, const F& f) const {
    int64_t v = units.begin;
    for (; v + kVectors <= units.end; v += kVectors) f(v, Constant<kVectors>{});
    for (; v < units.end; ++v) f(v, Constant<1>{});
  }

  void pack(int64_t p, Range units, int32_t turn) const {
    const T* w = static_cast<const T*>(args_.lane[p].w_hh);
    T* out = bands_ + p * band_offset(vectors_);
    int64_t band = 0;
    for_each_band(units, [&](int64_t v, auto width) {
      if (band++ % plan_.split_slots != turn) return;
      pack_columns(w + v * kLanes, args_.hidden, args_.hidden - v * kLanes, depth_,
                   out + band_offset(v), decltype(width)::value);
    });
  }

  // du, dv and the gradients that reach the previous states without passing w_hh.
  void differentiate(int64_t p, int64_t step, int64_t t, int64_t i, Range units) const {
    const Rows& rows = args_.rows;
    const Lane& lane = args_.lane[p];
    const int64_t H = args_.hidden, P = args_.lanes, b = rows.slot(i);
    const int64_t row = rows.row(t, i) * P + p;
    const bool cut = rows.cut_before(step, i, lane.reverse);
    const bool continues = rows.continues(step, i, lane.reverse);
    const int64_t earlier = continues ? rows.row(rows.time(step - 1, lane.reverse), i) * P + p : 0;
    const int64_t out = rows.compact_row(t, i) - origin_[lane.reverse];
    T* du = static_cast<T*>(args_.du[p]) + out * depth_;
    T* dv = static_cast<T*>(args_.dv[p]) + out * depth_;
    T* previous = static_cast<T*>(args_.previous[p]) + out * H;

    for (int64_t vector = units.begin; vector < units.end; ++vector) {
      const int64_t unit = vector * kLanes;
      const int n = static_cast<int>(H - unit < kLanes ? H - unit : kLanes);
      V kept[K + 1], before[S], next[S], dnext[S], gates_u[G], gates_v[G], dbefore[S];
      const int64_t tape = row * kTape * H + unit;
      next[0] = load_as<V>(args_.y, row * H + unit, n, args_.storage);
      for (int s = 1; s < S; ++s)
        next[s] = load_as<V>(args_.tape, tape + (s - 1) * H, n, args_.storage);
      for (int k = 0; k < K; ++k)
        kept[k] = load_as<V>(args_.tape, tape + (S - 1 + k) * H, n, args_.storage);
      for (int s = 0; s < S; ++s) {
        if (cut)
          before[s] = splat<V>(0);
        else if (!continues)
          before[s] =
              lane.s0[s] ? load_as<V>(lane.s0[s], b * H + unit, n, args_.storage) : splat<V>(0);
        else if (s == 0)
          before[s] = load_as<V>(args_.y, earlier * H + unit, n, args_.storage);
        else
          before[s] =
              load_as<V>(args_.tape, (earlier * kTape + s - 1) * H + unit, n, args_.storage);
        dnext[s] = load<V>(static_cast<const T*>(args_.ds[p * S + s]) + b * H + unit, n);
      }
      if (args_.dy) dnext[0] = dnext[0] + load_as<V>(args_.dy, row * H + unit, n, args_.storage);
      Cell::backward(kept, before, next, dnext, gates_u, gates_v, dbefore);

      for (int g = 0; g < G; ++g) {
        store(dv + g * H + unit, gates_v[g], n);
        if constexpr (!all_tied<Cell>()) store(du + g * H + unit, gates_u[g], n);
      }
      store(previous + unit, before[0], n);
      for (int s = 0; s < S; ++s)
        store(static_cast<T*>(args_.ds[p * S + s]) + b * H + unit, cut ? splat<V>(0) : dbefore[s],
              n);
    }
  }

  // ds0 += dv * w_hh, but nothing into a step before a cut.
  void propagate(int64_t p, int64_t step, int64_t t, Range slots, Range units) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.lane[p].reverse;
    const int64_t H = args_.hidden;
    const T* bands = bands_ + p * band_offset(vectors_);
    const T* dv = static_cast<const T*>(args_.dv[p]) +
                  (rows.compact_row(t, slots.begin) - origin_[reverse]) * depth_;
    T* ds = static_cast<T*>(args_.ds[p * S]);
    for_each_band(units, [&](int64_t vector, auto width) {
      constexpr int kWide = decltype(width)::value;
      for_each_tile<kRows>(slots.size(), [&](int64_t first, auto count) {
        constexpr int kTile = decltype(count)::value;
        V acc[kTile][kWide];
        const T* from[kTile];
        for (int r = 0; r < kTile; ++r) {
          from[r] = dv + (first + r) * depth_;
          for (int v = 0; v < kWide; ++v) acc[r][v] = splat<V>(0);
        }
        multiply<kTile, kWide, T>(acc, bands + band_offset(vector), from, 0, depth_);
        for (int r = 0; r < kTile; ++r) {
          const int64_t i = slots.begin + first + r;
          if (rows.cut_before(step, i, reverse)) continue;
          for (int v = 0; v < kWide; ++v) {
            const int64_t unit = (vector + v) * kLanes;
            const int n = static_cast<int>(H - unit < kLanes ? H - unit : kLanes);
            T* to = ds + rows.slot(i) * H + unit;
            store(to, load<V>(to, n) + acc[r][v], n);
          }
        }
      });
    });
  }

  const BackwardArgs& args_;
  const CpuPlan& plan_;
  const int64_t vectors_, depth_;
  int64_t origin_[2] = {};  // first compact row of the stretch, forward and reverse
  Arena arena_;
  Progress* progress_ = nullptr;
  T* bands_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
