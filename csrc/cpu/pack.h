// Transposes weights in registers, and packs them into panels and bands.
#pragma once

#include <cstdint>
#include <utility>

#include "core/math.h"
#include "cpu/exported.h"
#include "cpu/formats.h"
#include "cpu/tiles.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// Numbers in a block of 16 bytes, and blocks in a vector.
template <class T>
constexpr int kBlockNumbers = 16 / static_cast<int>(sizeof(T));
constexpr int kVectorBlocks = kVectorBytes / 16;

// x with block `b`, a constant once loops are unrolled, read from memory; block 0 begins a vector.
// Loads put blocks in their places, which costs less than shuffles do.
template <class T>
FASTRNN_INLINE void load_block(Vec<T>& x, int b, const T* from) {
#if defined(__AVX512F__)
  const __m128 block = _mm_loadu_ps(reinterpret_cast<const float*>(from));
  __m512 y;
  memcpy(&y, &x, sizeof y);
  y = b == 0   ? _mm512_castps128_ps512(block)
      : b == 1 ? _mm512_insertf32x4(y, block, 1)
      : b == 2 ? _mm512_insertf32x4(y, block, 2)
               : _mm512_insertf32x4(y, block, 3);
  memcpy(&x, &y, sizeof x);
#elif defined(__AVX__)
  const __m128 block = _mm_loadu_ps(reinterpret_cast<const float*>(from));
  __m256 y;
  memcpy(&y, &x, sizeof y);
  y = b == 0 ? _mm256_castps128_ps256(block) : _mm256_insertf128_ps(y, block, 1);
  memcpy(&x, &y, sizeof x);
#else
  (void)b;
  memcpy(&x, from, sizeof x);
#endif
}

// The numbers of a and b in turn, from the lower or the upper half of every block.
template <int kUpper, class V, int... l>
FASTRNN_INLINE V interleave(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int n = lanes<V>(), q = kBlockNumbers<Scalar<V>>;
  return __builtin_shufflevector(a, b,
                                 (l / q * q + kUpper * (q / 2) + l % q / 2 + (l % 2 ? n : 0))...);
}
// The same of pairs of numbers.
template <int kUpper, class V, int... l>
FASTRNN_INLINE V interleave_pairs(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int n = lanes<V>(), q = kBlockNumbers<Scalar<V>>;
  return __builtin_shufflevector(a, b, (l / q * q + kUpper * 2 + l % 2 + (l % 4 >= 2 ? n : 0))...);
}

// Transposes the squares of numbers that lie in the blocks of as many vectors.
template <class V>
FASTRNN_INLINE void transpose_blocks(V* x) {
  using Lanes = std::make_integer_sequence<int, lanes<V>()>;
  if constexpr (kBlockNumbers<Scalar<V>> == 2) {
    const V a = x[0], b = x[1];
    x[0] = interleave<0>(a, b, Lanes());
    x[1] = interleave<1>(a, b, Lanes());
  } else {
    const V low01 = interleave<0>(x[0], x[1], Lanes()), high01 = interleave<1>(x[0], x[1], Lanes());
    const V low23 = interleave<0>(x[2], x[3], Lanes()), high23 = interleave<1>(x[2], x[3], Lanes());
    x[0] = interleave_pairs<0>(low01, low23, Lanes());
    x[1] = interleave_pairs<1>(low01, low23, Lanes());
    x[2] = interleave_pairs<0>(high01, high23, Lanes());
    x[3] = interleave_pairs<1>(high01, high23, Lanes());
  }
}

// Asks for what follows in the rows: the processor's own prefetcher does not follow so many streams
// at a time.
template <class T>
FASTRNN_INLINE void prefetch_rows(const T* from, int64_t stride) {
  constexpr int n = lanes<Vec<T>>();
#pragma GCC unroll 16
  for (int l = 0; l < n; ++l) __builtin_prefetch(from + l * stride + 8 * n, 0, 2);
}

// to[c] holds column c of as many rows as a vector has lanes, a row in each lane.
template <class T>
FASTRNN_INLINE void load_transposed(const T* from, int64_t stride, Vec<T>* to) {
  constexpr int n = lanes<Vec<T>>(), q = kBlockNumbers<T>;
  if (stride * sizeof(T) % 4096 == 0) {
    // All rows fall into one set of the cache, which cannot hold them: each is read in one go.
#pragma GCC unroll 16
    for (int l = 0; l < n; ++l) {
#pragma GCC unroll 4
      for (int p = 0; p < kVectorBlocks; ++p)
        load_block<T>(to[p * q + l % q], l / q, from + l * stride + p * q);
      asm volatile("");  // compilers would order the loads by p
    }
  } else {
#pragma GCC unroll 4
    for (int p = 0; p < kVectorBlocks; ++p)
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l)
        load_block<T>(to[p * q + l % q], l / q, from + l * stride + p * q);
  }
#pragma GCC unroll 4
  for (int p = 0; p < kVectorBlocks; ++p) transpose_blocks(to + p * q);
}

// The same of `live` rows and `columns` columns, and zeros past them.
template <class T>
FASTRNN_INLINE void load_transposed(const T* from, int64_t stride, int live, int columns,
                                    Vec<T>* to) {
  constexpr int n = lanes<Vec<T>>();
  if (live == n && columns == n) {
    prefetch_rows(from, stride);
    load_transposed<T>(from, stride, to);
  } else {
    T square[n * n] = {};
    for (int l = 0; l < live; ++l) store(square + l * n, load<Vec<T>>(from + l * stride, columns));
    load_transposed<T>(square, n, to);
  }
}

// Packs vector `at` of panel[k][width vectors]: its lane l in row k is source[l * stride + k], zero
// for l >= live.
template <class T>
FASTRNN_SHARED void pack_transposed(const T* source, int64_t stride, int live, int64_t depth,
                                    T* panel, int width, int at);
#ifndef FASTRNN_PART
template <class T>
void pack_transposed(const T* source, int64_t stride, int live, int64_t depth, T* panel, int width,
                     int at) {
  using V = Vec<T>;
  constexpr int n = lanes<V>();
  for (int64_t k = 0; k < depth; k += n) {
    const int columns = static_cast<int>(depth - k < n ? depth - k : n);
    V square[n];
    load_transposed<T>(source + k, stride, live, columns, square);
    for (int c = 0; c < columns; ++c) store(panel + ((k + c) * width + at) * n, square[c]);
  }
}
#endif

// Packs `depth` rows, of which row(k, v) reads a vector, into band[words of depth][width vectors].
template <class F, class Row>
FASTRNN_INLINE void pack_rows(int64_t depth, typename F::Word* band, int width, const Row& row) {
  using V = Vec<typename F::Number>;
  for (int64_t k = 0; k < depth; k += F::kGroup)
    for (int v = 0; v < width; ++v, band += lanes<V>()) {
      V rows[F::kGroup];
      for (int j = 0; j < F::kGroup; ++j) rows[j] = k + j < depth ? row(k + j, v) : splat<V>(0);
      store(band, F::combine(rows));
    }
}

// The same for columns [0, live) of a matrix, with zeros past them.
template <class F>
void pack_columns(const typename F::Number* source, int64_t stride, int64_t live, int64_t depth,
                  typename F::Word* band, int width) {
  using V = Vec<typename F::Number>;
  constexpr int n = lanes<V>();
  pack_rows<F>(depth, band, width, [&](int64_t k, int v) __attribute__((always_inline)) {
    return load<V>(source + k * stride + v * n, within<V>(v * n, live));
  });
}

// Writes the scales of a vector of columns from `at` on, of which `live` count, and what kZero adds
// to their sums. Its words lie in `packed`, those of a row after `width` of the row before.
template <class F>
void describe_columns(const typename F::Word* packed, int64_t width, int64_t depth,
                      const float* scale, int live, const Columnwise<F>& columns, int64_t at) {
  using V = Vec<float>;
  store(columns.scale + at, load<V>(scale, live));
  for (int l = 0; l < lanes<V>(); ++l) {
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; ++k) {
      int8_t weights[F::kGroup];
      memcpy(weights, packed + k * width + l, sizeof weights);
      for (int8_t weight : weights) sum += weight;
    }
    columns.zero[at + l] = -F::kZero * sum;
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
