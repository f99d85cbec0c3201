// The backward sweep of cells whose step has stages (staged.h): one chunk of steps, from its end.
//
// Per step: the stages of the cell's derivative, with the transposed products that they need, give
// du and dv; then dh = dv * w_hh of the gates that multiply h. If the output is projected, the
// product dm = dh * w_hr comes first. Every thread owns a recurrence, a range of sequences, and all
// of their units or some; threads that share units meet wherever they need each other's dh, dv or
// partial results. In a format whose words hold several numbers, a gate of a row of dv may begin
// within a word, so what a product reads of a step lies apart as well.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/chunk.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/gradient_row.h"
#include "cpu/projection.h"
#include "cpu/reductions.h"
#include "cpu/staged.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell, class F>
class StagedBackward {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;
  static constexpr int Gu = kInputGates<Cell>, Gv = kRecurrentGates<Cell>;
  static constexpr int S = Cell::kStates, K = Cell::kSaved, N = Cell::kParams;
  static constexpr int J = Cell::kSites, R = Cell::kRows;
  static constexpr auto kProgram = Cell::kBackward;
  static constexpr int kStages = sizeof(kProgram.stage) / sizeof(kProgram.stage[0]);
  static constexpr int kTemporaries = kProgram.temporaries, kResults = kProgram.results;
  static constexpr int kLanes = lanes<V>();
  // Whether a gate multiplies state 0 itself.
  static constexpr bool kMultipliesState = [] {
    bool any = false;
    for (int g = 0; g < Gv; ++g) any |= Cell::kSiteOf[g] < 0;
    return any;
  }();
  static_assert(kTemporaries <= 64 && kResults <= Reductions<T>::kMost, "a bit for each");
  static_assert(kProgram.moments == 0, "gradients need sums alone");

  // Memory of one thread, for the rows of a step; those that share sequences share the first two.
  struct Scratch {
    T* partial;      // [B][blocks][kResults][kLanes]
    Word* dv;        // [B][Gv][words of padded H] if rows are converted
    T* dnext;        // [B][S][padded H]
    T* back;         // [B][J][padded H]
    T* temporaries;  // [B][kTemporaries][padded H]
    T* results;      // [B][kResults]
    T* dh;           // [B][padded Q], through w_hh
    Drawn<Cell, T> drawn;
    Place* places;
  };
  // A thread's part of every step.
  struct Share {
    Range sequences;
    OwnUnits<T> own;
    Range units;
    Range columns;  // vectors of h
    bool whole;     // of all units
    bool last;      // of the last ones
  };

 public:
  static bool run(const BackwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden + args.recurrent == 0) return true;
    return run_sweep<StagedBackward>(args, plan);
  }

  StagedBackward(const BackwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        vectors_((args.hidden + kLanes - 1) / kLanes),
        columns_((args.recurrent + kLanes - 1) / kLanes),
        padded_(vectors_ * kLanes),
        blocks_(blocks_of(args.hidden)),
        tape_(args),
        chunk_(args, tape_.width()),
        projection_(args, chunk_) {}

  void place(Arena& arena) {
    const int64_t B = args_.rows.batch;
    scratch_ = arena.take<Scratch>(plan_.threads());
    Scratch own;
    for (int32_t i = 0; i < plan_.threads(); ++i) {
      if (i % plan_.split_units == 0) {
        own.partial = arena.take<T>(B * blocks_ * kResults * kLanes);
        own.dv = arena.take<Word>(F::kConverts ? B * Gv * gate_words() : 0);
      }
      own.dnext = arena.take<T>(B * S * padded_);
      own.back = arena.take<T>(B * J * padded_);
      own.temporaries = arena.take<T>(B * kTemporaries * padded_);
      own.results = arena.take<T>(B * kResults);
      own.dh = arena.take<T>(B * columns_ * kLanes);
      own.places = arena.take<Place>(B);
      own.drawn.place(B, padded_, [&](int64_t n) { return arena.take<T>(n); });
      if (arena.ready()) scratch_[i] = own;
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
    const bool pack_now = prepacks() && *args_.prepacked_for != 1;
    for (int64_t p = own.begin; p < own.end && pack_now; ++p)
      pack_all(p, me.sequence * plan_.split_units + me.unit);
    int64_t done = 1;
    me.publish(done);
    me.wait_for_all(done);
    if (me.index == 0 && pack_now) *args_.prepacked_for = 1;
    const auto meet = [&] {
      if (me.alone()) return;
      me.publish(++done);
      me.wait_for_peers(done);
    };
    for (int64_t p = own.begin; p < own.end; ++p) {
      const bool reverse = args_.recurrence[p].reverse;
      Share share = share_of(me);
      share.sequences = chunk_.sequences(p, plan_.split_sequences, me.sequence);
      const Range all = share.sequences;
      scratch_[me.index].drawn.begin(args_, p, all, share.units);
      for (int64_t step = args_.end - 1; step >= args_.begin; --step) {
        const int64_t live = rows.live(rows.time(step, reverse));
        share.sequences.end = all.end < live ? all.end : live;
        if (share.sequences.size() > 0) one_step(p, step, share, scratch_[me.index], meet);
      }
      copy_same_gradients<Cell, T>(args_, p, all, share.units);
    }
  }

 private:
  bool projected() const { return Cell::kProjectable && __builtin_expect(args_.projected, false); }
  bool prepacks() const {
    return backward_layout(F::kFormat, plan_.weights) == WeightLayout::kPrepacked;
  }
  Share share_of(const Member& me) const {
    const OwnUnits<T> own(args_.hidden, plan_.split_units, me.unit);
    // Columns of h that are not projected are units.
    const Range columns =
        projected() ? columns_of(columns_, true, plan_.split_units, me.unit) : own.vectors;
    return {{},
            own,
            own.units(),
            columns,
            own.vectors.size() == vectors_,
            me.unit == plan_.split_units - 1};
  }
  // Gates that multiply the same value and follow each other, up to this one, are one product.
  static constexpr int run_end(int g) {
    int end = g + 1;
    while (end < Gv && Cell::kSiteOf[end] == Cell::kSiteOf[g]) ++end;
    return end;
  }
  static constexpr int run_begin(int g) {
    while (g > 0 && Cell::kSiteOf[g - 1] == Cell::kSiteOf[g]) --g;
    return g;
  }
  int64_t gate_words() const { return row_words<F>(padded_); }
  // What the product of the run of gates from g on reads of a row of this step.
  Word* run(const Scratch& own, int64_t r, int g) const {
    return own.dv + (r * Gv + g) * gate_words();
  }
  // The rows of w_hh from gate g on, whose columns are summed over them; and all of w_hr.
  Word* packed(int64_t p, int g) const {
    return static_cast<Word*>(args_.prepacked) +
           (p * Gv + g) * columns_ * kLanes * words_of<F>(args_.hidden);
  }
  Word* packed_projection(int64_t p) const {
    return packed(args_.recurrences, 0) + p * padded_ * words_of<F>(args_.recurrent);
  }
  const T* unpacked(int64_t p, int g) const {
    return static_cast<const T*>(args_.recurrence[p].w_hh) + g * args_.hidden * args_.recurrent;
  }
  Matrix<Word> matrix(const Word* packed, const void* unpacked, int64_t depth,
                      int64_t width) const {
    return {prepacks() ? packed : static_cast<const Word*>(unpacked), words_of<F>(depth), width,
            prepacks()};
  }
  // Packs the weights of a recurrence; threads that own the same take turns.
  void pack_all(int64_t p, int32_t turn) const {
    const int64_t H = args_.hidden, Q = args_.recurrent;
    int64_t band = 0;
    const auto pack = [&](const T* from, int64_t width, int64_t depth, Word* to) {
      for_each_band(0, (width + kLanes - 1) / kLanes, [&](int64_t vector, auto count) {
        if (band++ % (plan_.split_sequences * plan_.split_units) != turn) return;
        const int64_t column = vector * kLanes;
        pack_columns<F>(from + column, width, width - column, depth,
                        to + column * words_of<F>(depth), decltype(count)::value);
      });
    };
    for (int g = 0; g < Gv; g = run_end(g))
      pack(unpacked(p, g), Q, (run_end(g) - g) * H, packed(p, g));
    if (projected())
      pack(static_cast<const T*>(args_.recurrence[p].w_hr), H, Q, packed_projection(p));
  }

  template <class Meet>
  void one_step(int64_t p, int64_t step, const Share& share, const Scratch& own,
                const Meet& meet) const {
    const int64_t t = args_.rows.time(step, args_.recurrence[p].reverse), H = args_.hidden;
    const int64_t count = share.sequences.size();
    if constexpr (F::kConverts) meet();  // products of the step before have read own.dv
    own.drawn.step(args_, p, t, share.sequences, share.units);
    for (int64_t r = 0; r < count; ++r) {
      own.places[r] = chunk_.locate(p, step, t, share.sequences.begin + r);
      gather(p, own.places[r], r, share, own);
    }
    const int64_t first = own.places[0].out;
    if (projected()) {
      meet();
      projection_.multiply(
          p, first, count,
          matrix(packed_projection(p), args_.recurrence[p].w_hr, args_.recurrent, H),
          share.own.vectors, own.dnext, S * padded_);
    }
    Ahead ahead = ahead_of(p, step, share);
    for_each_number<kStages>([&](auto number) {
      constexpr int k = decltype(number)::value;
      if constexpr (k > 0) exchange<k>(p, first, count, share, own, &ahead, meet);
      for (int64_t r = 0; r < count; ++r) one_row<k>(p, r, share, own);
    });
    end_rows(p, count, share, own);
    meet();
    propagate(p, first, count, share, own, &ahead);
  }

  // What lies between stage k - 1 and stage k.
  template <int k, class Meet>
  void exchange(int64_t p, int64_t first, int64_t count, const Share& share, const Scratch& own,
                Ahead* ahead, const Meet& meet) const {
    constexpr Stage before = kProgram.stage[k - 1], stage = kProgram.stage[k];
    end_rows(p, count, share, own);
    meet();
    for (int64_t r = 0; r < count; ++r)
      Reductions<T>::complete(before, kResults, blocks_, partial(own, r, 0),
                              own.results + r * kResults);
    for (int j = 0; j < J; ++j) {
      if (!has(stage.sites, j)) continue;
      bool begin = true;
      for (int g = 0; g < Gv; g = run_end(g)) {
        if (Cell::kSiteOf[g] != j) continue;
        T* const to = own.back + j * padded_;
        Destination<T> back{to, J * padded_};
        if (!begin) {
          back.addend = to;
          back.addend_stride = back.stride;
        }
        transposed(back, p, g, first, count, share.own.vectors, own, ahead);
        begin = false;
      }
    }
  }

  // Ends the rows of du and dv that were written so far.
  void end_rows(int64_t p, int64_t count, const Share& share, const Scratch& own) const {
    const int64_t H = args_.hidden;
    if (!F::kConverts || !share.last) return;
    for (int64_t r = 0; r < count; ++r) {
      const GradientRow<Cell, F> row(args_, chunk_, p, own.places[r]);
      for (int g = 0; g < Gv; g = run_end(g)) F::end_row(run(own, r, g), (run_end(g) - g) * H);
      if constexpr (Gv > 0) F::end_row(row.dv, Gv * H);
      if constexpr (!all_summed<Cell>()) F::end_row(row.du, Gu * H);
    }
  }

  // The gradient of h through the gates that multiply it; across a cut, that of the state given
  // there.
  void propagate(int64_t p, int64_t first, int64_t count, const Share& share, const Scratch& own,
                 Ahead* ahead) const {
    const int64_t row = columns_ * kLanes;
    Destination<T> dh{own.dh, row};
    for (int g = 0; g < Gv; g = run_end(g)) {
      if (Cell::kSiteOf[g] >= 0) continue;
      transposed(dh, p, g, first, count, share.columns, own, ahead);
      dh.addend = own.dh;
      dh.addend_stride = row;
    }
    for (int64_t r = 0; r < count && dh.addend; ++r) {
      const Place& at = own.places[r];
      void* const* const all = at.cut ? args_.dreset : args_.ds;
      if (!all) continue;
      T* const to = static_cast<T*>(all[p * S]) + at.b * args_.recurrent;
      for (int64_t k = share.columns.begin * kLanes; k < share.columns.end * kLanes; k += kLanes) {
        const int n = within<V>(k, args_.recurrent);
        store(to + k, load<V>(to + k, n) + load<V>(own.dh + r * row + k), n);
      }
    }
  }

  // What the next step of the sweep reads is asked for by the products of this one.
  Ahead ahead_of(int64_t p, int64_t step, const Share& share) const {
    Ahead ahead;
    if (!prepacks() || !share.whole) return ahead;
    ahead = chunk_.before(p, step, share.sequences, S, stored_bytes<T>(args_.storage));
    int64_t asks = 0;
    for (int g = 0; g < Gv; g = run_end(g))
      asks += asks_of<F>(share.sequences.size(), words_of<F>((run_end(g) - g) * args_.hidden),
                         columns_);
    ahead.spread(asks);
    return ahead;
  }

  // The gradients of the states after the step, the state before it, and the saved results.
  void gather(int64_t p, const Place& at, int64_t r, const Share& share, const Scratch& own) const {
    const GradientRow<Cell, F> row(args_, chunk_, p, at);
    const Storage storage = args_.storage;
    const Range units = share.units;
    if (projected()) projection_.gather(p, at, share.columns);
    for (int s = projected(); s < S; ++s) {
      T* const to = own.dnext + (r * S + s) * padded_;
      for (int64_t unit = units.begin; unit < units.end; unit += kLanes)
        store(to + unit, row.gradient(s, unit, within<V>(unit, row.hidden), storage));
    }
    if (kMultipliesState && !projected()) {
      T* const to = static_cast<T*>(args_.h_prev[p]) + at.out * row.hidden;
      for (int64_t unit = units.begin; unit < units.end; unit += kLanes) {
        const int n = within<V>(unit, row.hidden);
        store(to + unit, row.state_before(0, unit, n, storage), n);
      }
    }
    if (R > 0) tape_.read_results(args_.tape, at.row, own.results + r * kResults);
  }

  // Writes dv * w_hh of a run of gates, of the rows of dv from `first` on, for some vectors of
  // columns.
  void transposed(const Destination<T>& to, int64_t p, int g, int64_t first, int64_t count,
                  Range columns, const Scratch& own, Ahead* ahead) const {
    const int64_t H = args_.hidden, depth = (run_end(g) - g) * H;
    WordRows<F> dv{};
    if constexpr (F::kConverts)
      dv = {run(own, 0, g), Gv * gate_words(), nullptr};
    else
      dv = {static_cast<const T*>(args_.dv[p]) + (first * Gv + g) * H, Gv * H, nullptr};
    multiply_into<F>(to, dv, count, matrix(packed(p, g), unpacked(p, g), depth, args_.recurrent),
                     {}, columns.begin, columns.end, ahead);
  }

  T* partial(const Scratch& own, int64_t r, int64_t block) const {
    return own.partial + (r * blocks_ + block) * kResults * kLanes;
  }

  // Where one row has its numbers, with those that its stages hand on.
  struct At : GradientRow<Cell, F> {
    const T *dnext, *params, *back;
    T *temporaries, *operands;
    Word* runs;
    int64_t padded, gate_words;

    At(const StagedBackward& sweep, int64_t p, int64_t r, const Scratch& own)
        : GradientRow<Cell, F>(sweep.args_, sweep.chunk_, p, own.places[r]),
          dnext(own.dnext + r * S * sweep.padded_),
          params(static_cast<const T*>(sweep.args_.recurrence[p].params)),
          back(own.back + r * J * sweep.padded_),
          temporaries(own.temporaries + r * kTemporaries * sweep.padded_),
          operands(J > 0 ? static_cast<T*>(sweep.args_.operands[p]) +
                               own.places[r].out * J * sweep.args_.hidden
                         : nullptr),
          runs(sweep.run(own, r, 0)),
          padded(sweep.padded_),
          gate_words(sweep.gate_words()) {}
  };

  template <int k>
  FASTRNN_INLINE void one_row(int64_t p, int64_t r, const Share& share, const Scratch& own) const {
    constexpr Stage stage = kProgram.stage[k];
    if constexpr (!writes(stage)) return;
    const At at(*this, p, r, own);
    const Range blocks = share.own.blocks, units = share.units;
    const Drawn<Cell, T> drawn = own.drawn;
    const Storage storage = args_.storage;
    V row[kProgram.rows + 1];
    rows_of<k>(own.results + r * kResults, row);
    T* to = partial(own, r, blocks.begin);
    for (int64_t block = blocks.begin; block < blocks.end; ++block, to += kResults * kLanes) {
      const int64_t begin = block * kBlockUnits;
      const int64_t end = begin + kBlockUnits < at.padded ? begin + kBlockUnits : at.padded;
      V total[kResults + 1];
      Reductions<T>::begin(stage, kResults, total);
      for (int64_t next = begin; next < end; next += kLanes) {
        const int64_t unit = opaque_index(next);
        const auto vector = [&](int n, Storage stored) __attribute__((always_inline)) {
          one_vector<k>(at, unit, n, read(at, unit, n, stored, drawn, r, units), row, total);
        };
        // Whole vectors of plain numbers, which most are, take no branches.
        if (const int n = within<V>(unit, at.hidden); storage == Storage::kSame && n == kLanes)
          vector(kLanes, Storage::kSame);
        else
          vector(n, storage);
      }
      Reductions<T>::end(stage, kResults, total, to);
    }
  }

  // What the formulas of a vector of units read.
  struct Inputs {
    V saved[K + 1], before[S], given[kGiven<Cell> + 1], next[S], dnext[S], x[kTemporaries + 1];
    V back[J + 1];
  };
  static FASTRNN_INLINE Inputs read(const At& at, int64_t unit, int n, Storage storage,
                                    const Drawn<Cell, T>& drawn, int64_t r, Range units) {
    const int64_t H = at.hidden;
    Inputs in;
    at.read(unit, n, storage, in.saved, in.before, in.next);
#pragma GCC unroll 64
    for (int s = 0; s < S; ++s) in.dnext[s] = load<V>(at.dnext + s * at.padded + unit);
#pragma GCC unroll 64
    for (int j = 0; j < N; ++j) in.given[j] = load<V>(at.params + j * at.hidden + unit, n);
    drawn.load(r, units, unit, in.given + N);
#pragma GCC unroll 64
    for (int j = 0; j < kTemporaries; ++j)
      in.x[j] = load<V>(at.temporaries + unit * kTemporaries + j * kLanes);
#pragma GCC unroll 64
    for (int j = 0; j < J; ++j) in.back[j] = load<V>(at.back + j * at.padded + unit);
    return in;
  }

  // The row formulas of stage k.
  template <int k>
  FASTRNN_INLINE void rows_of(const T* results, V* row) const {
    T own[kResults + 1], one[kProgram.rows + 1];
#pragma GCC unroll 64
    for (int j = 0; j < kResults; ++j) own[j] = results[j];
    Cell::backward_rows(Number<k>{}, own, static_cast<T>(args_.hidden), one);
#pragma GCC unroll 64
    for (int j = 0; j < kProgram.rows; ++j) row[j] = broadcast<V>(one[j]);
  }

  template <int k>
  static FASTRNN_INLINE void one_vector(const At& at, int64_t unit, int n, const Inputs& in,
                                        const V* row, V* total) {
    constexpr Stage stage = kProgram.stage[k];
    const int64_t H = at.hidden;
    V gates_u[Gu], gates_v[Gv + 1], dbefore[S], dlearned[N + 1], operand[J + 1];
    V out[kTemporaries + 1], part[kResults + 1];
    Cell::backward(Number<k>{}, in.saved, in.before, in.given, in.next, in.dnext, in.x, in.back,
                   row, gates_u, gates_v, dbefore, dlearned, operand, out, part);
    T* const temporaries = at.temporaries + unit * kTemporaries;
#pragma GCC unroll 64
    for (int g = 0; g < Gv; ++g) {
      if (!has(stage.dv, g)) continue;
      F::put(at.dv, g * H + unit, gates_v[g], n);
      if constexpr (F::kConverts)
        F::put(at.runs + run_begin(g) * at.gate_words, (g - run_begin(g)) * H + unit, gates_v[g],
               n);
    }
#pragma GCC unroll 64
    for (int g = 0; g < Gu && !all_summed<Cell>(); ++g)
      if (has(stage.du, g)) F::put(at.du, g * H + unit, gates_u[g], n);
#pragma GCC unroll 64
    for (int s = 0; s < S; ++s)
      if (has(stage.states, s)) at.hand_on(s, dbefore[s], unit, n);
    at.add_params(stage.dp, dlearned, unit, n);
#pragma GCC unroll 64
    for (int j = 0; j < J; ++j)
      if (has(stage.operands, j)) store(at.operands + j * H + unit, operand[j], n);
#pragma GCC unroll 64
    for (int j = 0; j < kTemporaries; ++j)
      if (has(stage.temporaries, j)) store(temporaries + j * kLanes, out[j]);
    Reductions<T>::add(stage, kResults, n, part, total);
  }

  const BackwardArgs& args_;
  const CpuPlan& plan_;
  const int64_t vectors_, columns_;  // vectors of units, and of the columns of h
  const int64_t padded_, blocks_;    // units, and blocks of them
  const StagedTape<Cell, T> tape_;
  const Chunk chunk_;
  const ProjectionGradient<Cell, F> projection_;
  Scratch* scratch_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
