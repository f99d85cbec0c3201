// A step in stages, for cells whose units need each other within it (core/stages.h).
//
// A thread runs every stage for all of its rows at once: products read their weights once for all,
// and what crosses between stages stays in the thread's cache. Threads may share the units of these
// rows, in whole blocks (reductions.h). Then they meet before every step and between two stages, to
// see each other's state, values that a product reads, and partial results; before a projection
// they meet too. A format of other words has the rows of every product converted before it: x, h,
// and what a stage made for a later product. All else of a step is computed in numbers.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/drawn.h"
#include "cpu/formats.h"
#include "cpu/matrices.h"
#include "cpu/product.h"
#include "cpu/reductions.h"
#include "cpu/staged_weights.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// Calls f(Number<0>), ..., f(Number<n - 1>).
template <int n, int k = 0, class F>
FASTRNN_INLINE void for_each_number(const F& f) {
  if constexpr (k < n) {
    f(Number<k>{});
    for_each_number<n, k + 1>(f);
  }
}

// The rows of a tape [row][values][H]: states past the first, saved values, m if state 0 is
// projected, then the results that are saved for the row, in the compute type.
template <class Cell, class T>
class StagedTape {
 public:
  // The value that is m.
  static constexpr int kUnprojected = Cell::kStates - 1 + Cell::kSaved;

  explicit StagedTape(const Scan& scan)
      : hidden_(scan.hidden),
        bytes_(stored_bytes<T>(scan.storage)),
        values_(kUnprojected + scan.projected),
        width_(tape_values(values_, Cell::kRows, sizeof(T), bytes_, hidden_)) {}

  int64_t width() const { return width_; }
  // The element at which a value of a row begins.
  FASTRNN_INLINE int64_t value(int64_t row, int k) const { return (row * width_ + k) * hidden_; }
  void write_results(void* tape, int64_t row, const T* results) const {
    memcpy(static_cast<char*>(tape) + results_at(row), results, Cell::kRows * sizeof(T));
  }
  void read_results(const void* tape, int64_t row, T* results) const {
    memcpy(results, static_cast<const char*>(tape) + results_at(row), Cell::kRows * sizeof(T));
  }

 private:
  int64_t results_at(int64_t row) const { return value(row, values_) * bytes_; }
  const int64_t hidden_, bytes_;
  const int values_;  // of units
  const int64_t width_;
};

// A row of values of `width` numbers in the storage type, to write to, or none.
template <class T>
class StoredRow {
  using V = Vec<T>;

 public:
  StoredRow(void* base, int64_t first, int64_t width, Storage storage)
      : base_(base), first_(first), width_(width), storage_(storage) {}

  FASTRNN_INLINE void put(int value, int64_t unit, V x) const {
    if (!base_) return;
    const int64_t at = first_ + value * width_ + unit;
    // Whole vectors of plain numbers, which most are, take no other branch.
    if (__builtin_expect(storage_ == Storage::kSame && unit + lanes<V>() <= width_, true))
      store(static_cast<T*>(base_) + at, x);
    else
      put_some(base_, at, x, within<V>(unit, width_), storage_);
  }

 private:
  // Static, so that a row can be kept in registers.
  static __attribute__((noinline)) void put_some(void* base, int64_t at, V x, int n,
                                                 Storage storage) {
    store_as(base, at, x, n, storage);
  }

  void* const base_;
  const int64_t first_, width_;
  const Storage storage_;
};
// Of a step whose values nobody saves.
struct NoStoredRow {
  template <class V>
  FASTRNN_INLINE void put(int, int64_t, V) const {}
};

// The units that a thread has of the rows of a recurrence: blocks of them, in vectors.
template <class T>
struct OwnUnits {
  Range blocks, vectors;

  OwnUnits(int64_t hidden, int64_t parts, int64_t index) {
    constexpr int64_t n = lanes<Vec<T>>(), per_block = kBlockUnits / n;
    const int64_t all = (hidden + n - 1) / n;
    blocks = part_of(blocks_of(hidden), parts, index);
    vectors.begin = blocks.begin * per_block;
    vectors.end = blocks.end * per_block < all ? blocks.end * per_block : all;
  }
  Range units() const {
    constexpr int n = lanes<Vec<T>>();
    return {vectors.begin * n, vectors.end * n};
  }
};

// The forward step of some rows of a recurrence.
template <class Cell, class F>
class StagedStep {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;
  using Weights = StagedWeights<Cell, F>;
  static constexpr int Gu = kInputGates<Cell>, Gv = kRecurrentGates<Cell>;
  static constexpr int S = Cell::kStates, K = Cell::kSaved, N = Cell::kParams;
  static constexpr auto kProgram = Cell::kForward;
  static constexpr int kStages = sizeof(kProgram.stage) / sizeof(kProgram.stage[0]);
  static constexpr int kTemporaries = kProgram.temporaries, kResults = kProgram.results;
  static constexpr int kLanes = lanes<V>();
  static_assert(kTemporaries <= 64 && kResults <= Reductions<T>::kMost, "a bit for each");

 public:
  // Memory for as many rows as a step has. Threads that share units share the first part.
  struct Rows {
    T* temporaries;                // [rows][kTemporaries][padded H]
    T* next;                       // [rows][S][padded H]
    T* partial;                    // [rows][blocks][kResults][kLanes]
    T* v;                          // [rows][Gv][padded H]
    T* results;                    // [rows][kResults]
    Word* words;                   // [rows][row of H or Q] of one product's rows, if they are
    T* scales;                     // [rows] converted, and their scales
    const T* u = nullptr;          // [rows][Gu][padded H]
    const T* state[S] = {};        // the states before the step,
    int64_t state_stride[S] = {};  // and the distances of their rows
    Drawn<Cell, T> drawn;          // of a pass that draws

    template <class Take>
    void place_shared(int64_t rows, const RecurrenceSizes& n, const Take& take) {
      temporaries = take(rows * kTemporaries * Weights::padded(n));
      next = take(rows * S * Weights::padded(n));
      partial = take(rows * blocks_of(n.hidden) * kResults * kLanes);
    }
    template <class Take>
    void place_own(int64_t rows, const RecurrenceSizes& n, const Take& take) {
      v = take(rows * Gv * Weights::padded(n));
      results = take(rows * kResults);
      words = take(F::kConverts ? rows * row_words<F>(widest(n)) : 0);
      scales = take(F::kScaled ? rows : 0);
    }
  };

  StagedStep(const RecurrenceSizes& sizes, const Weights& weights, const OwnUnits<T>& own)
      : sizes_(sizes),
        weights_(weights),
        own_(own),
        units_(own.units()),
        padded_(Weights::padded(sizes)),
        blocks_(blocks_of(sizes.hidden)) {}

  // u = x * w_ih^T with its bias, of `count` rows x.
  void project(const WordRows<F>& x, int64_t count, T* u) const {
    for (int g = 0; g < Gu; ++g) {
      const T* bias = weights_.bias_u + g * padded_;
      multiply_into<F>({u + g * padded_, Gu * padded_, bias, 0}, x, count,
                       Weights::block(sizes_, weights_.w_ih, sizes_.inputs, g),
                       weights_.ih.from(g * padded_), own_.vectors.begin, own_.vectors.end);
    }
  }

  // Runs the step of `count` rows. save(row) is the row of the tape that takes the saved values of
  // a row; meet() waits for threads that share these rows. Its products ask for what lies `ahead`.
  template <class Save, class Meet>
  void run(const Rows& rows, int64_t count, const Save& save, const Meet& meet,
           Ahead* ahead = nullptr) const {
    if (ahead)
      ahead->spread(Gv * asks_of<F>(count, words_of<F>(sizes_.recurrent), own_.vectors.size()));
    meet();
    multiply_all(rows, count, -1, rows.state[0], rows.state_stride[0], ahead);
    for_each_number<kStages>([&](auto number) {
      constexpr int k = decltype(number)::value;
      if constexpr (k > 0) exchange<k>(rows, count, ahead, meet);
      for (int64_t r = 0; r < count; ++r) one_row<k>(rows, r, save);
    });
  }

  // Writes the vectors `columns` of the projection of `count` rows.
  void project_output(const Rows& rows, int64_t count, Range columns, T* to, int64_t stride) const {
    const WordRows<F> m = in_words(rows, count, rows.next, S * padded_, sizes_.hidden);
    weights_.projection.multiply(sizes_, m, count, columns, to, stride);
  }

 private:
  static int64_t widest(const RecurrenceSizes& n) {
    return n.hidden > n.recurrent ? n.hidden : n.recurrent;
  }

  // What lies between stage k - 1 and stage k.
  template <int k, class Meet>
  void exchange(const Rows& rows, int64_t count, Ahead* ahead, const Meet& meet) const {
    constexpr Stage before = kProgram.stage[k - 1], stage = kProgram.stage[k];
    const auto deviations = [&](const auto& each) {
      for_each_number<kProgram.moments>([&](auto number) {
        constexpr Moments of = kProgram.moment[decltype(number)::value];
        if constexpr (of.stage == k) each(number, DeviationsOf<T>(of.parts, sizes_.hidden));
      });
    };
    deviations([&](auto number, const DeviationsOf<T>& deviation) {
      constexpr Moments of = kProgram.moment[decltype(number)::value];
      for (int64_t r = 0; r < count; ++r) {
        const T* from[of.parts];
        for (int part = 0; part < of.parts; ++part)
          from[part] = source(rows, r, kProgram.source[of.first + part]);
        for (int64_t block = own_.blocks.begin; block < own_.blocks.end; ++block)
          deviation.template reduce<of.parts>(
              block, [&from](int part) { return from[part]; },
              partial(rows, r, block) + of.result * kLanes);
      }
    });
    meet();
    for (int64_t r = 0; r < count; ++r)
      Reductions<T>::complete(before, kResults, blocks_, partial(rows, r, 0),
                              rows.results + r * kResults);
    deviations([&](auto number, const DeviationsOf<T>& deviation) {
      constexpr Moments of = kProgram.moment[decltype(number)::value];
      for (int64_t r = 0; r < count; ++r)
        deviation.complete(partial(rows, r, 0) + of.result * kLanes, kResults * kLanes,
                           rows.results + r * kResults + of.result);
    });
    for (int site = 0; site < Cell::kSites; ++site)
      if (has(stage.sites, site))
        multiply_all(rows, count, site, rows.temporaries + Cell::kOperand[site] * padded_,
                     kTemporaries * padded_, ahead);
  }

  T* partial(const Rows& rows, int64_t r, int64_t block) const {
    return rows.partial + (r * blocks_ + block) * kResults * kLanes;
  }
  const T* source(const Rows& rows, int64_t r, int source) const {
    if (source >= 0) return rows.temporaries + (r * kTemporaries + source) * padded_;
    const int gate = ~source;
    return gate < Gv ? rows.v + (r * Gv + gate) * padded_ : rows.u + (r * Gu + gate - Gv) * padded_;
  }

  // v of the gates of a site, whose operand lies in rows that are `stride` apart. Those of h, which
  // are of no site, have -1.
  void multiply_all(const Rows& rows, int64_t count, int site, const T* operand, int64_t stride,
                    Ahead* ahead) const {
    WordRows<F> read{};
    for (int g = 0; g < Gv; ++g) {
      if (Cell::kSiteOf[g] != site) continue;
      if (!read.first) read = in_words(rows, count, operand, stride, sizes_.recurrent);
      multiply(rows, count, read, g, ahead);
    }
  }

  // Rows of `width` numbers in words, which the next call of this function overwrites.
  WordRows<F> in_words(const Rows& rows, int64_t count, const T* from, int64_t stride,
                       int64_t width) const {
    if constexpr (F::kConverts) {
      const int64_t words = row_words<F>(widest(sizes_));
      for (int64_t r = 0; r < count; ++r)
        put_row<F>(rows.words + r * words, width, rows.scales + r,
                   [&](int64_t k, int n) __attribute__((always_inline)) {
                     return load<V>(from + r * stride + k, n);
                   });
      return {rows.words, words, rows.scales};
    } else {
      return {from, stride, nullptr};
    }
  }

  // v = operand * w_hh^T of one gate; of a summed gate, with u.
  void multiply(const Rows& rows, int64_t count, const WordRows<F>& operand, int g,
                Ahead* ahead) const {
    Destination<T> v{rows.v + g * padded_, Gv * padded_, weights_.bias_v + g * padded_, 0};
    if (Cell::kSummed[g]) {
      v.addend = rows.u + GateRows<Cell>::input_of(g) * padded_;
      v.addend_stride = Gu * padded_;
    }
    multiply_into<F>(v, operand, count, Weights::block(sizes_, weights_.w_hh, sizes_.recurrent, g),
                     weights_.hh.from(g * padded_), own_.vectors.begin, own_.vectors.end, ahead);
  }

  // Where one row has its numbers. A stage keeps this in local variables: for all that a compiler
  // knows, any store may change what lies in memory.
  struct At {
    const T *u, *v, *params, *state[S];
    T *temporaries, *next;
    int64_t padded;
  };
  At at_row(const Rows& rows, int64_t r) const {
    At at{rows.u + r * Gu * padded_,
          rows.v + r * Gv * padded_,
          weights_.params,
          {},
          rows.temporaries + r * kTemporaries * padded_,
          rows.next + r * S * padded_,
          padded_};
    for (int s = 0; s < S; ++s) at.state[s] = rows.state[s] + r * rows.state_stride[s];
    return at;
  }

  template <int k, class Save>
  FASTRNN_INLINE void one_row(const Rows& rows, int64_t r, const Save& save) const {
    constexpr Stage stage = kProgram.stage[k];
    if constexpr (!writes(stage)) return;
    const At at = at_row(rows, r);
    const Drawn<Cell, T> drawn = rows.drawn;
    const auto tape = save(r);
    const Range blocks = own_.blocks, all = units_;
    const int64_t hidden = sizes_.hidden;
    V row[kProgram.rows + 1];
    rows_of<k>(rows.results + r * kResults, row);
    T* to = partial(rows, r, blocks.begin);
    for (int64_t block = blocks.begin; block < blocks.end; ++block, to += kResults * kLanes) {
      const int64_t begin = block * kBlockUnits;
      const int64_t end = begin + kBlockUnits < at.padded ? begin + kBlockUnits : at.padded;
      V total[kResults + 1];
      Reductions<T>::begin(stage, kResults, total);
      for (int64_t next = begin; next < end; next += kLanes) {
        const int64_t unit = opaque_index(next);
        one_vector<k>(at, unit, within<V>(unit, hidden), read(at, unit, drawn, r, all), row, total,
                      tape);
      }
      Reductions<T>::end(stage, kResults, total, to);
    }
  }

  // What the formulas of a vector of units read.
  struct Inputs {
    V u[Gu], v[Gv + 1], s[S], p[kGiven<Cell> + 1], x[kTemporaries + 1];
  };
  static FASTRNN_INLINE Inputs read(const At& at, int64_t unit, const Drawn<Cell, T>& drawn,
                                    int64_t r, Range all) {
    Inputs in;
#pragma GCC unroll 64
    for (int g = 0; g < Gu; ++g) in.u[g] = load<V>(at.u + g * at.padded + unit);
#pragma GCC unroll 64
    for (int g = 0; g < Gv; ++g) in.v[g] = load<V>(at.v + g * at.padded + unit);
#pragma GCC unroll 64
    for (int j = 0; j < S; ++j)
      in.s[j] = Cell::kProjectable && j == 0 ? splat<V>(0)  // not read
                                             : load<V>(at.state[j] + unit);
#pragma GCC unroll 64
    for (int j = 0; j < N; ++j) in.p[j] = load<V>(at.params + j * at.padded + unit);
    drawn.load(r, all, unit, in.p + N);
#pragma GCC unroll 64
    for (int j = 0; j < kTemporaries; ++j) in.x[j] = load<V>(at.temporaries + j * at.padded + unit);
    return in;
  }

  // The row formulas of stage k.
  template <int k>
  FASTRNN_INLINE void rows_of(const T* results, V* row) const {
    T own[kResults + 1], one[kProgram.rows + 1];
#pragma GCC unroll 64
    for (int j = 0; j < kResults; ++j) own[j] = results[j];
    Cell::forward_rows(Number<k>{}, own, static_cast<T>(sizes_.hidden), one);
#pragma GCC unroll 64
    for (int j = 0; j < kProgram.rows; ++j) row[j] = broadcast<V>(one[j]);
  }

  template <int k, class Tape>
  static FASTRNN_INLINE void one_vector(const At& at, int64_t unit, int live, const Inputs& in,
                                        const V* row, V* total, const Tape& tape) {
    constexpr Stage stage = kProgram.stage[k];
    V next[S], saved[K + 1], out[kTemporaries + 1], part[kResults + 1];
    Cell::forward(Number<k>{}, in.u, in.v, in.s, in.p, in.x, row, next, saved, out, part);
#pragma GCC unroll 64
    for (int j = 0; j < S; ++j)
      if (has(stage.states, j)) store(at.next + j * at.padded + unit, next[j]);
#pragma GCC unroll 64
    for (int j = 0; j < K; ++j)
      if (has(stage.saved, j)) tape.put(S - 1 + j, unit, saved[j]);
#pragma GCC unroll 64
    for (int j = 0; j < kTemporaries; ++j)
      if (has(stage.temporaries, j)) store(at.temporaries + j * at.padded + unit, out[j]);
    Reductions<T>::add(stage, kResults, live, part, total);
  }

  const RecurrenceSizes sizes_;
  const Weights weights_;
  const OwnUnits<T> own_;
  const Range units_;
  const int64_t padded_;  // units
  const int64_t blocks_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
