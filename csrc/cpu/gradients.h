// Gradients of weights, biases and input from du and dv of one chunk, while those are in cache.
//
// Every thread owns a range of gate rows of all weights, then a range of rows of x. No BLAS library
// is used, because x may be strided, scattered or 16 bits wide, and because libraries reach half
// the speed of these tiles on some processors.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/matrices.h"
#include "cpu/pack.h"
#include "cpu/product.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// acc[r][v] += sum over words k < depth of a[k][r] * band[k][v].
template <int kRows, int kVectors, class F>
FASTRNN_INLINE void multiply_transposed(Sums<F, kRows, kVectors>& out, const typename F::Word* a,
                                        const typename F::Word* band, int64_t depth) {
  using V = Vec<typename F::Word>;
  Sums<F, kRows, kVectors> acc;
  set_tile(acc, out);
  for (int64_t k = 0; k < depth; ++k, a += kRows, band += kVectors * lanes<V>()) {
    V row[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) row[v] = load<V>(band + v * lanes<V>());
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename F::Factor scale = F::factor(a, r);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) F::add(&acc[r][v], scale, row[v]);
    }
  }
  set_tile(out, acc);
}

constexpr int kGateRows = tile_rows(kBandVectors);

// Packs the gates of `depth` rows tile by tile: [tile][word of rows][gates of the tile]. The
// distance of rows is often a power of two, so a walk down a column would use few sets of the
// cache; a few rows at a time stay in it. Calls rows_read(k0, k1) while rows [k0, k1) are there.
template <class F, class Read>
void pack_gates(const typename F::Word* dgates, int64_t stride, Range gates, int64_t depth,
                typename F::Word* tiles, const Read& rows_read) {
  using Word = typename F::Word;
  constexpr int64_t kBlock = 16;
  static_assert(kBlock % F::kGroup == 0, "no word spans two blocks");
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    const int64_t k1 = k0 + kBlock < depth ? k0 + kBlock : depth;
    for_each_tile<kGateRows>(gates.size(), [&](int64_t first, auto count) {
      constexpr int kTile = decltype(count)::value;
      Word* to = tiles + first * words_of<F>(depth) + k0 / F::kGroup * kTile;
      for (int64_t k = k0; k < k1; k += F::kGroup, to += kTile) {
        const int64_t gate = gates.begin + first;
        if constexpr (F::kGroup == 1) {
          memcpy(to, dgates + k * stride + gate, kTile * sizeof(Word));
        } else {
          const Word* rows[F::kGroup];
          for (int j = 0; j < F::kGroup; ++j)
            rows[j] = k + j < depth ? dgates + (k + j) * stride : nullptr;
          for (int r = 0; r < kTile; ++r) to[r] = F::combine(rows, gate + r);
        }
      }
    });
    rows_read(k0, k1);
  }
}

// A tile of add_weight_gradient(): kRows rows of dw, `stride` apart, and a band of its columns, of
// which the last vector has `live`.
template <int kRows, int kVectors, class F>
__attribute__((noinline)) void add_gradient_tile(typename F::Number* dw, int64_t stride, int live,
                                                 const typename F::Word* gates,
                                                 const typename F::Word* band, int64_t depth,
                                                 bool begin) {
  using V = Vec<typename F::Number>;
  constexpr int n = lanes<V>();
  const auto lanes_of = [&](int v) { return v + 1 < kVectors ? n : live; };
  V acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = begin ? splat<V>(0) : load<V>(dw + r * stride + v * n, lanes_of(v));
  multiply_transposed<kRows, kVectors, F>(acc, gates, band, depth);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(dw + r * stride + v * n, acc[r][v], lanes_of(v));
}

// Words of packed rows that stay in the cache while all of dw is computed from them.
template <class T>
constexpr int64_t kResidentWords = (int64_t{1} << 17) / sizeof(T);

// dw[g, c] += sum over words k < depth of dgates[k, g] * rows[k, c], for g in `gates`; with
// `begin`, the sum begins at zero. dgates was packed into `tiles`; pack(column, width, band) writes
// band[k][width vectors] of the rows from `column` on. `bands` has room for kResidentWords or for
// one band, whichever is more.
template <class F, class Pack>
void add_weight_gradient(typename F::Number* dw, int64_t columns, const typename F::Word* tiles,
                         Range gates, int64_t depth, bool begin, typename F::Word* bands,
                         const Pack& pack) {
  using T = typename F::Word;
  constexpr int n = lanes<Vec<T>>();
  const int64_t vectors = (columns + n - 1) / n;
  const auto add = [&](int64_t first, auto count, int64_t vector, auto width, const T* band) {
    constexpr int kTile = decltype(count)::value, kWide = decltype(width)::value;
    const int64_t column = vector * n;
    const int live = within<Vec<T>>(column + (kWide - 1) * n, columns);
    add_gradient_tile<kTile, kWide, F>(dw + (gates.begin + first) * columns + column, columns, live,
                                       tiles + first * depth, band, depth, begin);
  };
  if (depth * vectors * n <= kResidentWords<T>) {
    // dw is far larger than what it is computed from: its rows are written one after the other.
    for_each_band(0, vectors, [&](int64_t vector, auto width) {
      pack(vector * n, width, bands + vector * n * depth);
    });
    for_each_tile<kGateRows>(gates.size(), [&](int64_t first, auto count) {
      for_each_band(0, vectors, [&](int64_t vector, auto width) {
        add(first, count, vector, width, bands + vector * n * depth);
      });
    });
  } else {
    for_each_band(0, vectors, [&](int64_t vector, auto width) {
      pack(vector * n, width, bands);
      for_each_tile<kGateRows>(gates.size(), [&](int64_t first, auto count) {
        add(first, count, vector, width, bands);
      });
    });
  }
}

// db[g] += sum over k < depth of dgates[k, g], for g in `gates`; with `begin`, the sum begins at
// zero.
template <class F>
void add_bias_gradient(typename F::Number* db, const typename F::Word* dgates, int64_t stride,
                       Range gates, int64_t depth, bool begin) {
  using T = typename F::Number;
  using V = Vec<T>;
  constexpr int n = lanes<V>();
  // As many sums as hide the time of an addition.
  for_each_band<8>(0, (gates.size() + n - 1) / n, [&](int64_t vector, auto width) {
    constexpr int kWide = decltype(width)::value;
    const int64_t first = gates.begin + vector * n;
    V sum[kWide];
    for (int v = 0; v < kWide; ++v)
      sum[v] = begin ? splat<V>(0)
                     : load<V>(db + first + v * n, within<Vec<T>>(first + v * n, gates.end));
    for (int64_t k = 0; k < depth; ++k)
      for (int v = 0; v < kWide; ++v)
        sum[v] = sum[v] + F::get(dgates + k * stride, first + v * n,
                                 within<Vec<T>>(first + v * n, gates.end));
    for (int v = 0; v < kWide; ++v)
      store(db + first + v * n, sum[v], within<Vec<T>>(first + v * n, gates.end));
  });
}

// Packs every `turns`-th column band of a row-major matrix [depth, columns], beginning with number
// `turn`; the bands lie one behind the other.
template <class F>
void pack_column_bands(const typename F::Number* matrix, int64_t columns, int64_t depth,
                       typename F::Word* bands, int32_t turn, int32_t turns) {
  constexpr int n = lanes<Vec<typename F::Number>>();
  int64_t number = 0;
  for_each_band(0, (columns + n - 1) / n, [&](int64_t vector, auto width) {
    const int64_t column = vector * n;
    if (number++ % turns == turn)
      pack_columns<F>(matrix + column, columns, columns - column, depth,
                      bands + column * words_of<F>(depth), decltype(width)::value);
  });
}

template <class F>
class GradientSweep {
  using T = typename F::Number;
  using Word = typename F::Word;
  using V = Vec<T>;

 public:
  static bool run(const GradientArgs& args, const CpuPlan& plan) {
    return run_sweep<GradientSweep>(args, plan);
  }

  GradientSweep(const GradientArgs& args, const CpuPlan& plan)
      : args_(args), plan_(plan), width_((args.inputs + kLanes - 1) / kLanes * kLanes) {
    for (int32_t p = 0; p < args.recurrences; ++p)
      if (live_rows(p) > most_rows_) most_rows_ = live_rows(p);
  }

  void place(Arena& arena) {
    places_ = arena.take<Place>(args_.recurrences * most_rows_);
    scratch_ = arena.take<Word>(plan_.threads() * scratch_of_one());
  }

  static constexpr bool kRepeatable = false;  // it adds to gradients, and waits a few times in all
  template <class Visit>
  void each_changed(const Visit&) const {}

  void thread(Member& me) const {
    const int32_t threads = plan_.threads();
    for (int32_t p = 0; p < args_.recurrences; ++p) {
      if (p % threads == me.index) find_rows(p);
      if (args_.dx && prepacks() && begins())
        pack_column_bands<F>(static_cast<const T*>(args_.recurrence[p].w_ih), args_.inputs,
                             args_.depth, bands(p), me.index, threads);
    }
    me.publish(1);
    me.wait_for_all(1);
    for (int32_t p = 0; p < args_.recurrences; ++p) {
      weights(p, me.index, scratch_ + me.index * scratch_of_one());
      if (!args_.dx) continue;
      if (p > 0) {  // recurrences may add to the same rows
        me.publish(1 + p);
        me.wait_for_all(1 + p);
      }
      const Place* places = places_ + p * most_rows_;
      const Range own = part_of(live_rows(p), threads, me.index);
      const int64_t stride = gradient_row(F::kFormat, args_.depth);
      const Word* du = static_cast<const Word*>(args_.du[p]) + own.begin * stride;
      const bool apart = args_.recurrence[p].reverse && args_.dx_reverse;
      T* const dx = static_cast<T*>(apart ? args_.dx_reverse : args_.dx);
      const void* unpacked = args_.recurrence[p].w_ih;
      const Matrix<Word> w_ih{prepacks() ? bands(p) : static_cast<const Word*>(unpacked),
                              words_of<F>(args_.depth), args_.inputs, prepacks()};
      multiply_columns<F>(du, stride, own.size(), w_ih, 0, width_ / kLanes,
                          [&](int64_t row, int64_t vector, const V* sum) {
                            const int64_t column = vector * kLanes;
                            const int live = within<Vec<T>>(column, args_.inputs);
                            T* to = dx + places[own.begin + row].row * args_.inputs + column;
                            store(to, args_.recurrences > 1 ? load<V>(to, live) + *sum : *sum,
                                  live);
                          });
    }
  }

 private:
  // The location of a live row: its first element in x, and its row.
  struct Place {
    int64_t x, row;
  };

  bool prepacks() const {
    return backward_layout(F::kFormat, plan_.weights) == WeightLayout::kPrepacked;
  }
  // Whether this chunk is the first of the backward pass.
  bool begins() const { return args_.end == args_.rows.steps; }

  Range times(int32_t p) const {
    const int64_t steps = args_.rows.steps;
    return args_.recurrence[p].reverse ? Range{steps - args_.end, steps - args_.begin}
                                       : Range{args_.begin, args_.end};
  }
  int64_t live_rows(int32_t p) const {
    const Range t = times(p);
    return args_.rows.compact_row(t.end, 0) - args_.rows.compact_row(t.begin, 0);
  }

  void find_rows(int32_t p) const {
    const Rows& rows = args_.rows;
    Place* to = places_ + p * most_rows_;
    const Range time = times(p);
    for (int64_t t = time.begin; t < time.end; ++t)
      for (int64_t i = 0; i < rows.live(t); ++i) {
        const int64_t row = rows.row(t, i);
        *to++ = {rows.packed() ? row * args_.x_row
                               : t * args_.x_step + rows.batch_index(i) * args_.x_row,
                 row};
      }
  }

  // Packs band[k][width vectors] from rows in storage; row k begins at element at(k) of `base`.
  template <class At>
  void pack_stored(const void* base, int64_t column, int64_t columns, int width, int64_t depth,
                   Word* band, const At& at) const {
    pack_rows<F>(depth, band, width, [&](int64_t k, int v) __attribute__((always_inline)) {
      const int64_t c = column + v * kLanes;
      return load_as<V>(base, at(k) + c, within<V>(c, columns), args_.storage);
    });
  }

  // The order in which a sum takes the live rows of a chunk: from `first` on, each time `direction`
  // further. It follows the backward pass from the last step to the first, so that the sum does not
  // depend on how the steps are cut into chunks.
  struct Order {
    int64_t first, direction;
    int64_t row(int64_t k) const { return first + k * direction; }
  };
  Order order(int32_t p) const {
    return args_.recurrence[p].reverse ? Order{0, 1} : Order{live_rows(p) - 1, -1};
  }

  void weights(int32_t p, int32_t index, Word* tiles) const {
    const Range gates = part_of(args_.depth, plan_.threads(), index);
    const Range recurrent = part_of(args_.recurrent_depth, plan_.threads(), index);
    const int64_t depth = live_rows(p), words = words_of<F>(depth);
    if (depth == 0 && !begins()) return;
    const Order rows = order(p);
    Word* band = tiles + words_of<F>(most_rows_) * most_gates();
    const auto first = [&](const void* const* of, int64_t row) {
      return depth ? static_cast<const Word*>(of[p]) + rows.first * row : nullptr;
    };
    const int64_t du_row = gradient_row(F::kFormat, args_.depth);
    const int64_t dv_row = gradient_row(F::kFormat, args_.recurrent_depth);
    const Word* du = first(args_.du, du_row);
    const Word* dv = first(args_.dv, dv_row);
    const int64_t stride = rows.direction * du_row, dv_stride = rows.direction * dv_row;
    const Place* places = places_ + p * most_rows_;
    const auto add_bias = [&](void* const* db, const Word* dgates, int64_t row, Range some,
                              int64_t k0, int64_t k1) {
      if (db)
        add_bias_gradient<F>(static_cast<T*>(db[p]), dgates + k0 * row, row, some, k1 - k0,
                             begins() && k0 == 0);
    };
    // Packs gates and adds to the gradient of their bias.
    const auto pack = [&](const Word* dgates, int64_t row, Range some, void* const* db) {
      pack_gates<F>(dgates, row, some, depth, tiles,
                    [&](int64_t k0, int64_t k1) { add_bias(db, dgates, row, some, k0, k1); });
      if (depth == 0) add_bias(db, dgates, row, some, 0, 0);
    };
    if (args_.dw_ih || (args_.dw_hh && du == dv))
      pack(du, stride, gates, args_.db_ih);
    else
      add_bias(args_.db_ih, du, stride, gates, 0, depth);
    if (args_.dw_ih)
      add_weight_gradient<F>(static_cast<T*>(args_.dw_ih[p]), args_.inputs, tiles, gates, words,
                             begins(), band, [&](int64_t column, auto width, Word* to) {
                               pack_stored(args_.x, column, args_.inputs, decltype(width)::value,
                                           depth, to,
                                           [&](int64_t k) { return places[rows.row(k)].x; });
                             });
    if (args_.dw_hh) {
      const int64_t Q = args_.recurrent;
      // The gradient of `some` rows of w_hh, which multiply what lies in `factors`, rows apart.
      const auto add = [&](Range some, const void* factors, int64_t row) {
        const T* factor = static_cast<const T*>(factors) + (depth ? rows.first * row : 0);
        add_weight_gradient<F>(static_cast<T*>(args_.dw_hh[p]), Q, tiles, some, words, begins(),
                               band, [&](int64_t column, auto width, Word* to) {
                                 pack_columns<F>(factor + column, rows.direction * row, Q - column,
                                                 depth, to, decltype(width)::value);
                               });
      };
      const int64_t H = args_.hidden, J = args_.sites, depth_v = args_.recurrent_depth;
      const auto site_of = [&](int64_t row) { return J ? args_.site_of[row / H] : -1; };
      // Gates that multiply the same value and follow each other are one product.
      for (int64_t begin = 0, end; begin < depth_v; begin = end) {
        const int site = site_of(begin);
        for (end = begin + H; end < depth_v && site_of(end) == site;) end += H;
        const Range some{recurrent.begin > begin ? recurrent.begin : begin,
                         recurrent.end < end ? recurrent.end : end};
        if (some.size() <= 0) continue;
        const bool packed = du == dv && some.begin == gates.begin && some.end == gates.end;
        if (!packed)
          pack(dv, dv_stride, some, args_.db_hh);
        else
          add_bias(args_.db_hh, dv, dv_stride, some, 0, depth);
        if (site < 0)
          add(some, args_.h_prev[p], Q);
        else
          add(some, static_cast<const T*>(args_.operands[p]) + site * H, J * H);
      }
    } else {
      add_bias(args_.db_hh, dv, dv_stride, recurrent, 0, depth);
    }
    if (args_.dw_hr) {
      const int64_t Q = args_.recurrent, H = args_.hidden;
      const int64_t dh_row = gradient_row(F::kFormat, Q);
      const Range columns = part_of(Q, plan_.threads(), index);
      pack(first(args_.dh, dh_row), rows.direction * dh_row, columns, nullptr);
      add_weight_gradient<F>(
          static_cast<T*>(args_.dw_hr[p]), H, tiles, columns, words, begins(), band,
          [&](int64_t column, auto width, Word* to) {
            pack_stored(args_.tape, column, H, decltype(width)::value, depth, to, [&](int64_t k) {
              const int64_t row = places[rows.row(k)].row * args_.recurrences + p;
              return (row * args_.tape_width + args_.unprojected) * H;
            });
          });
    }
  }

  Word* bands(int32_t p) const {
    return static_cast<Word*>(args_.prepacked) + p * width_ * words_of<F>(args_.depth);
  }
  // The most gates, or columns of a projected state, that one thread owns.
  int64_t most_gates() const {
    int64_t all = args_.depth > args_.recurrent ? args_.depth : args_.recurrent;
    if (args_.recurrent_depth > all) all = args_.recurrent_depth;
    return (all + plan_.threads() - 1) / plan_.threads();
  }
  int64_t scratch_of_one() const {
    const int64_t words = words_of<F>(most_rows_), one = words * kBandVectors * kLanes;
    const int64_t bands = one > kResidentWords<Word> ? one : kResidentWords<Word>;
    return words * most_gates() + bands;
  }

  static constexpr int kLanes = lanes<V>();
  const GradientArgs& args_;
  const CpuPlan& plan_;
  const int64_t width_;    // inputs, rounded up to whole vectors
  int64_t most_rows_ = 0;  // live rows of any recurrence, at most
  Place* places_ = nullptr;
  Word* scratch_ = nullptr;  // for each thread, packed gates and bands
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
