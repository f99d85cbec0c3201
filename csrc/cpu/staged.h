// A step in stages, for cells whose units need each other within it (core/stages.h).
//
// A thread has all units of its rows, so what lies between two stages is no wait but the end of a
// loop over them. It runs every stage for all of its rows at once: products read their weights once
// for all, and what crosses between stages stays in the thread's cache. Sums take the units of a
// row in their order, so that a row's numbers depend on that row alone. A format of other words has
// the rows of every product converted before it: x, h, and what a stage made for a later product.
// All else of a step is computed in numbers.
#pragma once

#include <cstdint>
#include <utility>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/drawn.h"
#include "cpu/formats.h"
#include "cpu/pack.h"
#include "cpu/product.h"
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

// Rows that products read, in words.
template <class F>
struct WordRows {
  const typename F::Word* first;
  int64_t stride;
  const typename F::Number* scales;  // of each row, if the format has them

  FASTRNN_INLINE typename F::Number scale(int64_t row) const {
    if constexpr (F::kScaled) return scales[row];
    return 1;
  }
};

// Writes a row of `count` numbers, which load(k, live) reads in vectors, in words, with its scale.
template <class F, class Load>
FASTRNN_INLINE void put_row(typename F::Word* to, int64_t count, typename F::Number* scale,
                            const Load& load) {
  using V = Vec<typename F::Number>;
  if constexpr (F::kConverts) {
    const typename F::Number found = F::convert(to, count, load);
    if constexpr (F::kScaled) *scale = found;
  } else {
    for (int64_t k = 0; k < count; k += lanes<V>()) store(to + k, load(k, within<V>(k, count)));
  }
}

// The weights of a recurrence: for each gate its block of either matrix, in bands of units.
template <class Cell, class F>
struct StagedWeights {
  using T = typename F::Word;
  using V = Vec<T>;
  static constexpr int Gu = kInputGates<Cell>, Gv = kRecurrentGates<Cell>, N = Cell::kParams;
  static constexpr int kLanes = lanes<V>();

  T *w_ih, *w_hh;        // [Gu][bands of H][words of I] and [Gv][bands of H][words of H]
  T *bias_u, *bias_v;    // [Gu or Gv][padded H]; bias_v serves gates that are not summed
  T* params;             // [N][padded H]
  Columnwise<F> ih, hh;  // as wide as bias_u and bias_v

  static int64_t vectors(const RecurrenceSizes& n) { return (n.hidden + kLanes - 1) / kLanes; }
  static int64_t padded(const RecurrenceSizes& n) { return vectors(n) * kLanes; }

  // Takes memory by take(count), in an order that is part of the layout.
  template <class Take>
  void place(const RecurrenceSizes& n, const Take& take) {
    w_ih = take(Gu * padded(n) * words_of<F>(n.inputs));
    w_hh = take(Gv * padded(n) * words_of<F>(n.recurrent));
    bias_u = take(Gu * padded(n));
    bias_v = take(Gv * padded(n));
    params = take(N * padded(n));
    for (auto [to, gates] : {std::pair(&ih, Gu), {&hh, Gv}}) {
      to->scale = take(F::kScaled ? gates * padded(n) : 0);
      to->zero = reinterpret_cast<int32_t*>(take(F::kScaled ? gates * padded(n) : 0));
    }
  }
  // A view of memory, in one piece, that pack_all() wrote or will write.
  static StagedWeights at(const RecurrenceSizes& n, const void* base) {
    StagedWeights out;
    T* next = static_cast<T*>(const_cast<void*>(base));
    out.place(n, [&](int64_t count) { return std::exchange(next, next + count); });
    return out;
  }
  static int64_t bytes(const RecurrenceSizes& n) {
    StagedWeights out;
    int64_t total = 0;
    out.place(n, [&](int64_t count) {
      total += count;
      return static_cast<T*>(nullptr);
    });
    return total * static_cast<int64_t>(sizeof(T));
  }
  static void pack_all(const RecurrenceSizes& n, const Recurrence& recurrence, void* base) {
    at(n, base).pack(n, recurrence, 0, 1);
  }

  // Packs every `turns`-th gate, beginning with number `turn`.
  void pack(const RecurrenceSizes& n, const Recurrence& recurrence, int32_t turn,
            int32_t turns) const {
    for (int g = turn; g < Gu; g += turns) {
      pack_block(n, recurrence.w_ih, recurrence.scale_ih, n.inputs, g, w_ih, ih);
      const int v = summed_with<Cell>(g);
      for (int64_t unit = 0; unit < padded(n); unit += kLanes) {
        const V b_ih = numbers(recurrence.b_ih, g, n, unit);
        store(bias_u + g * padded(n) + unit,
              v < 0 ? b_ih : b_ih + numbers(recurrence.b_hh, v, n, unit));
      }
    }
    for (int g = turn; g < Gv; g += turns) {
      pack_block(n, recurrence.w_hh, recurrence.scale_hh, n.recurrent, g, w_hh, hh);
      for (int64_t unit = 0; unit < padded(n); unit += kLanes)
        store(bias_v + g * padded(n) + unit, numbers(recurrence.b_hh, g, n, unit));
    }
    for (int k = turn; k < N; k += turns)
      for (int64_t unit = 0; unit < padded(n); unit += kLanes)
        store(params + k * padded(n) + unit, numbers(recurrence.params, k, n, unit));
  }

  // The block of gate g of a packed matrix with rows of `inputs` numbers.
  static Matrix<T> block(const RecurrenceSizes& n, const T* matrix, int64_t inputs, int g) {
    const int64_t depth = words_of<F>(inputs);
    return {matrix + g * padded(n) * depth, depth, n.hidden, true};
  }

 private:
  static V numbers(const void* from, int row, const RecurrenceSizes& n, int64_t unit) {
    return from ? load<V>(static_cast<const T*>(from) + row * n.hidden + unit,
                          within<V>(unit, n.hidden))
                : splat<V>(0);
  }
  static void pack_block(const RecurrenceSizes& n, const void* weights, const float* scale,
                         int64_t inputs, int g, T* matrix, const Columnwise<F>& columns) {
    const int64_t depth = words_of<F>(inputs);
    const T* from = static_cast<const T*>(weights) + g * n.hidden * depth;
    T* to = matrix + g * padded(n) * depth;
    for_each_band(0, vectors(n), [&](int64_t vector, auto count) {
      constexpr int kWide = decltype(count)::value;
      for (int v = 0; v < kWide; ++v) {
        const int64_t unit = (vector + v) * kLanes;
        const int live = within<V>(unit, n.hidden);
        T* const band = to + vector * kLanes * depth;
        pack_transposed(from + unit * depth, depth, live, depth, band, kWide, v);
        if constexpr (F::kScaled)
          describe_columns<F>(band + v * kLanes, kWide * kLanes, depth, scale + g * n.hidden + unit,
                              live, columns, g * padded(n) + unit);
      }
    });
  }
};

// The reductions of a program: a stage's parts, and the moments between two stages, give a row's
// results.
template <class T>
class Results {
  using V = Vec<T>;
  static constexpr int kLanes = lanes<V>();

 public:
  static constexpr int kMost = 64;  // bits of Stage::sums

  // Where the sums and maxima of a stage begin, for one row.
  static FASTRNN_INLINE void begin(const Stage& stage, int results, V* total) {
#pragma GCC unroll 64
    for (int k = 0; k < results; ++k)
      total[k] = has(stage.maxima, k) ? splat<V>(-__builtin_inf()) : splat<V>(0);
  }
  // Adds the parts of one vector of units, of which `live` count.
  static FASTRNN_INLINE void add(const Stage& stage, int results, int live, V* part, V* total) {
#pragma GCC unroll 64
    for (int k = 0; k < results; ++k) {
      if (has(stage.sums, k)) {
        if (live < kLanes) part[k] = first_lanes(part[k], live, 0);
        total[k] = total[k] + part[k];
      } else if (has(stage.maxima, k)) {
        if (live < kLanes) part[k] = first_lanes(part[k], live, -__builtin_inf());
        total[k] = maximum(total[k], part[k]);
      }
    }
  }
  static FASTRNN_INLINE void end(const Stage& stage, int results, const V* total, T* to) {
#pragma GCC unroll 64
    for (int k = 0; k < results; ++k) {
      if (has(stage.sums, k)) to[k] = add_lanes(total[k]);
      if (has(stage.maxima, k)) to[k] = largest_lane(total[k]);
    }
  }

  // Mean and sum of squared deviations of `parts` rows of `width` numbers; source(k) begins them.
  template <class Source>
  static FASTRNN_INLINE void moments(int parts, int64_t width, const Source& source, T* to) {
    const auto total = [&](const auto& each) __attribute__((always_inline)) {
      V sum = splat<V>(0);
      for (int k = 0; k < parts; ++k) {
        const T* from = source(k);
        for (int64_t unit = 0; unit < width; unit += kLanes) {
          const int live = within<V>(unit, width);
          const V x = each(load<V>(from + unit));
          sum = sum + (live < kLanes ? first_lanes(x, live, 0) : x);
        }
      }
      return add_lanes(sum);
    };
    const T mean = total([](V x) { return x; }) / static_cast<T>(parts * width);
    to[0] = mean;
    to[1] = total([mean](V x) { return (x - mean) * (x - mean); });
  }

 private:
  // x with `fill` past the first n lanes.
  static FASTRNN_INLINE V first_lanes(V x, int n, double fill) {
    T lane[kLanes];
    store(lane, x);
    for (int l = n; l < kLanes; ++l) lane[l] = static_cast<T>(fill);
    return load<V>(lane);
  }
};

// The rows of a tape [row][values][H]: states past the first, saved values, then the results that
// are saved for the row, in the compute type.
template <class Cell, class T>
class StagedTape {
 public:
  StagedTape(int64_t hidden, Storage storage)
      : hidden_(hidden),
        bytes_(stored_bytes<T>(storage)),
        width_(tape_values(Cell::kStates - 1 + Cell::kSaved, Cell::kRows, sizeof(T), bytes_,
                           hidden)) {}

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
  int64_t results_at(int64_t row) const {
    return value(row, Cell::kStates - 1 + Cell::kSaved) * bytes_;
  }
  const int64_t hidden_, bytes_, width_;
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
  using Reduced = Results<T>;
  static_assert(kTemporaries <= 64 && kResults <= Reduced::kMost, "a bit for each");

 public:
  // Memory of a thread, for as many rows as a step has.
  struct Rows {
    T* v;                          // [rows][Gv][padded H]
    T* temporaries;                // [rows][kTemporaries][padded H]
    T* results;                    // [rows][kResults]
    T* next;                       // [rows][S][padded H]
    Word* words;                   // [rows][row of H] of one product's rows, if they are converted,
    T* scales;                     // [rows] and their scales
    const T* u = nullptr;          // [rows][Gu][padded H]
    const T* state[S] = {};        // the states before the step,
    int64_t state_stride[S] = {};  // and the distances of their rows
    Drawn<Cell, T> drawn;          // of a pass that draws

    template <class Take>
    void place(int64_t rows, int64_t padded, const Take& take) {
      v = take(rows * Gv * padded);
      temporaries = take(rows * kTemporaries * padded);
      results = take(rows * kResults);
      next = take(rows * S * padded);
      words = take(F::kConverts ? rows * row_words<F>(padded) : 0);
      scales = take(F::kScaled ? rows : 0);
    }
  };

  StagedStep(const RecurrenceSizes& sizes, const Weights& weights)
      : sizes_(sizes),
        weights_(weights),
        vectors_(Weights::vectors(sizes)),
        padded_(Weights::padded(sizes)) {}

  // u = x * w_ih^T with its bias, of `count` rows x.
  void project(const WordRows<F>& x, int64_t count, T* u) const {
    for (int g = 0; g < Gu; ++g) {
      const T* bias = weights_.bias_u + g * padded_;
      multiply_columns<F>(
          x.first, x.stride, count, Weights::block(sizes_, weights_.w_ih, sizes_.inputs, g), 0,
          vectors_, [&](int64_t r, int64_t vector, const auto* sum) {
            const int64_t unit = vector * kLanes;
            const V all = end_product<F>(sum, weights_.ih, g * padded_ + unit, x.scale(r));
            store(u + (r * Gu + g) * padded_ + unit, all + load<V>(bias + unit));
          });
    }
  }

  // Runs the step of `count` rows; save(row, k, unit, value) takes the saved values. Its products
  // with h ask for what lies `ahead`.
  template <class Save>
  void run(const Rows& rows, int64_t count, const Save& save, Ahead* ahead = nullptr) const {
    if (ahead) {
      int64_t products = 0;
      for (int g = 0; g < Gv; ++g) products += Cell::kSiteOf[g] < 0;
      ahead->spread(products * asks_of<F>(count, words_of<F>(sizes_.recurrent), vectors_));
    }
    multiply_all(rows, count, -1, rows.state[0], rows.state_stride[0], ahead);
    for_each_number<kStages>([&](auto number) {
      constexpr int k = decltype(number)::value;
      constexpr Stage stage = kProgram.stage[k];
      for (int site = 0; site < Cell::kSites; ++site)
        if (has(stage.sites, site))
          multiply_all(rows, count, site, rows.temporaries + Cell::kOperand[site] * padded_,
                       kTemporaries * padded_);
      for (int m = 0; m < kProgram.moments; ++m)
        if (kProgram.moment[m].stage == k) find_moments(rows, count, kProgram.moment[m]);
      for (int64_t r = 0; r < count; ++r) one_row<k>(rows, r, save);
    });
  }

 private:
  // v of the gates of a site, whose operand lies in rows that are `stride` apart. Those of h, which
  // are of no site, have -1.
  void multiply_all(const Rows& rows, int64_t count, int site, const T* operand, int64_t stride,
                    Ahead* ahead = nullptr) const {
    WordRows<F> read{};
    for (int g = 0; g < Gv; ++g) {
      if (Cell::kSiteOf[g] != site) continue;
      if (!read.first) read = in_words(rows, count, operand, stride);
      multiply(rows, count, read, g, ahead);
    }
  }

  // Rows of numbers in words, which the next call of this function overwrites.
  WordRows<F> in_words(const Rows& rows, int64_t count, const T* from, int64_t stride) const {
    if constexpr (F::kConverts) {
      const int64_t width = row_words<F>(padded_);
      for (int64_t r = 0; r < count; ++r)
        put_row<F>(rows.words + r * width, sizes_.recurrent, rows.scales + r,
                   [&](int64_t k, int n) __attribute__((always_inline)) {
                     return load<V>(from + r * stride + k, n);
                   });
      return {rows.words, width, rows.scales};
    } else {
      return {from, stride, nullptr};
    }
  }

  // v = operand * w_hh^T of one gate; of a summed gate, with u.
  void multiply(const Rows& rows, int64_t count, const WordRows<F>& operand, int g,
                Ahead* ahead) const {
    const T* bias = weights_.bias_v + g * padded_;
    multiply_columns<F>(
        operand.first, operand.stride, count,
        Weights::block(sizes_, weights_.w_hh, sizes_.recurrent, g), 0, vectors_,
        [&](int64_t r, int64_t vector, const auto* sum) {
          const int64_t unit = vector * kLanes;
          const int64_t of_u = (r * Gu + GateRows<Cell>::input_of(g)) * padded_ + unit;
          const V all = end_product<F>(sum, weights_.hh, g * padded_ + unit, operand.scale(r));
          store(rows.v + (r * Gv + g) * padded_ + unit,
                all + load<V>(Cell::kSummed[g] ? rows.u + of_u : bias + unit));
        },
        ahead);
  }

  void find_moments(const Rows& rows, int64_t count, const Moments& of) const {
    for (int64_t r = 0; r < count; ++r)
      Reduced::moments(
          of.parts, sizes_.hidden,
          [&](int part) -> const T* {
            const int source = kProgram.source[of.first + part];
            if (source >= 0) return rows.temporaries + (r * kTemporaries + source) * padded_;
            const int gate = ~source;
            return gate < Gv ? rows.v + (r * Gv + gate) * padded_
                             : rows.u + (r * Gu + gate - Gv) * padded_;
          },
          rows.results + r * kResults + of.result);
  }

  template <int k, class Save>
  FASTRNN_INLINE void one_row(const Rows& rows, int64_t r, const Save& save) const {
    constexpr Stage stage = kProgram.stage[k];
    V results[kResults + 1], row[kProgram.rows + 1], total[kResults + 1];
    T* own = rows.results + r * kResults;
#pragma GCC unroll 64
    for (int j = 0; j < kResults; ++j) results[j] = broadcast<V>(own[j]);
    Cell::forward_rows(Number<k>{}, results, splat<V>(static_cast<double>(sizes_.hidden)), row);
    Reduced::begin(stage, kResults, total);
    for (int64_t unit = 0; unit < padded_; unit += kLanes) {
      V u[Gu], v[Gv + 1], s[S], p[kGiven<Cell> + 1], x[kTemporaries + 1], next[S], saved[K + 1];
      V out[kTemporaries + 1];
      V part[kResults + 1];
#pragma GCC unroll 64
      for (int g = 0; g < Gu; ++g) u[g] = load<V>(rows.u + (r * Gu + g) * padded_ + unit);
#pragma GCC unroll 64
      for (int g = 0; g < Gv; ++g) v[g] = load<V>(rows.v + (r * Gv + g) * padded_ + unit);
#pragma GCC unroll 64
      for (int j = 0; j < S; ++j) s[j] = load<V>(rows.state[j] + r * rows.state_stride[j] + unit);
#pragma GCC unroll 64
      for (int j = 0; j < N; ++j) p[j] = load<V>(weights_.params + j * padded_ + unit);
      rows.drawn.load(r, {0, padded_}, unit, p + N);
#pragma GCC unroll 64
      for (int j = 0; j < kTemporaries; ++j)
        x[j] = load<V>(rows.temporaries + (r * kTemporaries + j) * padded_ + unit);
      Cell::forward(Number<k>{}, u, v, s, p, x, row, next, saved, out, part);
#pragma GCC unroll 64
      for (int j = 0; j < S; ++j)
        if (has(stage.states, j)) store(rows.next + (r * S + j) * padded_ + unit, next[j]);
#pragma GCC unroll 64
      for (int j = 0; j < K; ++j)
        if (has(stage.saved, j)) save(r, j, unit, saved[j]);
#pragma GCC unroll 64
      for (int j = 0; j < kTemporaries; ++j)
        if (has(stage.temporaries, j))
          store(rows.temporaries + (r * kTemporaries + j) * padded_ + unit, out[j]);
      Reduced::add(stage, kResults, within<V>(unit, sizes_.hidden), part, total);
    }
    Reduced::end(stage, kResults, total, own);
  }

  const RecurrenceSizes sizes_;
  const Weights weights_;
  const int64_t vectors_, padded_;
};

// The layer of a stepper at one time step. Its first part runs all units.
template <class Cell, class F>
class StagedStepper {
  using T = typename F::Number;
  using V = Vec<T>;
  using Weights = StagedWeights<Cell, F>;
  using Step = StagedStep<Cell, F>;
  static constexpr int Gu = kInputGates<Cell>, S = Cell::kStates;
  static constexpr int kLanes = lanes<V>();

 public:
  // Bytes of StepArgs::room.
  static int64_t room(const RecurrenceSizes& n, int64_t batch) {
    int64_t total = 0;
    Buffers().place(n, batch, [&](int64_t count) {
      total += count;
      return static_cast<T*>(nullptr);
    });
    return total * static_cast<int64_t>(sizeof(T));
  }

  static void run(const StepArgs& args) {
    if (args.part > 0) return;
    FlushDenormals flush;
    const RecurrenceSizes& n = args.sizes;
    const Step step(n, Weights::at(n, args.prepacked));
    const int64_t padded = Weights::padded(n);
    Buffers room;
    T* next = static_cast<T*>(args.room);
    room.place(n, args.batch, [&](int64_t count) { return std::exchange(next, next + count); });
    const int64_t width = row_words<F>(n.inputs);
    for (int64_t b = 0; b < args.batch; ++b)
      put_row<F>(room.x + b * width, n.inputs, room.x_scales + b,
                 [&](int64_t k, int live) __attribute__((always_inline)) {
                   return load_as<V>(args.x, b * args.x_row + k, live, args.x_storage);
                 });
    step.project({room.x, width, room.x_scales}, args.batch, room.u);
    room.rows.u = room.u;
    for (int s = 0; s < S; ++s) {
      room.rows.state[s] = static_cast<const T*>(s ? args.s[s] : args.h);
      room.rows.state_stride[s] = args.stride;
    }
    step.run(room.rows, args.batch, [](int64_t, int, int64_t, V) {});
    for (int64_t b = 0; b < args.batch; ++b)
      for (int s = 0; s < S; ++s)
        for (int64_t unit = 0; unit < padded; unit += kLanes) {
          const V x = load<V>(room.rows.next + (b * S + s) * padded + unit);
          store(static_cast<T*>(s ? args.s[s] : args.next_h) + b * args.stride + unit, x);
          if (s == 0 && args.y)
            store_as(args.y, b * args.y_row + unit, x, within<V>(unit, n.hidden), args.y_storage);
        }
  }

 private:
  struct Buffers {
    typename F::Word* x;
    T *x_scales, *u;
    typename Step::Rows rows;

    template <class Take>
    void place(const RecurrenceSizes& n, int64_t batch, const Take& take) {
      x = take(batch * row_words<F>(n.inputs));
      x_scales = take(F::kScaled ? batch : 0);
      u = take(batch * Gu * Weights::padded(n));
      rows.place(batch, Weights::padded(n), take);
    }
  };
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
