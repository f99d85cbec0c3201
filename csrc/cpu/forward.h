// The forward sweep on a CPU.
//
// Every thread owns a recurrence, a range of sequences and a range of panels of units. For each
// chunk of steps it projects its rows onto its panels (so u stays in its cache), then walks the
// steps. Threads that share sequences exchange h once per step, by two buffers of h and a counter
// for each thread. A projected output takes two exchanges: the cell's m, then h = m * w_hr^T, of
// which a thread owns a range of columns. They exchange numbers in the compute type; a format of
// other words has each thread convert what it multiplies.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/drawn.h"
#include "cpu/exported.h"
#include "cpu/formats.h"
#include "cpu/prepacked.h"
#include "cpu/product.h"
#include "cpu/projection.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell, class F>
class Forward {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;
  static constexpr int S = Cell::kStates, K = Cell::kSaved, N = Cell::kParams;
  using Weights = Prepacked<Cell, F>;
  using Inputs = typename Weights::Inputs;
  using Recurrent = typename Weights::Recurrent;
  static constexpr int kLanes = Weights::kLanes;
  static constexpr int kUnitVectors = Weights::kUnitVectors, kUnits = Weights::kUnits;
  // Without a product of h, units need no other thread's.
  static constexpr bool kMultiplies = Recurrent::G > 0;
  static constexpr int kWidest =
      Inputs::kWidth > Recurrent::kWidth ? Inputs::kWidth : Recurrent::kWidth;
  template <class Of>
  static constexpr int kRows = tile_rows((Of::G > 0 ? Of::kVectors : kUnitVectors) * F::kBlockSums);

  // Memory that the threads of one recurrence share.
  struct Shared : Weights {
    T* h[2];  // [B][padded H], read at even and odd steps
    T* s[S];  // states past the first, [B][padded H]
    T* m;     // the input of the projection, [B][padded H]
  };
  // Memory of one thread, for one chunk.
  struct Scratch {
    T* u;             // [rows][own panels][Inputs::kWidth]
    const Word** x;   // [rows]
    Word* converted;  // [rows][row of I] if x is not stored in words
    T* x_scale;       // [rows] if the format has scales
    Word* state;      // [B][row of H or Q] if rows are converted: of h, then of m
    T* state_scale;   // [B]
    Word* panel;      // [words of I or Q][kWidest] if weights are packed panel by panel
    Drawn<Cell, T> drawn;
  };
  // A thread's part of every step. The ranges may reach past a state's width, into its padding.
  struct Share {
    Range panels, units;  // panels * kUnits
    Range columns;        // of h; equal to `units` unless it is projected
    // Blocks of the sum over h that lie within `columns`: those from the first on, or at most two.
    Range own_blocks;
    Range sequences;
  };

 public:
  static bool run(const ForwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden + args.recurrent == 0) return true;
    return run_sweep<Forward>(args, plan);
  }

  Forward(const ForwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        sizes_{args.inputs, args.hidden, args.recurrent, args.projected},
        panels_(Weights::panels(sizes_)),
        padded_(panels_ * kUnits),
        columns_(Projection<F>::vectors(sizes_)),
        padded_h_(projected() ? columns_ * kLanes : padded_),
        tape_width_(S - 1 + K + args.projected) {}

  void place(Arena& arena) {
    const int64_t B = args_.rows.batch, I = args_.inputs;
    const int64_t own_panels = (panels_ + plan_.split_units - 1) / plan_.split_units;
    shared_ = arena.take<Shared>(args_.recurrences);
    scratch_ = arena.take<Scratch>(plan_.threads());
    for (int32_t p = 0; p < args_.recurrences; ++p) {
      Shared recurrence;
      if (const void* prepacked = args_.recurrence[p].prepacked)
        static_cast<Weights&>(recurrence) = Weights::at(sizes_, prepacked);
      else
        recurrence.place(sizes_, packed(), [&](int64_t n) { return arena.take<T>(n); });
      for (T*& h : recurrence.h) h = arena.take<T>(B * padded_h_);
      for (int s = 1; s < S; ++s) recurrence.s[s] = arena.take<T>(B * padded_);
      recurrence.m = arena.take<T>(projected() ? B * padded_ : 0);
      if (arena.ready()) shared_[p] = recurrence;
    }
    for (int32_t i = 0; i < plan_.threads(); ++i) {
      Scratch own;
      own.u = arena.take<T>(chunk_rows() * own_panels * Inputs::kWidth);
      own.x = arena.take<const Word*>(chunk_rows());
      own.converted = arena.take<Word>(x_in_words() ? 0 : chunk_rows() * row_words<F>(I));
      own.x_scale = arena.take<T>(F::kScaled ? chunk_rows() : 0);
      own.state = arena.take<Word>(F::kConverts ? B * state_words() : 0);
      own.state_scale = arena.take<T>(F::kScaled ? B : 0);
      const int64_t depth = words_of<F>(I > args_.recurrent ? I : args_.recurrent);
      own.panel = arena.take<Word>(layout() == WeightLayout::kPanels ? depth * kWidest : 0);
      own.drawn.place(B, own_panels * kUnits, [&](int64_t n) { return arena.take<T>(n); });
      if (arena.ready()) scratch_[i] = own;
    }
  }

  // It reads nothing that it wrote in an earlier run.
  static constexpr bool kRepeatable = true;
  template <class Visit>
  void each_changed(const Visit&) const {}

  void thread(Member& me) const {
    const Range own = part_of(args_.recurrences, plan_.split_recurrences, me.recurrence);
    const Share share = share_of(me);
    for (int64_t p = own.begin; p < own.end; ++p) {
      if (!args_.recurrence[p].prepacked) pack(args_.recurrence[p], shared_[p], share, me.sequence);
      start(args_.recurrence[p], shared_[p], share);
    }
    me.publish(1);
    me.wait_for_all(1);
    int64_t done = 1;
    for (int64_t p = own.begin; p < own.end; ++p) {
      sweep(me, p, share, scratch_[me.index], done);
      finish(p, share);
    }
  }

 private:
  bool projected() const { return Cell::kProjectable && __builtin_expect(args_.projected, false); }
  bool exchanges() const { return kMultiplies || projected(); }
  WeightLayout layout() const { return forward_layout(F::kFormat, plan_.weights); }
  bool packed() const {
    return layout() == WeightLayout::kPrepacked || args_.recurrence[0].prepacked;
  }

  // Whether rows of x, as they lie, are rows of words.
  bool x_in_words() const {
    if constexpr (F::kFormat == Format::kBfloat16)
      return args_.storage == Storage::kBfloat16 && args_.inputs % F::kGroup == 0;
    else
      return !F::kConverts && args_.storage == Storage::kSame;
  }
  // Words of a row of h or m.
  int64_t state_words() const {
    return row_words<F>(args_.hidden > args_.recurrent ? args_.hidden : args_.recurrent);
  }

  // At least one step of all sequences, at most all rows.
  int64_t chunk_rows() const {
    const int64_t B = args_.rows.batch, all = B * args_.rows.steps;
    const int64_t rows = plan_.chunk_rows > B ? plan_.chunk_rows : B;
    return rows < all ? rows : all;
  }

  Share share_of(const Member& me) const {
    Share share;
    share.panels = part_of(panels_, plan_.split_units, me.unit);
    share.units = {share.panels.begin * kUnits, share.panels.end * kUnits};
    const bool whole_bands = args_.recurrence[0].prepacked != nullptr;
    const Range vectors = columns_of(columns_, whole_bands, plan_.split_units, me.unit);
    share.columns = projected() ? Range{vectors.begin * kLanes, vectors.end * kLanes} : share.units;
    if constexpr (!F::kConverts) share.own_blocks = blocks_within(share.columns, args_.recurrent);
    share.sequences =
        sequences_of(args_.rows, 0, args_.rows.steps, plan_.split_sequences, me.sequence);
    return share;
  }

  static Range vectors_of(Range columns) { return {columns.begin / kLanes, columns.end / kLanes}; }

  static Range blocks_within(Range columns, int64_t depth) {
    const int64_t block = sum_block(depth);
    const int64_t last = columns.end < depth ? columns.end / block * block : depth;
    int64_t begin = (columns.begin + block - 1) / block * block;
    if (begin > last) begin = last;
    return {begin, begin > 0 && last - begin > 2 * block ? begin + 2 * block : last};
  }

  // Threads that own the same panels of a recurrence take turns in packing them.
  void pack(const Recurrence& recurrence, const Weights& out, const Share& share,
            int32_t turn) const {
    out.pack(sizes_, recurrence, packed(), share.panels, turn, plan_.split_sequences);
    if (projected() && (packed() || F::kConverts))
      out.projection.pack(sizes_, recurrence, vectors_of(share.columns), turn,
                          plan_.split_sequences);
  }

  // Sets the states before the first step.
  void start(const Recurrence& recurrence, const Shared& out, const Share& share) const {
    const Rows& rows = args_.rows;
    for (int64_t i = share.sequences.begin; i < share.sequences.end; ++i) {
      const bool cut =
          rows.steps > 0 && rows.live(0) > i && rows.cut_before(0, i, recurrence.reverse);
      for (int s = 0; s < S; ++s) {
        const Range own = s ? share.units : share.columns;
        for (int64_t at = own.begin; at < own.end; at += kLanes) {
          const V value = given_state(cut ? recurrence.reset[s] : recurrence.s0[s], s, i, at);
          if (s == 0) {
            store(out.h[0] + i * padded_h_ + at, value);
            store(out.h[1] + i * padded_h_ + at, value);
          } else {
            store(out.s[s] + i * padded_ + at, value);
          }
        }
      }
    }
  }

  // A vector of a state of sequence i that the caller gave, or zeros.
  V given_state(const void* state, int s, int64_t i, int64_t at) const {
    return state ? load_as<V>(state, args_.rows.batch_index(i) * width(s) + at,
                              within<V>(at, width(s)), args_.storage)
                 : splat<V>(0);
  }

  void sweep(Member& me, int64_t p, const Share& share, const Scratch& own, int64_t& done) const {
    const Rows& rows = args_.rows;
    const Range sequences = share.sequences;
    const bool reverse = args_.recurrence[p].reverse;
    const int64_t own_panels = share.panels.size();
    own.drawn.begin(args_, p, sequences, share.units);
    for (int64_t begin = 0, end = 0; begin < rows.steps; begin = end) {
      int64_t count = 0;
      for (; end < rows.steps; ++end) {
        const int64_t t = rows.time(end, reverse);
        const int64_t last = sequences.end < rows.live(t) ? sequences.end : rows.live(t);
        if (count > 0 && count + last - sequences.begin > chunk_rows()) break;
        for (int64_t i = sequences.begin; i < last; ++i, ++count)
          own.x[count] = input(own, count, t, i);
      }
      project(p, share.panels, own, count);
      const T* u = own.u;
      for (int64_t step = begin; step < end; ++step, ++done) {
        const int64_t t = rows.time(step, reverse);
        const int64_t last = sequences.end < rows.live(t) ? sequences.end : rows.live(t);
        if (last > sequences.begin) {
          own.drawn.step(args_, p, t, {sequences.begin, last}, share.units);
          one_step(me, p, step, share, {sequences.begin, last}, u, done);
        }
        if (exchanges() && !me.alone()) me.publish(done + 1);
        u += (last > sequences.begin ? last - sequences.begin : 0) * own_panels * Inputs::kWidth;
      }
    }
  }

  const Word* input(const Scratch& own, int64_t count, int64_t t, int64_t i) const {
    const Rows& rows = args_.rows;
    const int64_t I = args_.inputs;
    const int64_t at = rows.packed() ? (rows.compact[t] + i) * args_.x_row
                                     : t * args_.x_step + rows.batch_index(i) * args_.x_row;
    if (x_in_words()) {
      const int64_t bytes = stored_bytes<T>(args_.storage);
      return reinterpret_cast<const Word*>(static_cast<const char*>(args_.x) + at * bytes);
    }
    Word* to = own.converted + count * row_words<F>(I);
    const auto numbers = [&](int64_t k, int n) __attribute__((always_inline)) {
      return load_as<V>(args_.x, at + k, n, args_.storage);
    };
    if constexpr (F::kConverts) {
      const T scale = F::convert(to, I, numbers);
      if constexpr (F::kScaled) own.x_scale[count] = scale;
    } else {
      for (int64_t k = 0; k < I; k += kLanes) store(to + k, numbers(k, within<V>(k, I)));
    }
    return to;
  }

  // Converts the rows of h or m that products are about to read; `from` is that of sequence 0.
  void convert(const Scratch& own, Range sequences, const T* from, int64_t stride,
               int64_t width) const {
    if constexpr (F::kConverts)
      for (int64_t i = sequences.begin; i < sequences.end; ++i) {
        const T* row = from + i * stride;
        const T scale = F::convert(
            own.state + i * state_words(), width,
            [&](int64_t k, int n) __attribute__((always_inline)) { return load<V>(row + k, n); });
        if constexpr (F::kScaled) own.state_scale[i] = scale;
      }
  }

  // One panel of weights [gates with rows * H, depth words], packed or, if `packed` is null, in
  // torch's layout.
  struct PanelWeights {
    const Word* packed;
    const Word* unpacked;
    int64_t panel, depth;
    Columnwise<F> columns;
    int64_t column;  // of the panel's first lane
  };
  template <class Of>
  FASTRNN_INLINE PanelWeights weights_of(int64_t panel, const Word* prepacked,
                                         const Columnwise<F>& columns, const void* weights,
                                         int64_t inputs, Word* scratch) const {
    const int64_t depth = words_of<F>(inputs);
    PanelWeights w{nullptr,           static_cast<const Word*>(weights), panel, depth, columns,
                   panel * Of::kWidth};
    if (packed()) {
      w.packed = prepacked + panel * depth * Of::kWidth;
    } else if (layout() == WeightLayout::kPanels) {
      Weights::template pack_panel<Of>(weights, args_.hidden, depth, panel, scratch);
      w.packed = scratch;
    }
    return w;
  }

  void project(int64_t p, Range panels, const Scratch& own, int64_t count) const {
    const Shared& recurrence = shared_[p];
    const int64_t stride = panels.size() * Inputs::kWidth;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const T* bias = recurrence.bias_u + panel * Inputs::kWidth;
      T* u = own.u + (panel - panels.begin) * Inputs::kWidth;
      const PanelWeights w = weights_of<Inputs>(panel, recurrence.w_ih, recurrence.ih,
                                                args_.recurrence[p].w_ih, args_.inputs, own.panel);
      for_each_tile<kRows<Inputs>>(count, [&](int64_t first, auto n) {
        constexpr int kTile = decltype(n)::value;
        const auto begin = [=](int, int v) __attribute__((always_inline)) {
          return load<V>(bias + v * kLanes);
        };
        T* const to = u + first * stride;
        const auto end = [=](int r, int v, V sum) __attribute__((always_inline)) {
          store(to + r * stride + v * kLanes, sum);
        };
        multiply_tile<Inputs, kTile>(w, own.x + first, own.x_scale + first, begin, end);
      });
    }
  }

  void one_step(Member& me, int64_t p, int64_t step, const Share& share, Range sequences,
                const T* u, int64_t& done) const {
    const Range panels = share.panels;
    const int64_t stride = panels.size() * Inputs::kWidth;
    bool fresh = !me.alone() && step > 0;  // peers may still be writing their part of h
    const Scratch& own = scratch_[me.index];
    if (F::kConverts || !kMultiplies) {
      if (fresh && exchanges()) me.wait_for_peers(done);
      fresh = false;
    }
    if constexpr (F::kConverts && kMultiplies)
      convert(own, sequences, shared_[p].h[step & 1], padded_h_, args_.recurrent);
    // Every other step walks the panels backward: their tail is still in the cache.
    for (int64_t q = 0; q < panels.size(); ++q) {
      const int64_t at = step & 1 ? panels.size() - 1 - q : q;
      PanelWeights w{};
      if constexpr (kMultiplies)
        w = weights_of<Recurrent>(panels.begin + at, shared_[p].w_hh, shared_[p].hh,
                                  args_.recurrence[p].w_hh, args_.recurrent, own.panel);
      for_each_tile<kRows<Recurrent>>(sequences.size(), [&](int64_t first, auto n) {
        tile<decltype(n)::value>(me, p, step, share, w, panels.begin + at, sequences.begin + first,
                                 u + first * stride + at * Inputs::kWidth, done, fresh);
        fresh = false;
      });
    }
    if (!projected()) return;
    ++done;
    if (!me.alone()) {
      me.publish(done);
      me.wait_for_peers(done);
    }
    convert(own, sequences, shared_[p].m, padded_, args_.hidden);
    project_output(own, p, step, sequences, share.columns);
  }

  template <int kTile>
  void tile(const Member& me, int64_t p, int64_t step, const Share& share, const PanelWeights& w,
            int64_t panel, int64_t first, const T* u, int64_t done, bool fresh) const {
    const Shared& recurrence = shared_[p];
    V acc[kTile][Recurrent::kVectors + !kMultiplies];
    // One or two rows write whole pages in order, which the processor foresees.
    if (kMultiplies && kTile > 2 && args_.tape)
      for (int r = 0; r < kTile; ++r) expect_results(p, step, first + r, panel * kUnits);
    if constexpr (kMultiplies)
      multiply_state<kTile>(acc, me, recurrence, share, w, panel, first, u, recurrence.h[step & 1],
                            done, fresh);
    apply(me, p, step, share, panel, {first, first + kTile}, u, &acc[0][0]);
  }

  // Applies the cell to a panel of units of some rows, of which `v` has a row each.
  FASTRNN_ONCE void apply(const Member& me, int64_t p, int64_t step, const Share& share,
                          int64_t panel, Range rows, const T* u, const V* v) const {
    const int64_t stride = share.panels.size() * Inputs::kWidth;
    const bool reverse = args_.recurrence[p].reverse;
    const int64_t t = args_.rows.time(step, reverse);
    const T* h = shared_[p].h[step & 1];
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int q = 0; q < kUnitVectors; ++q)
        units(shared_[p], scratch_[me.index].drawn, share, p, step, t, reverse, i,
              panel * kUnits + q * kLanes, h, u + q * Inputs::G * kLanes, v + q * Recurrent::G);
      u += stride;
      v += Recurrent::kVectors + !kMultiplies;
    }
  }

  // acc = h * a panel of w_hh: v and, of summed gates, u + v.
  template <int kTile>
  FASTRNN_INLINE void multiply_state(V (&acc)[kTile][Recurrent::kVectors], const Member& me,
                                     const Shared& recurrence, const Share& share,
                                     const PanelWeights& w, int64_t panel, int64_t first,
                                     const T* u, const T* h, int64_t done, bool fresh) const {
    constexpr int G = Recurrent::G;
    const int64_t stride = share.panels.size() * Inputs::kWidth;
    const Scratch& own = scratch_[me.index];
    const T* bias = recurrence.bias_v + panel * Recurrent::kWidth;
    const Word* rows[kTile];
    for (int r = 0; r < kTile; ++r) {
      if constexpr (F::kConverts)
        rows[r] = own.state + (first + r) * state_words();
      else
        rows[r] = h + (first + r) * padded_h_;
    }
    const auto begin = [&](int r, int v) __attribute__((always_inline)) {
      return Cell::kSummed[v % G] ? load<V>(u + r * stride + input_vector(v) * kLanes)
                                  : load<V>(bias + v * kLanes);
    };
    if constexpr (!F::kConverts) {
      if (fresh) {
        V sums[kTile][Recurrent::kVectors];
        for (int r = 0; r < kTile; ++r)
          for (int v = 0; v < Recurrent::kVectors; ++v) sums[r][v] = begin(r, v);
        add_own_blocks(sums, w, rows, me, share.own_blocks, done);
        add_product(sums, w, rows, share.own_blocks.end, w.depth);
        set_tile(acc, sums);
        return;
      }
    }
    const auto end = [&](int r, int v, V sum) __attribute__((always_inline)) {
      acc[r][v] = sum;
      // Else the sums of one part may wait in registers that the product of the next one needs.
      if constexpr (vectors_at_once<F>(kTile, Recurrent::kVectors) < Recurrent::kVectors)
        asm("" : "+m"(acc[r][v]));
    };
    multiply_tile<Recurrent, kTile>(w, rows, own.state_scale + first, begin, end);
  }
  // The vector of u of the gate that vector v of a recurrent panel has.
  static constexpr int input_vector(int v) {
    constexpr int G = Recurrent::G;
    return v / G * Inputs::G + GateRows<Cell>::input_of(v % G);
  }

  // Asks for the lines that units() will write. A panel writes one or a few in each value of a row,
  // far apart, and the product hides the time that they take to arrive.
  FASTRNN_INLINE void expect_results(int64_t p, int64_t step, int64_t i, int64_t unit) const {
    const int64_t t = args_.rows.time(step, args_.recurrence[p].reverse);
    const int64_t row = args_.rows.row(t, i) * args_.recurrences + p, H = args_.hidden;
    const int64_t bytes = stored_bytes<T>(args_.storage);
    const auto expect = [&](void* base, int64_t at) __attribute__((always_inline)) {
      for (int q = 0; q < kUnitVectors; ++q)
        __builtin_prefetch(static_cast<char*>(base) + (at + q * kLanes) * bytes, 1);
    };
    for (int value = 0; value < tape_width_; ++value)
      expect(args_.tape, (row * tape_width_ + value) * H + unit);
    if (!projected()) expect(args_.y, row * H + unit);
  }

  // Multiplies a tile of rows by a panel of weights: the sum of row r and vector v begins at
  // begin(r, v), and end(r, v, sum) takes it. `scale` has those of the rows, if the format has any.
  template <class Of, int kTile, class Begin, class End>
  FASTRNN_INLINE void multiply_tile(const PanelWeights& w, const Word* const* rows, const T* scale,
                                    const Begin& begin, const End& end) const {
    if constexpr (!F::kConverts) {
      if (!w.packed) {
        V sums[kTile][Of::kVectors];
        for (int r = 0; r < kTile; ++r)
          for (int v = 0; v < Of::kVectors; ++v) sums[r][v] = begin(r, v);
        add_unpacked<Of>(sums, w, rows, 0, w.depth);
        for (int r = 0; r < kTile; ++r)
          for (int v = 0; v < Of::kVectors; ++v) end(r, v, sums[r][v]);
        return;
      }
    }
    constexpr int kAtOnce = vectors_at_once<F>(kTile, Of::kVectors);
    for_each_part<Of::kVectors, kAtOnce>([&](auto from) __attribute__((always_inline)) {
      constexpr int kFirst = decltype(from)::value;
      Sums<F, kTile, kAtOnce> sums;
      const auto each = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
          for (int v = 0; v < kAtOnce; ++v)
            f(r, kFirst + v, &sums[r][v * F::kSums], w.column + (kFirst + v) * kLanes);
      };
      each([&](int r, int v, auto* sum, int64_t column) {
        begin_sum<F>(sum, w.columns, column, begin(r, v));
      });
      multiply_part<kFirst, kAtOnce, Of::kVectors, F>(sums, Packed<Word>{w.packed}, rows, 0,
                                                      w.depth, sum_block(w.depth));
      each([&](int r, int v, auto* sum, int64_t column) {
        end(r, v, end_sum<F>(sum, w.columns, column, F::kScaled ? scale[r] : T{1}, begin(r, v)));
      });
    });
  }

  // acc += rows[:, k0:k1] * weights, where blocks of the sum begin and end.
  template <int kTile>
  __attribute__((noinline)) void add_product(V (&acc)[kTile][Recurrent::kVectors],
                                             const PanelWeights& w, const T* const* rows,
                                             int64_t k0, int64_t k1) const {
    if (w.packed)
      multiply<kTile, Recurrent::kVectors, F>(acc, Packed<T>{w.packed}, rows, k0, k1,
                                              sum_block(w.depth));
    else
      add_unpacked<Recurrent>(acc, w, rows, k0, k1);
  }
  template <class Of, int kTile>
  __attribute__((noinline)) void add_unpacked(V (&acc)[kTile][Of::kVectors], const PanelWeights& w,
                                              const T* const* rows, int64_t k0, int64_t k1) const {
    constexpr int kVectors = Of::kVectors;
    Unpacked<T, kVectors> unpacked;
    unpacked.stride = w.depth;
    for (int v = 0; v < kVectors; ++v) {
      unpacked.first[v] = w.unpacked + Of::first_row(args_.hidden, w.panel, v) * w.depth;
      unpacked.live[v] = Weights::template live_units<Of>(args_.hidden, w.panel, v);
    }
    multiply_unpacked<kTile, kVectors, T>(acc, unpacked, rows, k0, k1, sum_block(w.depth));
  }

  // acc += rows[:, :own.end] * weights. The thread's own part of h comes first, while the other
  // parts arrive.
  template <int kTile>
  __attribute__((noinline)) void add_own_blocks(V (&acc)[kTile][Recurrent::kVectors],
                                                const PanelWeights& w, const T* const* rows,
                                                const Member& me, Range own, int64_t done) const {
    if (own.begin == 0) {
      add_product(acc, w, rows, 0, own.end);
      me.wait_for_peers(done);
      return;
    }
    constexpr int kVectors = Recurrent::kVectors;
    const int64_t block = sum_block(w.depth);
    V apart[2][kTile][kVectors];
    if (w.packed) {
      multiply_apart<kTile, kVectors, F>(apart, Packed<T>{w.packed}, rows, own.begin, own.end,
                                         block);
    } else {
      for (int64_t k = own.begin, n = 0; k < own.end; k += block, ++n) {
        for (auto& row : apart[n])
          for (V& sum : row) sum = splat<V>(-0.0);  // which adds nothing, not even a sign
        add_product(apart[n], w, rows, k, own.end - k < block ? own.end : k + block);
      }
    }
    me.wait_for_peers(done);
    add_product(acc, w, rows, 0, own.begin);
    if (own.size() > 0) add_tile(acc, apart[0]);
    if (own.size() > block) add_tile(acc, apart[1]);
  }

  // Applies the cell to one vector of units of one row.
  FASTRNN_INLINE void units(const Shared& recurrence, const Drawn<Cell, T>& drawn,
                            const Share& share, int64_t p, int64_t step, int64_t t, bool reverse,
                            int64_t i, int64_t unit, const T* h, const T* u, const V* v) const {
    const int64_t H = args_.hidden;
    const int live = within<V>(unit, H);
    if (live == 0) return;
    const int64_t at = i * padded_ + unit;
    V gates[Inputs::G], before[S], given[kGiven<Cell> + 1], next[S], saved[K + 1];
#pragma GCC unroll 64
    for (int g = 0; g < Inputs::G; ++g)
      gates[g] = summed_with<Cell>(g) < 0 ? load<V>(u + g * kLanes) : v[summed_with<Cell>(g)];
    before[0] = Cell::kProjectable ? splat<V>(0) : load<V>(h + at);  // not read if projectable
#pragma GCC unroll 64
    for (int s = 1; s < S; ++s) before[s] = load<V>(recurrence.s[s] + at);
    recurrence.load_params(padded_, unit, given);
    drawn.load(i - share.sequences.begin, share.units, unit, given + N);
    step_forward<Cell>(gates, v, before, given, next, saved);

    const int64_t row = args_.rows.row(t, i) * args_.recurrences + p;
    const auto save = [&](int value, V x) {
      store_as(args_.tape, (row * tape_width_ + value) * H + unit, x, live, args_.storage);
    };
    if (args_.tape) {
#pragma GCC unroll 64
      for (int s = 1; s < S; ++s) save(s - 1, next[s]);
#pragma GCC unroll 64
      for (int k = 0; k < K; ++k) save(S - 1 + k, saved[k]);
      if (projected()) save(S - 1 + K, next[0]);
    }
    if (projected())
      store(recurrence.m + at, next[0]);
    else
      store_as(args_.y, row * H + unit, next[0], live, args_.storage);
    // No state crosses into a new episode.
    if (args_.rows.cut_after(step, i, reverse))
#pragma GCC unroll 64
      for (int s = projected(); s < S; ++s)
        next[s] = given_state(args_.recurrence[p].reset[s], s, i, unit);
    if (!projected()) store(recurrence.h[(step + 1) & 1] + at, next[0]);
#pragma GCC unroll 64
    for (int s = 1; s < S; ++s) store(recurrence.s[s] + at, next[s]);
  }

  // Computes the thread's columns of h = m * w_hr^T.
  void project_output(const Scratch& own, int64_t p, int64_t step, Range sequences,
                      Range columns) const {
    const Shared& recurrence = shared_[p];
    const int64_t Q = args_.recurrent, first = sequences.begin;
    const bool reverse = args_.recurrence[p].reverse;
    const int64_t t = args_.rows.time(step, reverse);
    WordRows<F> m{};
    if constexpr (F::kConverts)
      m = {own.state + first * state_words(), state_words(), own.state_scale + first};
    else
      m = {recurrence.m + first * padded_, padded_, nullptr};
    T* const h = recurrence.h[(step + 1) & 1];
    recurrence.projection.multiply(sizes_, m, sequences.size(), vectors_of(columns),
                                   h + first * padded_h_, padded_h_,
                                   packed() ? nullptr : args_.recurrence[p].w_hr);
    for (int64_t i = first; i < sequences.end; ++i) {
      const int64_t row = args_.rows.row(t, i) * args_.recurrences + p;
      const bool cut = args_.rows.cut_after(step, i, reverse);
      for (int64_t column = columns.begin; column < columns.end; column += kLanes) {
        T* const at = h + i * padded_h_ + column;
        store_as(args_.y, row * Q + column, load<V>(at), within<V>(column, Q), args_.storage);
        if (cut) store(at, given_state(args_.recurrence[p].reset[0], 0, i, column));
      }
    }
  }

  void finish(int64_t p, const Share& share) const {
    const Rows& rows = args_.rows;
    int64_t length = rows.steps;
    for (int64_t i = share.sequences.begin; i < share.sequences.end; ++i) {
      while (length > 0 && rows.live(length - 1) <= i) --length;
      const int64_t steps = args_.recurrence[p].reverse ? rows.steps : length;
      for (int s = 0; s < S; ++s) {
        const Range own = s ? share.units : share.columns;
        const T* from = s ? shared_[p].s[s] + i * padded_ : shared_[p].h[steps & 1] + i * padded_h_;
        for (int64_t at = own.begin; at < own.end && at < width(s); at += kLanes)
          store_as(args_.final_states[p * S + s], rows.batch_index(i) * width(s) + at,
                   load<V>(from + at), within<V>(at, width(s)), args_.storage);
      }
    }
  }

  int64_t width(int s) const { return s ? args_.hidden : args_.recurrent; }

  const ForwardArgs& args_;
  const CpuPlan& plan_;
  const RecurrenceSizes sizes_;
  const int64_t panels_, padded_;     // of units
  const int64_t columns_, padded_h_;  // vectors and numbers of h
  const int64_t tape_width_;          // values of a unit
  Shared* shared_ = nullptr;
  Scratch* scratch_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
