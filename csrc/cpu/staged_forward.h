// The forward sweep of cells whose step has stages (staged.h): every thread owns a recurrence and a
// range of sequences, with all of their units, and waits for no other.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/staged.h"
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

  // Memory of one thread.
  struct Scratch {
    Word* x;      // [rows of a chunk][row of I]
    T* x_scales;  // [rows of a chunk] if the format has them
    T* u;         // [rows of a chunk][Gu][padded H]
    T* state;     // [B][S][padded H]
    typename Step::Rows rows;
  };

 public:
  static bool run(const ForwardArgs& args, const CpuPlan& plan) {
    if (args.rows.batch == 0 || args.hidden == 0) return true;
    return run_sweep<StagedForward>(args, plan);
  }

  StagedForward(const ForwardArgs& args, const CpuPlan& plan)
      : args_(args),
        plan_(plan),
        sizes_{args.inputs, args.hidden, args.recurrent, false},
        padded_(Weights::padded(sizes_)),
        tape_(args.hidden, args.storage) {}

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
    for (int32_t i = 0; i < plan_.threads(); ++i) {
      Scratch own;
      own.x = take(chunk_rows() * row_words<F>(args_.inputs));
      own.x_scales = take(F::kScaled ? chunk_rows() : 0);
      own.u = take(chunk_rows() * Gu * padded_);
      own.state = take(args_.rows.batch * S * padded_);
      own.rows.place(args_.rows.batch, padded_, take);
      own.rows.drawn.place(args_.rows.batch, padded_, take);
      if (arena.ready()) scratch_[i] = own;
    }
  }

  // It reads nothing that it wrote in an earlier run.
  static constexpr bool kRepeatable = true;
  template <class Visit>
  void each_changed(const Visit&) const {}

  void thread(Member& me) const {
    const Range own = part_of(args_.recurrences, plan_.split_recurrences, me.recurrence);
    const Range sequences =
        sequences_of(args_.rows, 0, args_.rows.steps, plan_.split_sequences, me.sequence);
    for (int64_t p = own.begin; p < own.end; ++p)
      if (!args_.recurrence[p].prepacked)
        weights_[p].pack(sizes_, args_.recurrence[p], me.sequence, plan_.split_sequences);
    me.publish(1);
    me.wait_for_all(1);
    for (int64_t p = own.begin; p < own.end; ++p) {
      start(p, sequences, scratch_[me.index]);
      sweep(p, sequences, scratch_[me.index]);
      finish(p, sequences, scratch_[me.index]);
    }
  }

 private:
  // At least one step of all sequences, at most all rows.
  int64_t chunk_rows() const {
    const int64_t B = args_.rows.batch, all = B * args_.rows.steps;
    const int64_t rows = plan_.chunk_rows > B ? plan_.chunk_rows : B;
    return rows < all ? rows : all;
  }
  T* state(const Scratch& own, int64_t row, int s) const {
    return own.state + (row * S + s) * padded_;
  }
  int64_t last_live(int64_t t, Range sequences) const {
    const int64_t live = args_.rows.live(t);
    return sequences.end < live ? sequences.end : live;
  }

  // Sets the states before the first step.
  void start(int64_t p, Range sequences, const Scratch& own) const {
    const Rows& rows = args_.rows;
    const Recurrence& recurrence = args_.recurrence[p];
    for (int64_t i = sequences.begin; i < sequences.end; ++i) {
      const bool cut =
          rows.steps > 0 && rows.live(0) > i && rows.cut_before(0, i, recurrence.reverse);
      for (int s = 0; s < S; ++s)
        for (int64_t unit = 0; unit < padded_; unit += kLanes)
          store(state(own, i - sequences.begin, s) + unit,
                given_state(cut ? recurrence.reset[s] : recurrence.s0[s], i, unit));
    }
  }

  // A vector of a state of sequence i that the caller gave, or zeros.
  V given_state(const void* state, int64_t i, int64_t unit) const {
    return state ? load_as<V>(state, args_.rows.batch_index(i) * args_.hidden + unit,
                              within<V>(unit, args_.hidden), args_.storage)
                 : splat<V>(0);
  }

  void sweep(int64_t p, Range sequences, const Scratch& own) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.recurrence[p].reverse;
    const Step step(sizes_, weights_[p]);
    const int64_t x_words = row_words<F>(args_.inputs);
    own.rows.drawn.begin(args_, p, sequences, {0, padded_});
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
        one_step(step, p, at, sequences.begin, live, u, own);
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

  void one_step(const Step& step, int64_t p, int64_t at, int64_t first, int64_t count, const T* u,
                const Scratch& own) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.recurrence[p].reverse;
    const int64_t t = rows.time(at, reverse), H = args_.hidden;
    typename Step::Rows of = own.rows;
    of.drawn.step(args_, p, t, {first, first + count}, {0, padded_});
    of.u = u;
    for (int s = 0; s < S; ++s) {
      of.state[s] = own.state + s * padded_;
      of.state_stride[s] = S * padded_;
    }
    const auto row_of = [&](int64_t r) { return rows.row(t, first + r) * args_.recurrences + p; };
    Ahead results = results_of(row_of(0), count);
    step.run(
        of, count,
        [&](int64_t r, int k, int64_t unit, V x) __attribute__((always_inline)) {
          if (args_.tape)
            store_as(args_.tape, tape_.value(row_of(r), S - 1 + k) + unit, x, within<V>(unit, H),
                     args_.storage);
        },
        &results);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = row_of(r);
      const bool cut = rows.cut_after(at, first + r, reverse);
      for (int s = 0; s < S; ++s)
        for (int64_t unit = 0; unit < padded_; unit += kLanes) {
          const V next = load<V>(of.next + (r * S + s) * padded_ + unit);
          const int live = within<V>(unit, H);
          if (s == 0)
            store_as(args_.y, row * H + unit, next, live, args_.storage);
          else if (args_.tape)
            store_as(args_.tape, tape_.value(row, s - 1) + unit, next, live, args_.storage);
          // No state crosses into a new episode.
          store(state(own, r, s) + unit,
                cut ? given_state(args_.recurrence[p].reset[s], first + r, unit) : next);
        }
      if (args_.tape && Cell::kRows > 0)
        tape_.write_results(args_.tape, row, of.results + r * Cell::kForward.results);
    }
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
    add(args_.y, H);
    return ahead;
  }

  void finish(int64_t p, Range sequences, const Scratch& own) const {
    for (int64_t i = sequences.begin; i < sequences.end; ++i)
      for (int s = 0; s < S; ++s)
        for (int64_t unit = 0; unit < args_.hidden; unit += kLanes)
          store_as(args_.final_states[p * S + s], args_.rows.batch_index(i) * args_.hidden + unit,
                   load<V>(state(own, i - sequences.begin, s) + unit),
                   within<V>(unit, args_.hidden), args_.storage);
  }

  const ForwardArgs& args_;
  const CpuPlan& plan_;
  const RecurrenceSizes sizes_;
  const int64_t padded_;
  const StagedTape<Cell, T> tape_;
  Weights* weights_ = nullptr;
  Scratch* scratch_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
