// The backward sweep of cells whose step has stages (staged.h): one chunk of steps, from its end.
//
// Per step: the stages of the cell's derivative, with the transposed products that they need, give
// du and dv; then dh = dv * w_hh of the gates that multiply h. Every thread owns a recurrence and a
// range of sequences, with all of their units. In a format whose words hold several numbers, a gate
// of a row of dv may begin within a word, so what a product reads of a step lies apart as well.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/chunk.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
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
  using Reduced = Results<T>;
  static_assert(kTemporaries <= 64 && kResults <= Reduced::kMost, "a bit for each");
  static_assert(kProgram.moments == 0, "gradients need sums alone");

  // Memory of one thread, for the rows of a step.
  struct Scratch {
    T* dnext;        // [B][S][padded H]
    T* back;         // [B][J][padded H]
    T* temporaries;  // [B][kTemporaries][padded H]
    T* results;      // [B][kResults]
    Word* dv;        // [B][Gv][words of padded H] if rows are converted
    Drawn<Cell, T> drawn;
    Place* places;
  };

 public:
  static bool run(const BackwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden == 0) return true;
    return run_sweep<StagedBackward>(args, plan);
  }

  StagedBackward(const BackwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        vectors_((args.hidden + kLanes - 1) / kLanes),
        padded_(vectors_ * kLanes),
        du_row_(gradient_row(F::kFormat, Gu * args.hidden)),
        dv_row_(gradient_row(F::kFormat, Gv * args.hidden)),
        tape_(args.hidden, args.storage),
        chunk_(args, tape_.width()) {}

  void place(Arena& arena) {
    const int64_t B = args_.rows.batch;
    scratch_ = arena.take<Scratch>(plan_.threads());
    for (int32_t i = 0; i < plan_.threads(); ++i) {
      Scratch own;
      own.dnext = arena.take<T>(B * S * padded_);
      own.back = arena.take<T>(B * J * padded_);
      own.temporaries = arena.take<T>(B * kTemporaries * padded_);
      own.results = arena.take<T>(B * kResults);
      own.dv = arena.take<Word>(F::kConverts ? B * Gv * gate_words() : 0);
      own.places = arena.take<Place>(B);
      own.drawn.place(B, padded_, [&](int64_t n) { return arena.take<T>(n); });
      if (arena.ready()) scratch_[i] = own;
    }
  }

  static constexpr bool kRepeatable = false;  // it never waits within a step
  template <class Visit>
  void each_changed(const Visit&) const {}

  void thread(Member& me) const {
    const Rows& rows = args_.rows;
    const Range own = part_of(args_.recurrences, plan_.split_recurrences, me.recurrence);
    const bool pack_now = prepacks() && *args_.prepacked_for != 1;
    for (int64_t p = own.begin; p < own.end && pack_now; ++p)
      for (int g = 0; g < Gv; g = run_end(g)) pack(p, g, me.sequence);
    me.publish(1);
    me.wait_for_all(1);
    if (me.index == 0 && pack_now) *args_.prepacked_for = 1;
    for (int64_t p = own.begin; p < own.end; ++p) {
      const bool reverse = args_.recurrence[p].reverse;
      const Range sequences = chunk_.sequences(p, plan_.split_sequences, me.sequence);
      scratch_[me.index].drawn.begin(args_, p, sequences, {0, padded_});
      for (int64_t step = args_.end - 1; step >= args_.begin; --step) {
        const int64_t live = rows.live(rows.time(step, reverse));
        const int64_t last = sequences.end < live ? sequences.end : live;
        if (last > sequences.begin) one_step(p, step, {sequences.begin, last}, scratch_[me.index]);
      }
    }
  }

 private:
  bool prepacks() const {
    return backward_layout(F::kFormat, plan_.weights) == WeightLayout::kPrepacked;
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
  // The rows of w_hh from gate g on, whose columns are summed over them.
  Word* packed(int64_t p, int g) const {
    return static_cast<Word*>(args_.prepacked) + (p * Gv + g) * padded_ * args_.hidden;
  }
  const T* unpacked(int64_t p, int g) const {
    const int64_t H = args_.hidden;
    return static_cast<const T*>(args_.recurrence[p].w_hh) + g * H * H;
  }
  // Packs a run of gates; threads that own the same take turns.
  void pack(int64_t p, int g, int32_t turn) const {
    const int64_t H = args_.hidden, depth = (run_end(g) - g) * H;
    int64_t band = 0;
    for_each_band(0, vectors_, [&](int64_t vector, auto count) {
      if (band++ % plan_.split_sequences != turn) return;
      const int64_t column = vector * kLanes;
      pack_columns<F>(unpacked(p, g) + column, H, H - column, depth,
                      packed(p, g) + column * words_of<F>(depth), decltype(count)::value);
    });
  }

  T* carried(int64_t p, int s, const Place& at) const {
    return static_cast<T*>(args_.ds[p * S + s]) + at.b * args_.hidden;
  }

  T* reset_gradient(int64_t p, int s, const Place& at) const {
    return static_cast<T*>(args_.dreset[p * S + s]) + at.b * args_.hidden;
  }

  void one_step(int64_t p, int64_t step, Range sequences, const Scratch& own) const {
    const int64_t t = args_.rows.time(step, args_.recurrence[p].reverse), H = args_.hidden;
    const int64_t count = sequences.size();
    own.drawn.step(args_, p, t, sequences, {0, padded_});
    for (int64_t r = 0; r < count; ++r) {
      own.places[r] = chunk_.locate(p, step, t, sequences.begin + r);
      gather(p, own.places[r], r, own);
    }
    const int64_t first = own.places[0].out;
    for_each_number<kStages>([&](auto number) {
      constexpr int k = decltype(number)::value;
      constexpr Stage stage = kProgram.stage[k];
      for (int j = 0; j < J; ++j) {
        if (!has(stage.sites, j)) continue;
        bool begin = true;
        for (int g = 0; g < Gv; g = run_end(g)) {
          if (Cell::kSiteOf[g] != j) continue;
          T* const to = own.back + j * padded_;
          transposed(p, g, first, count, own, [&](int64_t r, int64_t unit, V sum) {
            T* at = to + r * J * padded_ + unit;
            store(at, begin ? sum : load<V>(at) + sum);
          });
          begin = false;
        }
      }
      for (int64_t r = 0; r < count; ++r) one_row<k>(p, own.places[r], r, own);
    });
    for (int64_t r = 0; r < count; ++r) {
      if constexpr (Gv > 0) F::end_row(row_of(args_.dv[p], own.places[r], dv_row_), Gv * H);
      if constexpr (!all_summed<Cell>())
        F::end_row(row_of(args_.du[p], own.places[r], du_row_), Gu * H);
    }
    // The gradient of h through the gates that multiply it; across a cut, that of the state given
    // there.
    Ahead ahead = ahead_of(p, step, sequences);
    for (int g = 0; g < Gv; g = run_end(g))
      if (Cell::kSiteOf[g] < 0)
        transposed(
            p, g, first, count, own,
            [&](int64_t r, int64_t unit, V sum) {
              const Place& at = own.places[r];
              if (at.cut && !args_.dreset) return;
              T* to = (at.cut ? reset_gradient(p, 0, at) : carried(p, 0, at)) + unit;
              const int n = within<V>(unit, H);
              store(to, load<V>(to, n) + sum, n);
            },
            &ahead);
  }

  // What the next step of the sweep reads is asked for by the products of this one with h.
  Ahead ahead_of(int64_t p, int64_t step, Range sequences) const {
    Ahead ahead;
    if (!prepacks()) return ahead;
    ahead = chunk_.before(p, step, sequences, S, stored_bytes<T>(args_.storage));
    int64_t asks = 0;
    for (int g = 0; g < Gv; g = run_end(g))
      if (Cell::kSiteOf[g] < 0)
        asks +=
            asks_of<F>(sequences.size(), words_of<F>((run_end(g) - g) * args_.hidden), vectors_);
    ahead.spread(asks);
    return ahead;
  }

  // The gradients of the states after the step, the state before it, and the saved results.
  void gather(int64_t p, const Place& at, int64_t r, const Scratch& own) const {
    const int64_t H = args_.hidden;
    T* h_prev = static_cast<T*>(args_.h_prev[p]) + at.out * H;
    for (int64_t unit = 0; unit < padded_; unit += kLanes) {
      const int n = within<V>(unit, H);
      for (int s = 0; s < S; ++s) {
        V gradient = load<V>(carried(p, s, at) + unit, n);
        if (s == 0 && args_.dy)
          gradient = gradient + load_as<V>(args_.dy, at.row * H + unit, n, args_.storage);
        if (s > 0 && args_.dsteps)
          gradient = gradient + load_as<V>(args_.dsteps, (at.row * (S - 1) + s - 1) * H + unit, n,
                                           args_.storage);
        store(own.dnext + (r * S + s) * padded_ + unit, gradient);
      }
      if constexpr (Gv > 0)
        store(h_prev + unit,
              chunk_.state_before<V>(args_.recurrence[p], 0, at, unit, n, args_.storage), n);
    }
    if (R > 0) tape_.read_results(args_.tape, at.row, own.results + r * kResults);
  }

  static Word* row_of(void* gradients, const Place& at, int64_t row) {
    return static_cast<Word*>(gradients) + at.out * row;
  }

  // each(row, unit, sum): dv * w_hh of a run of gates, of the rows of dv from `first` on.
  template <class Each>
  void transposed(int64_t p, int g, int64_t first, int64_t count, const Scratch& own,
                  const Each& each, Ahead* ahead = nullptr) const {
    const int64_t H = args_.hidden, depth = (run_end(g) - g) * H;
    const Word* dv;
    int64_t stride;
    if constexpr (F::kConverts) {
      dv = run(own, 0, g);
      stride = Gv * gate_words();
      for (int64_t r = 0; r < count; ++r) F::end_row(run(own, r, g), depth);
    } else {
      dv = static_cast<const T*>(args_.dv[p]) + (first * Gv + g) * H;
      stride = Gv * H;
    }
    const Matrix<Word> w_hh{prepacks() ? packed(p, g) : unpacked(p, g), words_of<F>(depth), H,
                            prepacks()};
    multiply_columns<F>(
        dv, stride, count, w_hh, 0, vectors_,
        [&](int64_t r, int64_t vector, const V* sum) { each(r, vector * kLanes, *sum); }, ahead);
  }

  template <int k>
  FASTRNN_INLINE void one_row(int64_t p, const Place& at, int64_t r, const Scratch& own) const {
    constexpr Stage stage = kProgram.stage[k];
    const int64_t H = args_.hidden;
    V results[kResults + 1], row[kProgram.rows + 1], total[kResults + 1];
    T* own_results = own.results + r * kResults;
#pragma GCC unroll 64
    for (int j = 0; j < kResults; ++j) results[j] = broadcast<V>(own_results[j]);
    Cell::backward_rows(Number<k>{}, results, splat<V>(static_cast<double>(H)), row);
    Reduced::begin(stage, kResults, total);
    const bool plain = args_.storage == Storage::kSame;
    for (int64_t unit = 0; unit < padded_; unit += kLanes) {
      // Whole vectors of plain numbers, which most are, take no branches.
      if (const int n = within<V>(unit, H); plain && n == kLanes)
        units<k>(p, at, r, own, unit, kLanes, Storage::kSame, row, total);
      else
        units<k>(p, at, r, own, unit, n, args_.storage, row, total);
    }
    Reduced::end(stage, kResults, total, own_results);
  }

  template <int k>
  FASTRNN_INLINE void units(int64_t p, const Place& at, int64_t r, const Scratch& own, int64_t unit,
                            int n, Storage storage, const V* row, V* total) const {
    constexpr Stage stage = kProgram.stage[k];
    const Recurrence& recurrence = args_.recurrence[p];
    const int64_t H = args_.hidden;
    Word* const du = row_of(args_.du[p], at, du_row_);
    Word* const dv = row_of(args_.dv[p], at, dv_row_);
    V saved[K + 1], before[S], next[S], dnext[S], given[kGiven<Cell> + 1], x[kTemporaries + 1];
    V back[J + 1];
    V gates_u[Gu], gates_v[Gv + 1], dbefore[S], dlearned[N + 1], operand[J + 1],
        out[kTemporaries + 1];
    V part[kResults + 1];
#pragma GCC unroll 64
    for (int j = 0; j < K; ++j)
      saved[j] = load_as<V>(args_.tape, chunk_.taped(at.row, S - 1 + j) + unit, n, storage);
#pragma GCC unroll 64
    for (int s = 0; s < S; ++s) {
      before[s] = chunk_.state_before<V>(recurrence, s, at, unit, n, storage);
      next[s] = s == 0 ? load_as<V>(args_.y, at.row * H + unit, n, storage)
                       : load_as<V>(args_.tape, chunk_.taped(at.row, s - 1) + unit, n, storage);
      dnext[s] = load<V>(own.dnext + (r * S + s) * padded_ + unit);
    }
#pragma GCC unroll 64
    for (int j = 0; j < N; ++j)
      given[j] = load<V>(static_cast<const T*>(recurrence.params) + j * H + unit, n);
    own.drawn.load(r, {0, padded_}, unit, given + N);
#pragma GCC unroll 64
    for (int j = 0; j < kTemporaries; ++j)
      x[j] = load<V>(own.temporaries + (r * kTemporaries + j) * padded_ + unit);
#pragma GCC unroll 64
    for (int j = 0; j < J; ++j) back[j] = load<V>(own.back + (r * J + j) * padded_ + unit);
    Cell::backward(Number<k>{}, saved, before, given, next, dnext, x, back, row, gates_u, gates_v,
                   dbefore, dlearned, operand, out, part);
#pragma GCC unroll 64
    for (int g = 0; g < Gv; ++g) {
      if (!has(stage.dv, g)) continue;
      F::put(dv, g * H + unit, gates_v[g], n);
      if constexpr (F::kConverts)
        F::put(run(own, r, run_begin(g)), (g - run_begin(g)) * H + unit, gates_v[g], n);
    }
#pragma GCC unroll 64
    for (int g = 0; g < Gu && !all_summed<Cell>(); ++g)
      if (has(stage.du, g)) F::put(du, g * H + unit, gates_u[g], n);
#pragma GCC unroll 64
    for (int s = 0; s < S; ++s) {
      if (!has(stage.states, s)) continue;
      if (at.cut && args_.dreset) {
        T* to = reset_gradient(p, s, at) + unit;
        store(to, load<V>(to, n) + dbefore[s], n);
      }
      store(carried(p, s, at) + unit, at.cut ? splat<V>(0) : dbefore[s], n);
    }
    if (args_.dp) {
      T* const to = static_cast<T*>(args_.dp[p]) + at.b * N * H + unit;
#pragma GCC unroll 64
      for (int j = 0; j < N; ++j)
        if (has(stage.dp, j)) store(to + j * H, load<V>(to + j * H, n) + dlearned[j], n);
    }
#pragma GCC unroll 64
    for (int j = 0; j < J; ++j)
      if (has(stage.operands, j))
        store(static_cast<T*>(args_.operands[p]) + (at.out * J + j) * H + unit, operand[j], n);
#pragma GCC unroll 64
    for (int j = 0; j < kTemporaries; ++j)
      if (has(stage.temporaries, j))
        store(own.temporaries + (r * kTemporaries + j) * padded_ + unit, out[j]);
    Reduced::add(stage, kResults, n, part, total);
  }

  const BackwardArgs& args_;
  const CpuPlan& plan_;
  const int64_t vectors_, padded_;  // of units
  const int64_t du_row_, dv_row_;   // words of a row of du and of dv
  const StagedTape<Cell, T> tape_;
  const Chunk chunk_;
  Scratch* scratch_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
