// The forward sweep of cells whose step has stages (staged.h): every thread owns a recurrence, a
// range of sequences, and all of their units or some.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/staged.h"
#include "cpu/staged_weights.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class Cell, class F>
class StagedForward {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;
  using Weights = StagedWeights<Cell, F>;
  using Step = StagedStep<Cell, F>;
  static constexpr int Gu = kInputGates<Cell>, S = Cell::kStates, K = Cell::kSaved;
  static constexpr int kLanes = lanes<V>();

  // Memory of one thread; those that share sequences have the same states, and the same of `rows`.
  struct Scratch {
    T* state;     // [B][S][widest padded state]
    Word* x;      // [rows of a chunk][row of I]
    T* x_scales;  // [rows of a chunk] if the format has them
    T* u;         // [rows of a chunk][Gu][padded H]
    typename Step::Rows rows;
  };
  // A thread's part of every step.
  struct Share {
    Range sequences;
    OwnUnits<T> own;
    Range units;
    Range columns;  // vectors of a projection
    bool leads;     // writes what is there once for a row
  };

 public:
  static bool run(const ForwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden + args.recurrent == 0) return true;
    return run_sweep<StagedForward>(args, plan);
  }

  StagedForward(const ForwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        sizes_{args.inputs, args.hidden, args.recurrent, args.projected},
        padded_(Weights::padded(sizes_)),
        columns_(Projection<F>::vectors(sizes_)),
        state_row_(columns_ * kLanes > padded_ ? columns_ * kLanes : padded_),
        tape_(args) {}

  void place(Arena& arena) {
    const auto take = [&](int64_t n) { return arena.take<T>(n); };
    weights_ = arena.take<Weights>(args_.recurrences);
    scratch_ = arena.take<Scratch>(plan_.threads());
    for (int32_t p = 0; p < args_.recurrences; ++p) {
      Weights weights;
      if (const void* prepacked = args_.recurrence[p].prepacked)
        weights = Weights::at(sizes_, prepacked);
      else
        weights.place(sizes_, take);
      if (arena.ready()) weights_[p] = weights;
    }
    const int64_t B = args_.rows.batch;
    Scratch own;
    for (int32_t i = 0; i < plan_.threads(); ++i) {
      if (i % plan_.split_units == 0) {
        own.state = take(B * S * state_row_);
        own.rows.place_shared(B, sizes_, take);
      }
      own.x = take(chunk_rows() * row_words<F>(args_.inputs));
      own.x_scales = take(F::kScaled ? chunk_rows() : 0);
      own.u = take(chunk_rows() * Gu * padded_);
      own.rows.place_own(B, sizes_, take);
      own.rows.drawn.place(B, padded_, take);
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
    const int32_t turn = me.sequence * plan_.split_units + me.unit;
    for (int64_t p = own.begin; p < own.end; ++p)
      if (!args_.recurrence[p].prepacked)
        weights_[p].pack(sizes_, args_.recurrence[p], turn,
                         plan_.split_sequences * plan_.split_units);
    int64_t done = 1;
    me.publish(done);
    me.wait_for_all(done);
    const auto meet = [&] {
      if (me.alone()) return;
      me.publish(++done);
      me.wait_for_peers(done);
    };
    for (int64_t p = own.begin; p < own.end; ++p) {
      start(p, share, scratch_[me.index]);
      sweep(p, share, scratch_[me.index], meet);
      finish(p, share, scratch_[me.index]);
    }
  }

 private:
  bool projected() const { return Cell::kProjectable && __builtin_expect(args_.projected, false); }
  // At least one step of all sequences, at most all rows.
  int64_t chunk_rows() const {
    const int64_t B = args_.rows.batch, all = B * args_.rows.steps;
    const int64_t rows = plan_.chunk_rows > B ? plan_.chunk_rows : B;
    return rows < all ? rows : all;
  }
  Share share_of(const Member& me) const {
    const OwnUnits<T> own(args_.hidden, plan_.split_units, me.unit);
    const Range columns = columns_of(columns_, true, plan_.split_units, me.unit);
    return {sequences_of(args_.rows, 0, args_.rows.steps, plan_.split_sequences, me.sequence), own,
            own.units(), columns, me.unit == 0};
  }
  // The numbers of a state that a thread has.
  Range numbers_of(const Share& share, int s) const {
    if (s > 0 || !projected()) return share.units;
    return {share.columns.begin * kLanes, share.columns.end * kLanes};
  }
  int64_t width(int s) const { return s ? args_.hidden : args_.recurrent; }
  T* state(const Scratch& own, int64_t row, int s) const {
    return own.state + (row * S + s) * state_row_;
  }
  int64_t last_live(int64_t t, Range sequences) const {
    const int64_t live = args_.rows.live(t);
    return sequences.end < live ? sequences.end : live;
  }

  // Sets the states before the first step.
  void start(int64_t p, const Share& share, const Scratch& own) const {
    const Rows& rows = args_.rows;
    const Recurrence& recurrence = args_.recurrence[p];
    for (int64_t i = share.sequences.begin; i < share.sequences.end; ++i) {
      const bool cut =
          rows.steps > 0 && rows.live(0) > i && rows.cut_before(0, i, recurrence.reverse);
      for (int s = 0; s < S; ++s) {
        const Range numbers = numbers_of(share, s);
        for (int64_t at = numbers.begin; at < numbers.end; at += kLanes)
          store(state(own, i - share.sequences.begin, s) + at,
                given_state(cut ? recurrence.reset[s] : recurrence.s0[s], s, i, at));
      }
    }
  }

  // A vector of a state of sequence i that the caller gave, or zeros.
  V given_state(const void* state, int s, int64_t i, int64_t at) const {
    return state ? load_as<V>(state, args_.rows.batch_index(i) * width(s) + at,
                              within<V>(at, width(s)), args_.storage)
                 : splat<V>(0);
  }

  template <class Meet>
  void sweep(int64_t p, const Share& share, const Scratch& own, const Meet& meet) const {
    const Rows& rows = args_.rows;
    const Range sequences = share.sequences;
    const bool reverse = args_.recurrence[p].reverse;
    const Step step(sizes_, weights_[p], share.own);
    const int64_t x_words = row_words<F>(args_.inputs);
    own.rows.drawn.begin(args_, p, sequences, share.units);
    for (int64_t begin = 0, end = 0; begin < rows.steps; begin = end) {
      int64_t count = 0;
      for (; end < rows.steps; ++end) {
        const int64_t t = rows.time(end, reverse), last = last_live(t, sequences);
        if (count > 0 && count + last - sequences.begin > chunk_rows()) break;
        for (int64_t i = sequences.begin; i < last; ++i, ++count)
          copy_input(own.x + count * x_words, own.x_scales + count, t, i);
      }
      step.project({own.x, x_words, own.x_scales}, count, own.u);
      const T* u = own.u;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t live = last_live(rows.time(at, reverse), sequences) - sequences.begin;
        if (live <= 0) continue;
        one_step(step, p, at, share, live, u, own, meet);
        u += live * Gu * padded_;
      }
    }
  }

  void copy_input(Word* to, T* scale, int64_t t, int64_t i) const {
    const Rows& rows = args_.rows;
    const int64_t at = rows.packed() ? (rows.compact[t] + i) * args_.x_row
                                     : t * args_.x_step + rows.batch_index(i) * args_.x_row;
    put_row<F>(to, args_.inputs, scale, [&](int64_t k, int live) __attribute__((always_inline)) {
      return load_as<V>(args_.x, at + k, live, args_.storage);
    });
  }

  template <class Meet>
  void one_step(const Step& step, int64_t p, int64_t at, const Share& share, int64_t count,
                const T* u, const Scratch& own, const Meet& meet) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.recurrence[p].reverse;
    const int64_t t = rows.time(at, reverse), first = share.sequences.begin;
    typename Step::Rows of = own.rows;
    of.drawn.step(args_, p, t, {first, first + count}, share.units);
    of.u = u;
    for (int s = 0; s < S; ++s) {
      of.state[s] = state(own, 0, s);
      of.state_stride[s] = S * state_row_;
    }
    const auto row_of = [&](int64_t r) { return rows.row(t, first + r) * args_.recurrences + p; };
    const auto taped = [&](int64_t r) {
      return StoredRow<T>(args_.tape, tape_.value(row_of(r), 0), args_.hidden, args_.storage);
    };
    const auto put_out = [&](int64_t r) {
      return StoredRow<T>(args_.y, row_of(r) * args_.recurrent, args_.recurrent, args_.storage);
    };
    Ahead results;
    if (share.own.vectors.size() * kLanes == padded_) results = results_of(row_of(0), count);
    step.run(of, count, taped, meet, &results);
    // Writes state s after the step to `value` of a row, and hands it on to the next step, but not
    // into a new episode.
    const auto finish = [&](int64_t r, int s, const T* next, Range numbers, StoredRow<T> stored,
                            int value) {
      const bool cut = rows.cut_after(at, first + r, reverse);
      T* const to = state(own, r, s);
      for (int64_t k = numbers.begin; k < numbers.end; k += kLanes) {
        const V x = load<V>(next + k);
        stored.put(value, k, x);
        store(to + k, cut ? given_state(args_.recurrence[p].reset[s], s, first + r, k) : x);
      }
    };
    for (int64_t r = 0; r < count; ++r) {
      const T* const next = of.next + r * S * padded_;
      if (!projected()) {
        finish(r, 0, next, share.units, put_out(r), 0);
      } else {
        const StoredRow<T> tape = taped(r);
        for (int64_t unit = share.units.begin; unit < share.units.end; unit += kLanes)
          tape.put(tape_.kUnprojected, unit, load<V>(next + unit));
      }
      for (int s = 1; s < S; ++s) finish(r, s, next + s * padded_, share.units, taped(r), s - 1);
      if (args_.tape && Cell::kRows > 0 && share.leads)
        tape_.write_results(args_.tape, row_of(r), of.results + r * Cell::kForward.results);
    }
    if (!projected()) return;
    meet();
    T* const h = state(own, 0, 0);
    step.project_output(of, count, share.columns, h, S * state_row_);
    for (int64_t r = 0; r < count; ++r)
      finish(r, 0, h + r * S * state_row_, numbers_of(share, 0), put_out(r), 0);
  }

  // What a step will write of the tape and y for `count` rows from `row` on.
  Ahead results_of(int64_t row, int64_t count) const {
    Ahead ahead;
    if (!args_.tape || args_.rows.order) return ahead;
    const int64_t H = args_.hidden, bytes = stored_bytes<T>(args_.storage);
    const auto add = [&](void* base, int64_t width) {
      ahead.add(static_cast<char*>(base) + row * width * bytes, width * bytes,
                args_.recurrences * width * bytes, count);
    };
    add(args_.tape, tape_.width() * H);
    if (!projected()) add(args_.y, H);
    return ahead;
  }

  void finish(int64_t p, const Share& share, const Scratch& own) const {
    for (int64_t i = share.sequences.begin; i < share.sequences.end; ++i)
      for (int s = 0; s < S; ++s) {
        const Range numbers = numbers_of(share, s);
        for (int64_t at = numbers.begin; at < numbers.end && at < width(s); at += kLanes)
          store_as(args_.final_states[p * S + s], args_.rows.batch_index(i) * width(s) + at,
                   load<V>(state(own, i - share.sequences.begin, s) + at), within<V>(at, width(s)),
                   args_.storage);
      }
  }

  const ForwardArgs& args_;
  const CpuPlan& plan_;
  const RecurrenceSizes sizes_;
  const int64_t padded_;     // units
  const int64_t columns_;    // vectors of h
  const int64_t state_row_;  // numbers of a row of any state
  const StagedTape<Cell, T> tape_;
  Weights* weights_ = nullptr;
  Scratch* scratch_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
