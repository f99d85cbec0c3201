// The forward sweep on a CPU.
//
// Every thread owns a lane, a range of slots and a range of panels of units. Per chunk of steps it
// projects its rows onto its panels (u stays in cache and never exists whole), then walks the
// steps. Threads that share slots exchange h once per step: two buffers of h, one counter each.
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
class Forward {
  using V = Vec<T>;
  static constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kKept;
  static constexpr int kLanes = lanes<V>();
  static constexpr int kUnitVectors = G >= 4 ? 1 : 4 / G;  // unit vectors in a panel
  static constexpr int kVectors = G * kUnitVectors;        // vectors in a panel's row
  static constexpr int kUnits = kUnitVectors * kLanes;     // units in a panel
  static constexpr int kWidth = kVectors * kLanes;         // numbers in a panel's row
  static constexpr int kRows = tile_rows(kVectors);
  static constexpr int kTape = S - 1 + K;

  // What the threads of one lane share.
  struct Shared {
    T *w_ih, *w_hh;      // packed [panel][I or H][kWidth]
    T *bias_u, *bias_v;  // packed [panel][kWidth]; v's for gates that are not tied
    T* h[2];             // [B][padded H], read at even and odd steps
    T* s[S];             // states past the first, [B][padded H]
  };
  // What a thread has for itself, for one chunk.
  struct Scratch {
    T* u;          // [rows][own panels][kWidth]
    const T** x;   // [rows]
    T* converted;  // [rows][I], where x is stored in 16 bits
  };

 public:
  static bool run(const ForwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden == 0) return true;
    Forward sweep(args, plan);
    if (!sweep.allocate()) return false;
    if (run_team(plan.threads(), [&](int32_t index) { sweep.thread(index); })) return true;
    CpuPlan serial = plan;
    serial.split_lanes = serial.split_slots = serial.split_units = 1;
    return run(args, serial);
  }

 private:
  Forward(const ForwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        panels_((args.hidden + kUnits - 1) / kUnits),
        padded_(panels_ * kUnits) {}

  bool allocate() {
    place();
    if (!arena_.allocate()) return false;
    place();
    for (int32_t i = 0; i < plan_.threads(); ++i) progress_[i].value = 0;
    return true;
  }

  void place() {
    const int64_t B = args_.rows.batch, I = args_.inputs, H = args_.hidden;
    const int64_t own_panels = (panels_ + plan_.split_units - 1) / plan_.split_units;
    progress_ = arena_.take<Progress>(plan_.threads());
    shared_ = arena_.take<Shared>(args_.lanes);
    scratch_ = arena_.take<Scratch>(plan_.threads());
    for (int32_t p = 0; p < args_.lanes; ++p) {
      Shared lane;
      lane.w_ih = arena_.take<T>(plan_.packed_weights ? panels_ * I * kWidth : 0);
      lane.w_hh = arena_.take<T>(plan_.packed_weights ? panels_ * H * kWidth : 0);
      lane.bias_u = arena_.take<T>(panels_ * kWidth);
      lane.bias_v = arena_.take<T>(panels_ * kWidth);
      for (T*& h : lane.h) h = arena_.take<T>(B * padded_);
      for (int s = 1; s < S; ++s) lane.s[s] = arena_.take<T>(B * padded_);
      if (arena_.ready()) shared_[p] = lane;
    }
    for (int32_t i = 0; i < plan_.threads(); ++i) {
      Scratch own;
      own.u = arena_.take<T>(chunk_rows() * own_panels * kWidth);
      own.x = arena_.take<const T*>(chunk_rows());
      own.converted = arena_.take<T>(args_.storage == Storage::kSame ? 0 : chunk_rows() * I);
      if (arena_.ready()) scratch_[i] = own;
    }
  }

  // At least one step of all slots; never more than there is.
  int64_t chunk_rows() const {
    const int64_t B = args_.rows.batch, all = B * args_.rows.steps;
    const int64_t rows = plan_.chunk_rows > B ? plan_.chunk_rows : B;
    return rows < all ? rows : all;
  }

  void thread(int32_t index) const {
    Member me(progress_, plan_, index);
    const Range own = part_of(args_.lanes, plan_.split_lanes, me.lane);
    const Range panels = part_of(panels_, plan_.split_units, me.unit);
    const Range slots = slots_of(args_.rows, 0, args_.rows.steps, plan_.split_slots, me.slot);
    for (int64_t p = own.begin; p < own.end; ++p)
      pack(args_.lane[p], shared_[p], panels, slots, me.slot);
    me.publish(1);
    me.wait_for_all(1);
    int64_t done = 1;
    for (int64_t p = own.begin; p < own.end; ++p) {
      sweep(me, p, panels, slots, scratch_[index], done);
      finish(p, panels, slots);
    }
  }

  // Threads of a lane that own the same panels pack every other one of them each.
  void pack(const Lane& lane, const Shared& out, Range panels, Range slots, int32_t turn) const {
    const int64_t H = args_.hidden, I = args_.inputs;
    for (int64_t panel = panels.begin + turn; panel < panels.end; panel += plan_.split_slots) {
      for (int u = 0; u < kUnitVectors; ++u) {
        const int64_t unit = panel * kUnits + u * kLanes;
        const int live = valid(unit);
        for (int g = 0; g < G; ++g) {
          const int64_t row = g * H + (live ? unit : 0);
          const int at = u * G + g;
          if (plan_.packed_weights) {
            pack_transposed(static_cast<const T*>(lane.w_ih) + row * I, I, live, I,
                            out.w_ih + panel * I * kWidth, kVectors, at);
            pack_transposed(static_cast<const T*>(lane.w_hh) + row * H, H, live, H,
                            out.w_hh + panel * H * kWidth, kVectors, at);
          }
          const V b_ih = bias(lane.b_ih, row, live), b_hh = bias(lane.b_hh, row, live);
          const int64_t to = panel * kWidth + at * kLanes;
          store(out.bias_u + to, Cell::kTied[g] ? b_ih + b_hh : b_ih);
          store(out.bias_v + to, b_hh);
        }
      }
    }
    for (int64_t i = slots.begin; i < slots.end; ++i) {
      const bool cut = args_.rows.steps > 0 && args_.rows.live(0) > i &&
                       args_.rows.cut_before(0, i, lane.reverse);
      const int64_t from = args_.rows.slot(i) * H;
      for (int64_t unit = panels.begin * kUnits; unit < panels.end * kUnits; unit += kLanes)
        for (int s = 0; s < S; ++s) {
          const V value = lane.s0[s] && !cut
                              ? load_as<V>(lane.s0[s], from + unit, valid(unit), args_.storage)
                              : splat<V>(0);
          if (s == 0) {
            store(out.h[0] + i * padded_ + unit, value);
            store(out.h[1] + i * padded_ + unit, value);
          } else {
            store(out.s[s] + i * padded_ + unit, value);
          }
        }
    }
  }

  void sweep(Member& me, int64_t p, Range panels, Range slots, const Scratch& own,
             int64_t& done) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.lane[p].reverse;
    const int64_t own_panels = panels.size();
    for (int64_t begin = 0, end = 0; begin < rows.steps; begin = end) {
      int64_t count = 0;
      for (; end < rows.steps; ++end) {
        const int64_t t = rows.time(end, reverse);
        const int64_t last = slots.end < rows.live(t) ? slots.end : rows.live(t);
        if (count > 0 && count + last - slots.begin > chunk_rows()) break;
        for (int64_t i = slots.begin; i < last; ++i, ++count)
          own.x[count] = input(own, count, t, i);
      }
      project(p, panels, own, count);
      const T* u = own.u;
      for (int64_t step = begin; step < end; ++step, ++done) {
        const int64_t t = rows.time(step, reverse);
        const int64_t last = slots.end < rows.live(t) ? slots.end : rows.live(t);
        if (last > slots.begin) one_step(me, p, step, panels, {slots.begin, last}, u, done);
        if (!me.alone()) me.publish(done + 1);
        u += (last > slots.begin ? last - slots.begin : 0) * own_panels * kWidth;
      }
    }
  }

  const T* input(const Scratch& own, int64_t count, int64_t t, int64_t i) const {
    const Rows& rows = args_.rows;
    const int64_t at = rows.packed() ? (rows.compact[t] + i) * args_.x_row
                                     : t * args_.x_step + rows.slot(i) * args_.x_row;
    if (args_.storage == Storage::kSame) return static_cast<const T*>(args_.x) + at;
    T* to = own.converted + count * args_.inputs;
    for (int64_t k = 0; k < args_.inputs; k += kLanes) {
      const int64_t left = args_.inputs - k;
      const int n = static_cast<int>(left < kLanes ? left : kLanes);
      store(to + k, load_as<V>(args_.x, at + k, n, args_.storage), n);
    }
    return to;
  }

  void project(int64_t p, Range panels, const Scratch& own, int64_t count) const {
    const Shared& lane = shared_[p];
    const int64_t stride = panels.size() * kWidth;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const T* bias = lane.bias_u + panel * kWidth;
      T* u = own.u + (panel - panels.begin) * kWidth;
      for_each_tile<kRows>(count, [&](int64_t first, auto n) {
        constexpr int kTile = decltype(n)::value;
        V acc[kTile][kVectors];
        for (int r = 0; r < kTile; ++r)
          for (int v = 0; v < kVectors; ++v) acc[r][v] = load<V>(bias + v * kLanes);
        product<kTile>(acc, lane.w_ih, args_.lane[p].w_ih, panel, own.x + first, 0, args_.inputs,
                       args_.inputs);
        for (int r = 0; r < kTile; ++r)
          for (int v = 0; v < kVectors; ++v)
            store(u + (first + r) * stride + v * kLanes, acc[r][v]);
      });
    }
  }

  void one_step(const Member& me, int64_t p, int64_t step, Range panels, Range slots, const T* u,
                int64_t done) const {
    const Shared& lane = shared_[p];
    const T* h = lane.h[step & 1];
    const int64_t stride = panels.size() * kWidth;
    bool fresh = !me.alone() && step > 0;  // peers may still be writing their part of h
    // Every other step goes backward over the panels, whose tail is still in the cache.
    for (int64_t q = 0; q < panels.size(); ++q) {
      const int64_t at = step & 1 ? panels.size() - 1 - q : q;
      for_each_tile<kRows>(slots.size(), [&](int64_t first, auto n) {
        tile<decltype(n)::value>(me, p, step, panels.begin + at, slots.begin + first, h,
                                 u + first * stride + at * kWidth, stride, panels, done, fresh);
        fresh = false;
      });
    }
  }

  template <int kTile>
  void tile(const Member& me, int64_t p, int64_t step, int64_t panel, int64_t first, const T* h,
            const T* u, int64_t stride, Range panels, int64_t done, bool fresh) const {
    const Shared& lane = shared_[p];
    V acc[kTile][kVectors];
    const T* rows[kTile];
    for (int r = 0; r < kTile; ++r) {
      rows[r] = h + (first + r) * padded_;
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = Cell::kTied[v % G] ? load<V>(u + r * stride + v * kLanes)
                                       : load<V>(lane.bias_v + panel * kWidth + v * kLanes);
    }
    const int64_t H = args_.hidden;
    const void* whole = args_.lane[p].w_hh;
    if (fresh) {
      // Own part of h first, while the other parts arrive.
      const int64_t mine = panels.begin * kUnits;
      const int64_t limit = panels.end * kUnits;
      const int64_t theirs = limit < H ? limit : H;
      product<kTile>(acc, lane.w_hh, whole, panel, rows, mine, theirs, H);
      me.wait_for_peers(done);
      product<kTile>(acc, lane.w_hh, whole, panel, rows, 0, mine, H);
      product<kTile>(acc, lane.w_hh, whole, panel, rows, theirs, H, H);
    } else {
      product<kTile>(acc, lane.w_hh, whole, panel, rows, 0, H, H);
    }
    const bool reverse = args_.lane[p].reverse;
    const int64_t t = args_.rows.time(step, reverse);
    for (int r = 0; r < kTile; ++r)
      for (int q = 0; q < kUnitVectors; ++q)
        units(lane, p, step, t, reverse, first + r, panel * kUnits + q * kLanes, h,
              u + r * stride + q * G * kLanes, &acc[r][q * G]);
  }

  // acc += rows[:, k0:k1] * weights of one panel, from the packed or from the whole matrix.
  template <int kTile>
  FASTRNN_INLINE void product(V (&acc)[kTile][kVectors], const T* packed, const void* whole,
                              int64_t panel, const T* const* rows, int64_t k0, int64_t k1,
                              int64_t depth) const {
    if (plan_.packed_weights) {
      multiply<kTile, kVectors, T>(acc, packed + panel * depth * kWidth, rows, k0, k1);
      return;
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t unit = panel * kUnits + v / G * kLanes;
      const T* w = static_cast<const T*>(whole) + ((v % G) * args_.hidden + unit) * depth;
      for (int r = 0; r < kTile; ++r)
        acc[r][v] = acc[r][v] + dot_products<T>(w, depth, valid(unit), rows[r], k0, k1);
    }
  }

  // The cell on one vector of units of one row.
  FASTRNN_INLINE void units(const Shared& lane, int64_t p, int64_t step, int64_t t, bool reverse,
                            int64_t i, int64_t unit, const T* h, const T* u, const V* v) const {
    const int live = valid(unit);
    if (live == 0) return;
    const int64_t at = i * padded_ + unit;
    V gates[G], before[S], next[S], kept[K + 1];
    for (int g = 0; g < G; ++g) gates[g] = Cell::kTied[g] ? v[g] : load<V>(u + g * kLanes);
    before[0] = load<V>(h + at);
    for (int s = 1; s < S; ++s) before[s] = load<V>(lane.s[s] + at);
    Cell::forward(gates, v, before, next, kept);

    const int64_t row = args_.rows.row(t, i) * args_.lanes + p;
    store_as(args_.y, row * args_.hidden + unit, next[0], live, args_.storage);
    if (args_.tape) {
      const int64_t slot = row * kTape * args_.hidden + unit;
      for (int s = 1; s < S; ++s)
        store_as(args_.tape, slot + (s - 1) * args_.hidden, next[s], live, args_.storage);
      for (int k = 0; k < K; ++k)
        store_as(args_.tape, slot + (S - 1 + k) * args_.hidden, kept[k], live, args_.storage);
    }
    // No state crosses into a new episode: the next step finds zeros.
    if (args_.rows.resets && step + 1 < args_.rows.steps &&
        i < args_.rows.live(args_.rows.time(step + 1, reverse)) &&
        args_.rows.cut_before(step + 1, i, reverse))
      for (int s = 0; s < S; ++s) next[s] = splat<V>(0);
    store(lane.h[(step + 1) & 1] + at, next[0]);
    for (int s = 1; s < S; ++s) store(lane.s[s] + at, next[s]);
  }

  void finish(int64_t p, Range panels, Range slots) const {
    const Rows& rows = args_.rows;
    int64_t length = rows.steps;
    for (int64_t i = slots.begin; i < slots.end; ++i) {
      while (length > 0 && rows.live(length - 1) <= i) --length;
      const int64_t steps = args_.lane[p].reverse ? rows.steps : length;
      const int64_t to = rows.slot(i) * args_.hidden;
      for (int64_t unit = panels.begin * kUnits; unit < panels.end * kUnits; unit += kLanes) {
        const int live = valid(unit);
        for (int s = 0; s < S && live; ++s) {
          const T* from = s ? shared_[p].s[s] : shared_[p].h[steps & 1];
          store_as(args_.final_states[p * S + s], to + unit, load<V>(from + i * padded_ + unit),
                   live, args_.storage);
        }
      }
    }
  }

  int valid(int64_t unit) const {
    const int64_t left = args_.hidden - unit;
    return static_cast<int>(left <= 0 ? 0 : left < kLanes ? left : kLanes);
  }
  static V bias(const void* b, int64_t row, int live) {
    return b ? load<V>(static_cast<const T*>(b) + row, live) : splat<V>(0);
  }

  const ForwardArgs& args_;
  const CpuPlan& plan_;
  const int64_t panels_, padded_;
  Arena arena_;
  Progress* progress_ = nullptr;
  Shared* shared_ = nullptr;
  Scratch* scratch_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
