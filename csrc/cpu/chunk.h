// Where a chunk of the backward sweeps finds its rows, and the states before a step.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "cpu/ahead.h"
#include "cpu/contract.h"
#include "cpu/team.h"
#include "cpu/tiles.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// The location of one row at one step of a recurrence, and of the state before it.
struct Place {
  int64_t b, row, earlier;  // batch index, row of y and tape, and that of the previous step
  int64_t out;              // row of the outputs
  bool cut, continues;
};

class Chunk {
 public:
  // `tape_width` counts values [H] of a row of the tape.
  Chunk(const BackwardArgs& args, int64_t tape_width) : args_(args), tape_width_(tape_width) {
    const Rows& rows = args.rows;
    for (int32_t p = 0; p < args.recurrences; ++p) {
      const bool reverse = args.recurrence[p].reverse;
      const int64_t a = rows.time(args.begin, reverse), b = rows.time(args.end - 1, reverse);
      origin_[reverse] = rows.compact_row(a < b ? a : b, 0);
    }
  }

  // The sequences of a thread's part that have a row in the chunk.
  Range sequences(int64_t p, int32_t parts, int32_t part) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.recurrence[p].reverse;
    const int64_t a = rows.time(args_.begin, reverse), b = rows.time(args_.end - 1, reverse);
    return sequences_of(rows, a < b ? a : b, (a < b ? b : a) + 1, parts, part);
  }

  // The row of the outputs of sequence i at time t.
  FASTRNN_INLINE int64_t out(int64_t p, int64_t t, int64_t i) const {
    return args_.rows.compact_row(t, i) - origin_[args_.recurrence[p].reverse];
  }

  FASTRNN_INLINE Place locate(int64_t p, int64_t step, int64_t t, int64_t i) const {
    const Rows& rows = args_.rows;
    const bool reverse = args_.recurrence[p].reverse, continues = rows.continues(step, i, reverse);
    const int64_t P = args_.recurrences;
    return {rows.batch_index(i),
            rows.row(t, i) * P + p,
            continues ? rows.row(rows.time(step - 1, reverse), i) * P + p : 0,
            out(p, t, i),
            rows.cut_before(step, i, reverse),
            continues};
  }

  // Element 0 of a value of a row of the tape.
  FASTRNN_INLINE int64_t taped(int64_t row, int64_t value) const {
    return (row * tape_width_ + value) * args_.hidden;
  }

  // Where state s before the step begins, in numbers of `bytes`; null for zeros.
  const char* state_before(const Recurrence& recurrence, int s, const Place& at,
                           int64_t bytes) const {
    const int64_t width = s ? args_.hidden : args_.recurrent;
    const auto from = [bytes](const void* base, int64_t first) {
      return base ? static_cast<const char*>(base) + first * bytes : nullptr;
    };
    if (at.cut) return from(recurrence.reset[s], at.b * width);
    if (!at.continues) return from(recurrence.s0[s], at.b * width);
    return s == 0 ? from(args_.y, at.earlier * width) : from(args_.tape, taped(at.earlier, s - 1));
  }
  // A vector of it, of which n lanes count.
  template <class V>
  FASTRNN_INLINE V state_before(const Recurrence& recurrence, int s, const Place& at, int64_t unit,
                                int n, Storage storage) const {
    const char* from = state_before(recurrence, s, at, stored_bytes<Scalar<V>>(storage));
    return from ? load_as<V>(from, unit, n, storage) : splat<V>(0);
  }

  // What the step before this one will read of the tape, y and dy, `bytes` for each number, apart
  // from what this one has read: for it, their values before the step, states 1..states-1 and y,
  // are those after the step before. Nothing at the chunk's first step, or if rows lie in pieces.
  Ahead before(int64_t p, int64_t step, Range sequences, int64_t states, int64_t bytes) const {
    Ahead ahead;
    const Rows& rows = args_.rows;
    if (rows.order || step == args_.begin) return ahead;
    // `count` numbers from `at` on of every row of `width` numbers, of the sequences live then.
    const auto add = [&](int64_t then, const void* base, int64_t width, int64_t at, int64_t count) {
      if (!base || then < 0) return;
      const int64_t t = rows.time(then, args_.recurrence[p].reverse), P = args_.recurrences;
      const int64_t last = sequences.end < rows.live(t) ? sequences.end : rows.live(t);
      const int64_t first = (rows.row(t, sequences.begin) * P + p) * width + at;
      ahead.add(static_cast<const char*>(base) + first * bytes, count * bytes, P * width * bytes,
                last - sequences.begin);
    };
    const int64_t Q = args_.recurrent, width = tape_width_ * args_.hidden;
    const int64_t after = (states - 1) * args_.hidden;
    add(step - 1, args_.tape, width, after, width - after);
    add(step - 1, args_.dy, Q, 0, Q);
    add(step - 2, args_.tape, width, 0, after);
    add(step - 2, args_.y, Q, 0, Q);
    return ahead;
  }

  // Calls visit(memory, bytes) for what each step adds to; T is the type of gradients.
  template <class T, class Visit>
  void each_changed(int states, int params, const Visit& visit) const {
    const int64_t B = args_.rows.batch, P = args_.recurrences;
    for (void* const* gradients : {args_.ds, args_.dreset})
      for (int64_t k = 0; gradients && k < P * states; ++k)
        visit(gradients[k], B * (k % states ? args_.hidden : args_.recurrent) * sizeof(T));
    for (int64_t p = 0; p < P && args_.dp; ++p)
      visit(args_.dp[p], B * params * args_.hidden * sizeof(T));
  }

 private:
  const BackwardArgs& args_;
  const int64_t tape_width_;
  int64_t origin_[2] = {};  // first compact row of the chunk, forward and reverse
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
