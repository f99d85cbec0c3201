// Where one row of a step has its numbers in the backward sweeps.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/chunk.h"
#include "cpu/contract.h"
#include "cpu/formats.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// A sweep keeps this in a local variable: for all that a compiler knows, any store may change what
// lies in memory, so it would find out anew for every vector where all of this lies.
template <class Cell, class F>
struct GradientRow {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;
  static constexpr int Gu = kInputGates<Cell>, Gv = kRecurrentGates<Cell>;
  static constexpr int S = Cell::kStates, K = Cell::kSaved, N = Cell::kParams;

  // As they are stored: what the step saved, the states before it and after it, and what gradients
  // the latter have from elsewhere. Null for zeros.
  const char *saved, *before[S], *next[S], *after[S];
  // Gradients of the states, carried to the step before, and of those in which episodes begin, if
  // one begins here and they are wanted. Null for a projected state.
  T *ds[S], *dreset[S];
  Word *du, *dv;
  T* dp;  // null if it is not wanted
  int64_t hidden;
  bool cut;

  GradientRow(const BackwardArgs& args, const Chunk& chunk, int64_t p, const Place& at)
      : hidden(args.hidden), cut(at.cut) {
    const int64_t H = args.hidden, bytes = stored_bytes<T>(args.storage);
    const bool projected = Cell::kProjectable && args.projected;
    const auto in = [bytes](const void* base, int64_t first) {
      return base ? static_cast<const char*>(base) + first * bytes : nullptr;
    };
    const auto taped = [&](int value) { return in(args.tape, chunk.taped(at.row, value)); };
    const auto of_state = [&](void* const* gradients, int s) {
      return static_cast<T*>(gradients[p * S + s]) + at.b * (s ? H : args.recurrent);
    };
    const auto row = [&](void* gradients, int gates) {
      return static_cast<Word*>(gradients) + at.out * gradient_row(F::kFormat, gates * H);
    };
    saved = taped(S - 1);
    for (int s = 0; s < S; ++s) {
      const bool elsewhere = s == 0 && projected;
      before[s] = elsewhere ? nullptr : chunk.state_before(args.recurrence[p], s, at, bytes);
      next[s] = s > 0 ? taped(s - 1) : projected ? taped(S - 1 + K) : in(args.y, at.row * H);
      after[s] = s > 0 ? in(args.dsteps, (at.row * (S - 1) + s - 1) * H) : in(args.dy, at.row * H);
      ds[s] = elsewhere ? nullptr : of_state(args.ds, s);
      dreset[s] = at.cut && args.dreset && !elsewhere ? of_state(args.dreset, s) : nullptr;
    }
    du = row(args.du[p], Gu);
    dv = row(args.dv[p], Gv);
    dp = args.dp ? static_cast<T*>(args.dp[p]) + at.b * N * H : nullptr;
  }

  // Reads n lanes of what the step saved, and of the states.
  FASTRNN_INLINE void read(int64_t unit, int n, Storage storage, V* kept, V* s_before,
                           V* s_next) const {
#pragma GCC unroll 64
    for (int k = 0; k < K; ++k) kept[k] = load_as<V>(saved, k * hidden + unit, n, storage);
#pragma GCC unroll 64
    for (int s = 0; s < S; ++s) {
      s_before[s] = state_before(s, unit, n, storage);
      s_next[s] = load_as<V>(next[s], unit, n, storage);
    }
  }

  FASTRNN_INLINE V state_before(int s, int64_t unit, int n, Storage storage) const {
    return before[s] ? load_as<V>(before[s], unit, n, storage) : splat<V>(0);
  }

  // The gradient of state s after the step: what is carried from later steps, and the rest.
  FASTRNN_INLINE V gradient(int s, int64_t unit, int n, Storage storage) const {
    const V carried = load<V>(ds[s] + unit, n);
    return clip_gradient<Cell>(after[s] ? carried + load_as<V>(after[s], unit, n, storage)
                                        : carried);
  }

  // Hands the gradient of state s before the step on, but not out of an episode.
  FASTRNN_INLINE void hand_on(int s, V dbefore, int64_t unit, int n) const {
    if (!ds[s]) return;
    if (dreset[s]) store(dreset[s] + unit, load<V>(dreset[s] + unit, n) + dbefore, n);
    store(ds[s] + unit, cut ? splat<V>(0) : dbefore, n);
  }

  // Adds to the gradients of some of the parameters.
  FASTRNN_INLINE void add_params(uint64_t which, const V* gradients, int64_t unit, int n) const {
    if (!dp) return;
#pragma GCC unroll 64
    for (int k = 0; k < N; ++k) {
      if (!(which >> k & 1) || SameGradient<Cell>::of(k) != k) continue;
      T* const to = dp + k * hidden + unit;
      store(to, load<V>(to, n) + gradients[k], n);
    }
  }
};

// Copies the gradients of parameters that are those of earlier ones, after the last chunk.
template <class Cell, class T>
void copy_same_gradients(const BackwardArgs& args, int64_t p, Range sequences, Range units) {
  if (!args.dp || args.begin > 0) return;
  const int64_t H = args.hidden, end = units.end < H ? units.end : H;
  for (int64_t i = sequences.begin; i < sequences.end; ++i) {
    T* const row = static_cast<T*>(args.dp[p]) + args.rows.batch_index(i) * Cell::kParams * H;
    for (int k = 0; k < Cell::kParams; ++k)
      if (const int first = SameGradient<Cell>::of(k); first != k && end > units.begin)
        memcpy(row + k * H + units.begin, row + first * H + units.begin,
               (end - units.begin) * sizeof(T));
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
