// The product of rows and a matrix whose columns are summed, as that of gradients and weights.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "cpu/ahead.h"
#include "cpu/exported.h"
#include "cpu/formats.h"
#include "cpu/product.h"
#include "cpu/tiles.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// A matrix [depth words, width] whose columns are summed over its rows: bands of it that were
// packed, or rows as they lie.
template <class T>
struct Matrix {
  const T* data;
  int64_t depth;
  int64_t width;
  bool packed;
};

// Vectors of columns of a matrix as it lies; the last has `live` columns.
template <class T>
struct FASTRNN_EXPORTED Columns {
  const T* first;
  int64_t stride;
  int live;
  template <int kVectors>
  FASTRNN_INLINE void read(int64_t k, Vec<T> (&to)[kVectors]) const {
    constexpr int n = lanes<Vec<T>>();
    const T* row = first + k * stride;
#pragma GCC unroll 16
    for (int v = 0; v + 1 < kVectors; ++v) to[v] = load<Vec<T>>(row + v * n);
    to[kVectors - 1] = load<Vec<T>>(row + (kVectors - 1) * n, live);
  }
};
template <int kFirst, int kCount, int kOf, class T>
FASTRNN_INLINE Columns<T> some_vectors(const Columns<T>& of) {
  constexpr int n = lanes<Vec<T>>();
  return {of.first + kFirst * n, of.stride, kFirst + kCount < kOf ? n : of.live};
}

// out = rows * weights. One copy serves all callers: inlined, it would be most of the library.
template <int kRows, int kVectors, class F, class Weights>
FASTRNN_SHARED void product(Sums<F, kRows, kVectors>& out, const Weights& weights,
                            const typename F::Word* const* rows, int64_t depth, Ahead* ahead);

// The widest band of a matrix as it lies for a tile of rows: its rows are far apart in memory, so
// it costs less to read much of each.
constexpr int widest_band(int rows) {
  int width = 1;
  while (2 * width * rows <= kAccumulators) width *= 2;
  return width;
}

// The number of times that multiply_columns() asks for what lies ahead, if its tiles are large.
template <class F>
int64_t asks_of(int64_t count, int64_t depth, int64_t vectors) {
  constexpr int64_t kRows = tile_rows(kBandVectors * F::kBlockSums);
  constexpr int64_t kParts = kBandVectors / vectors_at_once<F>(kRows, kBandVectors);
  const int64_t block = F::kScaled ? depth : sum_block(depth);
  const int64_t blocks = depth ? (depth + block - 1) / block : 0;
  return (count + kRows - 1) / kRows * (vectors / kBandVectors) * kParts * blocks;
}

// Calls f(row, vector, sums) with the sums over words k < depth of rows[row * stride + k] *
// matrix[k][vector], for `count` rows and the vectors [begin, end) of columns. Meanwhile it asks
// for what lies `ahead`.
template <class F, class Each>
FASTRNN_INLINE void multiply_columns(const typename F::Word* rows, int64_t stride, int64_t count,
                                     const Matrix<typename F::Word>& matrix, int64_t begin,
                                     int64_t end, const Each& f, Ahead* ahead = nullptr) {
  using T = typename F::Word;
  using V = Vec<T>;
  constexpr int n = lanes<V>(), kRows = tile_rows(kBandVectors * F::kBlockSums);
  const int64_t depth = matrix.depth;
  const auto sum = [&](int64_t first, auto tile, int64_t vector, auto width, const auto& band) {
    constexpr int kTile = decltype(tile)::value, kWide = decltype(width)::value;
    Sums<F, kTile, kWide> acc;
    const T* from[kTile];
    for (int r = 0; r < kTile; ++r) from[r] = rows + (first + r) * stride;
    product<kTile, kWide, F>(acc, band, from, depth, ahead);
    for (int r = 0; r < kTile; ++r)
      for (int v = 0; v < kWide; ++v) f(first + r, vector + v, &acc[r][v * F::kSums]);
  };
  if (matrix.packed) {
    for_each_band(begin, end, [&](int64_t vector, auto width) {
      const Packed<T> band{matrix.data + vector * n * depth};
      for_each_tile<kRows>(
          count, [&](int64_t first, auto tile) { sum(first, tile, vector, width, band); });
    });
  } else if constexpr (!F::kConverts) {
    for_each_tile<kMaxTileRows>(count, [&](int64_t first, auto tile) {
      for_each_band<widest_band(decltype(tile)::value)>(
          begin, end, [&](int64_t vector, auto width) {
            const int64_t column = vector * n, last = column + (decltype(width)::value - 1) * n;
            const Columns<T> band{matrix.data + column, matrix.width,
                                  within<V>(last, matrix.width)};
            sum(first, tile, vector, width, band);
          });
    });
  }
}

// Rows of whole vectors of numbers, `stride` apart, that products are written to, after those of
// `addend` are added to them, if there are any.
template <class T>
struct FASTRNN_EXPORTED Destination {
  T* first;
  int64_t stride;
  const T* addend = nullptr;
  int64_t addend_stride = 0;
};

// Writes `count` rows times the vectors [begin, end) of columns of a matrix. Meanwhile it asks for
// what lies `ahead`.
template <class F>
FASTRNN_SHARED void multiply_into(const Destination<typename F::Number>& to,
                                  const WordRows<F>& rows, int64_t count,
                                  const Matrix<typename F::Word>& matrix,
                                  const Columnwise<F>& columns, int64_t begin, int64_t end,
                                  Ahead* ahead = nullptr);

// The same of a matrix [width, depth] in torch's layout, whose rows are summed.
template <class T>
FASTRNN_SHARED void multiply_rows_into(const Destination<T>& to, const T* rows, int64_t stride,
                                       int64_t count, const Matrix<T>& matrix, int64_t begin,
                                       int64_t end);

#ifndef FASTRNN_PART

template <class T>
void multiply_rows_into(const Destination<T>& to, const T* rows, int64_t stride, int64_t count,
                        const Matrix<T>& matrix, int64_t begin, int64_t end) {
  constexpr int n = lanes<Vec<T>>();
  for (int64_t vector = begin; vector < end; ++vector) {
    const int64_t column = vector * n;
    const int live = within<Vec<T>>(column, matrix.width);
    const Unpacked<T, 1> weights{
        {matrix.data + (live ? column : 0) * matrix.depth}, {live}, matrix.depth};
    for_each_tile<kMaxTileRows>(count, [&](int64_t first, auto tile) {
      constexpr int kTile = decltype(tile)::value;
      Vec<T> sum[kTile][1];
      clear_tile(sum);
      const T* from[kTile];
      for (int r = 0; r < kTile; ++r) from[r] = rows + (first + r) * stride;
      multiply_unpacked<kTile, 1, T>(sum, weights, from, 0, matrix.depth, sum_block(matrix.depth));
      for (int r = 0; r < kTile; ++r) store(to.first + (first + r) * to.stride + column, sum[r][0]);
    });
  }
}

template <class F>
void multiply_into(const Destination<typename F::Number>& destination, const WordRows<F>& words,
                   int64_t count, const Matrix<typename F::Word>& matrix,
                   const Columnwise<F>& columns, int64_t begin, int64_t end, Ahead* ahead) {
  using V = Vec<typename F::Number>;
  // Copies: for all that a compiler knows, stores may change what a reference leads to.
  const Destination<typename F::Number> to = destination;
  const WordRows<F> rows = words;
  multiply_columns<F>(
      rows.first, rows.stride, count, matrix, begin, end,
      [&](int64_t r, int64_t vector, const auto* sum) {
        const int64_t column = vector * lanes<V>();
        V all = end_product<F>(sum, columns, column, rows.scale(r));
        if (to.addend) all = all + load<V>(to.addend + r * to.addend_stride + column);
        store(to.first + r * to.stride + column, all);
      },
      ahead);
}

template <int kRows, int kVectors, class F, class Weights>
void product(Sums<F, kRows, kVectors>& out, const Weights& weights,
             const typename F::Word* const* rows, int64_t depth, Ahead* ahead) {
  constexpr int kAtOnce = vectors_at_once<F>(kRows, kVectors);
  for_each_part<kVectors, kAtOnce>([&](auto from) __attribute__((always_inline)) {
    constexpr int kFirst = decltype(from)::value;
    Sums<F, kRows, kAtOnce> acc;
    clear_tile(acc);
    multiply_part<kFirst, kAtOnce, kVectors, F>(acc, weights, rows, 0, depth, sum_block(depth),
                                                ahead);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kAtOnce * F::kSums; ++v) out[r][kFirst * F::kSums + v] = acc[r][v];
  });
}

#endif

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
