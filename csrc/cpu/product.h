// Weights packed into panels, and the product that reads them.
//
// A forward panel holds all gates of a few vectors of units, so the accumulators of a tile of rows
// end as complete gates in registers: panel[k][unit vector][gate][lane]. Every other matrix is cut
// into bands, whose sums end as vectors of its columns: panel[k][vector][lane].
#pragma once

#include <cstdint>
#include <utility>

#include "core/math.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;  // of 32 vector registers
#else
constexpr int kAccumulators = 12;  // of 16
#endif
constexpr int kMaxTileRows = 6;

constexpr int tile_rows(int vectors) {
  int rows = kAccumulators / vectors;
  return rows < 1 ? 1 : rows > kMaxTileRows ? kMaxTileRows : rows;
}

// The number of lanes of the vector at `at` that lie within `width`.
template <class V>
FASTRNN_INLINE int within(int64_t at, int64_t width) {
  const int64_t left = width - at;
  return static_cast<int>(left <= 0 ? 0 : left < lanes<V>() ? left : lanes<V>());
}

template <class V>
FASTRNN_INLINE V broadcast(Scalar<V> value) {
  return value - V{};  // x - 0 is x, so this is a broadcast and nothing else
}

// acc[r][v] += sum over k in [k0, k1) of rows[r][k] * panel[k][v].
//
// Two FMA units with a latency of four cycles need at least eight independent accumulators: a tile
// with fewer gets several sets of them, over k.
template <int kRows, int kVectors, class T>
FASTRNN_INLINE void multiply_block(Vec<T> (&out)[kRows][kVectors], const T* panel,
                                   const T* const* rows, int64_t k0, int64_t k1) {
  using V = Vec<T>;
  constexpr int kWidth = kVectors * lanes<V>();
  constexpr int kTile = kRows * kVectors;
  constexpr int kSets = kTile == 1                   ? 8
                        : kTile == 2                 ? 4
                        : kTile <= kAccumulators / 4 ? 3
                        : kTile <= kAccumulators / 2 ? 2
                                                     : 1;
  V acc[kSets][kRows][kVectors];  // indexed by constants only, so that it stays in registers
#pragma GCC unroll 8
  for (int set = 0; set < kSets; ++set)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[set][r][v] = set ? splat<V>(0) : out[r][v];
  const auto add = [&](int64_t k, V(&to)[kRows][kVectors]) __attribute__((always_inline)) {
    const T* w = panel + k * kWidth;
    V band[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) band[v] = load<V>(w + v * lanes<V>());
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V a = broadcast<V>(rows[r][k]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) to[r][v] = to[r][v] + a * band[v];
    }
  };
  int64_t k = k0;
  for (; k + kSets <= k1; k += kSets)
#pragma GCC unroll 8
    for (int set = 0; set < kSets; ++set) add(k + set, acc[set]);
  for (; k < k1; ++k) add(k, acc[0]);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      out[r][v] = acc[0][r][v];
#pragma GCC unroll 8
      for (int set = 1; set < kSets; ++set) out[r][v] = out[r][v] + acc[set][r][v];
    }
}

// The same for a sum of any length: a long sum is split into blocks, which keeps its rounding error
// small.
constexpr int64_t kSumBlock = 256;

template <int kRows, int kVectors, class T>
__attribute__((noinline)) void multiply_blocks(Vec<T> (&out)[kRows][kVectors], const T* panel,
                                               const T* const* rows, int64_t k0, int64_t k1) {
  for (int64_t k = k0, end; k < k1; k = end) {
    end = k1 - k < 2 * kSumBlock ? k1 : k + kSumBlock;
    Vec<T> part[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) part[r][v] = splat<Vec<T>>(0);
    multiply_block<kRows, kVectors, T>(part, panel, rows, k, end);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) out[r][v] = out[r][v] + part[r][v];
  }
}

template <int kRows, int kVectors, class T>
FASTRNN_INLINE void multiply(Vec<T> (&out)[kRows][kVectors], const T* panel, const T* const* rows,
                             int64_t k0, int64_t k1) {
  if (k1 - k0 < 2 * kSumBlock)
    multiply_block<kRows, kVectors, T>(out, panel, rows, k0, k1);
  else
    multiply_blocks<kRows, kVectors, T>(out, panel, rows, k0, k1);
}

// Lane l is the dot product of row l of `w` with `x` over [k0, k1); zero for l >= live.
template <class T>
Vec<T> dot_products(const T* w, int64_t stride, int live, const T* x, int64_t k0, int64_t k1) {
  using V = Vec<T>;
  constexpr int n = lanes<V>();
  constexpr int kAtOnce = 4;  // rows of w that share a load of x
  T sums[n + kAtOnce] = {};
  for (int l = 0; l < live; l += kAtOnce) {
    V part[kAtOnce];
    const T* row[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) {
      part[j] = splat<V>(0);
      row[j] = w + (l + j < live ? l + j : live - 1) * stride;
    }
    int64_t k = k0;
    for (; k + n <= k1; k += n) {
      const V a = load<V>(x + k);
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) part[j] = part[j] + a * load<V>(row[j] + k);
    }
    if (k < k1) {
      const int left = static_cast<int>(k1 - k);
      const V a = load<V>(x + k, left);
      for (int j = 0; j < kAtOnce; ++j) part[j] = part[j] + a * load<V>(row[j] + k, left);
    }
    for (int j = 0; j < kAtOnce && l + j < live; ++j) sums[l + j] = hsum(part[j]);
  }
  return load<V>(sums);
}

// Calls f(Constant<n>), which makes n, 1 <= n <= kMax, a compile-time constant.
template <int n>
struct Constant {
  static constexpr int value = n;
};
template <int kMax, class F>
FASTRNN_INLINE void with_constant(int64_t n, const F& f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, f);
  }
  f(Constant<kMax>{});
}

// Cuts `n` rows into the fewest tiles of at most kMax rows, all nearly equal; calls f(first, rows)
// for each.
template <int kMax, class F>
FASTRNN_INLINE void for_each_tile(int64_t n, const F& f) {
  const int64_t tiles = (n + kMax - 1) / kMax;
  int64_t first = 0;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t rows = (n - first + left - 1) / left;
    with_constant<kMax>(rows, [&](auto count) { f(first, count); });
    first += rows;
  }
}

constexpr int kBandVectors = 4;

// Calls f(vector, constant number of vectors) over the bands of vectors [begin, end).
template <class F>
FASTRNN_INLINE void for_each_band(int64_t begin, int64_t end, const F& f) {
  int64_t v = begin;
  for (; v + kBandVectors <= end; v += kBandVectors) f(v, Constant<kBandVectors>{});
  if (v + 2 <= end) {
    f(v, Constant<2>{});
    v += 2;
  }
  if (v < end) f(v, Constant<1>{});
}

// Calls f(row, vector, sum over k < depth of rows[row * stride + k] * matrix[k][vector]) for
// `count` rows and the vectors [begin, end), whose bands were packed.
template <class T, class F>
FASTRNN_INLINE void multiply_bands(const T* rows, int64_t stride, int64_t count, const T* bands,
                                   int64_t depth, int64_t begin, int64_t end, const F& f) {
  using V = Vec<T>;
  for_each_band(begin, end, [&](int64_t vector, auto width) {
    constexpr int kWide = decltype(width)::value;
    for_each_tile<tile_rows(kBandVectors)>(count, [&](int64_t first, auto tile) {
      constexpr int kTile = decltype(tile)::value;
      V acc[kTile][kWide];
      const T* from[kTile];
      for (int r = 0; r < kTile; ++r) {
        from[r] = rows + (first + r) * stride;
        for (int v = 0; v < kWide; ++v) acc[r][v] = splat<V>(0);
      }
      multiply<kTile, kWide, T>(acc, bands + vector * lanes<V>() * depth, from, 0, depth);
      for (int r = 0; r < kTile; ++r)
        for (int v = 0; v < kWide; ++v) f(first + r, vector + v, acc[r][v]);
    });
  });
}

// One round of a transposition in registers: for each i whose bit kStride is clear, vectors i and
// i + kStride exchange the lanes whose bit kStride differs from their own.
template <int kStride, class V, int... l>
FASTRNN_INLINE void exchange_pair(V& low, V& high, std::integer_sequence<int, l...>) {
  constexpr int n = lanes<V>();
  const V a = low, b = high;
  low = __builtin_shufflevector(a, b, (l & kStride ? n + l - kStride : l)...);
  high = __builtin_shufflevector(a, b, (l & kStride ? n + l : l + kStride)...);
}

// Transposes a block of lanes x lanes numbers, in log2(lanes) rounds.
template <int kStride, class V>
FASTRNN_INLINE void transpose(V* block) {
  constexpr int n = lanes<V>();
  if constexpr (kStride < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & kStride))
        exchange_pair<kStride>(block[i], block[i + kStride], std::make_integer_sequence<int, n>());
    transpose<2 * kStride>(block);
  }
}

// Packs vector `at` of panel[k][width vectors]: its lane l in row k is source[l * stride + k], zero
// for l >= live.
template <class T>
void pack_transposed(const T* source, int64_t stride, int live, int64_t depth, T* panel, int width,
                     int at) {
  using V = Vec<T>;
  constexpr int n = lanes<V>();
  for (int64_t k = 0; k < depth; k += n) {
    const int columns = static_cast<int>(depth - k < n ? depth - k : n);
    V block[n];
    for (int l = 0; l < n; ++l) {
      // The processor's own prefetcher does not follow so many streams at a time.
      if (l < live) __builtin_prefetch(source + l * stride + k + 8 * n);
      block[l] = l < live ? load<V>(source + l * stride + k, columns) : splat<V>(0);
    }
    transpose<1>(block);
    for (int c = 0; c < columns; ++c) store(panel + ((k + c) * width + at) * n, block[c]);
  }
}

// Packs columns [0, live) of `depth` rows into panel[k][width vectors], with zeros past them.
template <class T>
void pack_columns(const T* source, int64_t stride, int64_t live, int64_t depth, T* panel,
                  int width) {
  using V = Vec<T>;
  constexpr int n = lanes<V>();
  for (int64_t k = 0; k < depth; ++k)
    for (int v = 0; v < width; ++v) {
      store(panel + (k * width + v) * n,
            load<V>(source + k * stride + v * n, within<V>(v * n, live)));
    }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
