// How rows and columns are cut into tiles that fit the vector registers.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32, kAccumulators = 24;
#else
constexpr int kVectorRegisters = 16, kAccumulators = 12;
#endif
#ifndef FASTRNN_MAX_TILE_ROWS  // fewer make shorter code, which tests compile sooner
#define FASTRNN_MAX_TILE_ROWS 6
#endif
constexpr int kMaxTileRows = FASTRNN_MAX_TILE_ROWS;
constexpr int kBandVectors = 4;

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

// The same index, of which a compiler does not know how a loop changes it. Else it keeps a pointer
// for each array that the loop reads, all in memory if there are many, and moves all of them on.
FASTRNN_INLINE int64_t opaque_index(int64_t index) {
  asm("" : "+r"(index));
  return index;
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

// Calls f(vector, constant number of vectors) over the bands of vectors [begin, end): as many as
// possible of kWidest vectors, a power of two, then narrower ones.
template <int kWidest = kBandVectors, class F>
FASTRNN_INLINE void for_each_band(int64_t begin, int64_t end, const F& f) {
  int64_t v = begin;
  for (; v + kWidest <= end; v += kWidest) f(v, Constant<kWidest>{});
  if constexpr (kWidest > 1) for_each_band<kWidest / 2>(v, end, f);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
