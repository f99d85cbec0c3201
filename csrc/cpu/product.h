// The product of rows and packed weights, and the order of every sum.
//
// A forward panel holds all gates of a few vectors of units, so the accumulators of a tile of rows
// end as complete gates in registers: panel[k][unit vector][gate][lane]. Every other matrix is cut
// into bands, whose sums end as vectors of its columns: panel[k][vector][lane].
//
// A sum over `depth` products is the same number whatever tile, thread and memory layout compute
// it. It is cut into blocks, whose length follows from the depth alone. One accumulator adds the
// products of a block, from its first to its last, with one rounding each. That of the first block
// begins at what is there already (a bias, or the sum over x), the others at zero. Then the blocks
// are added in their order. So a tile of few rows, which needs more accumulators than it has
// numbers, computes several blocks at a time, a thread computes its own part of h first, and the
// rounding error of a long sum stays small.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "cpu/ahead.h"
#include "cpu/exported.h"
#include "cpu/formats.h"
#include "cpu/pack.h"
#include "cpu/tiles.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// The length of a block of a sum over `depth` products.
FASTRNN_INLINE int64_t sum_block(int64_t depth) {
  constexpr int64_t kBlocks = 4, kLeast = 32, kMost = 256, kMultiple = 16;
  const int64_t length = (depth + kBlocks * kMultiple - 1) / (kBlocks * kMultiple) * kMultiple;
  return length < kLeast ? kLeast : length > kMost ? kMost : length;
}

// A tile of sums has kRows rows of kVectors vectors.
template <class V, int kRows, int kVectors>
FASTRNN_INLINE void set_tile(V (&to)[kRows][kVectors], const V (&from)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) to[r][v] = from[r][v];
}
template <class V, int kRows, int kVectors>
FASTRNN_INLINE void clear_tile(V (&to)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) to[r][v] = V{};
}
template <class V, int kRows, int kVectors>
FASTRNN_INLINE void add_tile(V (&to)[kRows][kVectors], const V (&from)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) to[r][v] = to[r][v] + from[r][v];
}

// Packed weights: all vectors of row k of a panel or band follow each other. A row has kOf vectors,
// or as many as are read.
template <class T, int kOf = 0>
struct FASTRNN_EXPORTED Packed {
  const T* first;
  template <int kVectors>
  FASTRNN_INLINE void read(int64_t k, Vec<T> (&to)[kVectors]) const {
    constexpr int n = lanes<Vec<T>>();
    const T* row = first + k * ((kOf ? kOf : kVectors) * n);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) to[v] = load<Vec<T>>(row + v * n);
  }
};
// Vectors [kFirst, kFirst + kCount) of each row, of kOf.
template <int kFirst, int kCount, int kOf, class T>
FASTRNN_INLINE Packed<T, kOf> some_vectors(const Packed<T>& of) {
  return {of.first + kFirst * lanes<Vec<T>>()};
}

// The sums of a tile of format F: those of a vector lie side by side.
template <class F, int kRows, int kVectors>
using Sums = typename F::Sum[kRows][kVectors * F::kSums];

// The same of one block, while registers hold them.
template <class F, int kRows, int kVectors>
using BlockSums = typename F::Sum[kRows][kVectors * F::kBlockSums];

// to += the products of word `at` of rows and weights.
template <int kRows, int kVectors, class F, class Weights>
FASTRNN_INLINE void add_word(BlockSums<F, kRows, kVectors>& to, const Weights& weights,
                             const typename F::Word* const* rows, int64_t at) {
  Vec<typename F::Word> w[kVectors];
  weights.read(at, w);
  if constexpr (F::kWidens) {
    typename F::Factor a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = F::factor(rows[r], at);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) F::add(&to[r][v * F::kBlockSums], a[r], w[v]);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename F::Factor a = F::factor(rows[r], at);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) F::add(&to[r][v * F::kBlockSums], a, w[v]);
    }
  }
}

// acc[set] += block `set` of kSets, from word k on. All blocks but the last are whole; that one has
// `last` words.
template <int kSets, int kRows, int kVectors, class F, class Weights>
FASTRNN_INLINE void add_blocks(BlockSums<F, kRows, kVectors> (&acc)[kSets], const Weights& weights,
                               const typename F::Word* const* rows, int64_t k, int64_t block,
                               int64_t last) {
  const auto add = [&](int64_t at, auto& to) __attribute__((always_inline)) {
    add_word<kRows, kVectors, F>(to, weights, rows, at);
  };
  if constexpr (kSets == 1) {
    for (int64_t j = 0; j < last; ++j) add(k + j, acc[0]);
  } else {
    // The instructions around the few multiply-adds of one product would take as long as those.
#pragma GCC unroll 4
    for (int64_t j = 0; j < last; ++j)
#pragma GCC unroll 8
      for (int set = 0; set < kSets; ++set) add(k + set * block + j, acc[set]);
    for (int64_t j = last; j < block; ++j)
#pragma GCC unroll 8
      for (int set = 0; set < kSets - 1; ++set) add(k + set * block + j, acc[set]);
  }
}

// The rows of a tile whose sums of earlier blocks wait in registers, beside those of the block at
// hand, a row of weights and a factor. With fewer registers to spare, compilers keep the weights in
// memory.
constexpr int rows_held(int rows, int vectors) {
  constexpr int kSpare = 6;
  const int held = (kVectorRegisters - kSpare - 1 - vectors - rows * vectors) / vectors;
  return held < 0 ? 0 : held < rows ? held : rows;
}

// The number of blocks that a tile computes at a time. Two FMA units with a latency of four cycles
// need at least eight independent accumulators.
constexpr int block_sets(int tile) {
  return 4 * tile <= kAccumulators * 2 / 3 ? 4 : 2 * tile <= kAccumulators ? 2 : 1;
}

// Calls f(Constant<n>), n being the number of blocks in `left` products, at most kMax.
template <int kMax, class F>
FASTRNN_INLINE void with_block_count(int64_t left, int64_t block, const F& f) {
  if constexpr (kMax > 1) {
    if (left <= (kMax - 1) * block) return with_block_count<kMax - 1>(left, block, f);
  }
  f(Constant<kMax>{});
}

// The vectors of a tile that are multiplied at a time. With half of them, all sums of earlier
// blocks stay in registers: to store 64 bytes takes a Zen 4 as long as two multiply-adds. Where
// vectors are shorter, half of them would be too few chains of multiply-adds.
template <class F>
constexpr int vectors_at_once(int rows, int vectors) {
  const bool one_block = block_sets(rows * vectors * F::kBlockSums) == 1;
  const bool halves = kVectorBytes == 64 && !F::kScaled && one_block && vectors % 2 == 0;
  return halves && 2 * rows >= 8 ? 2 : vectors;
}

// Calls f(Constant<first>) for each part of kVectors vectors that has kAtOnce of them.
template <int kVectors, int kAtOnce, int kFirst = 0, class Each>
FASTRNN_INLINE void for_each_part(const Each& f) {
  f(Constant<kFirst>{});
  if constexpr (kFirst + kAtOnce < kVectors) for_each_part<kVectors, kAtOnce, kFirst + kAtOnce>(f);
}

// out += words [k0, k1) of a product of integers, whose sums have no order: a block is as long as
// its sums allow.
template <int kRows, int kVectors, class F, class Weights>
FASTRNN_INLINE void multiply_integers(Sums<F, kRows, kVectors>& out, const Weights& weights,
                                      const typename F::Word* const* rows, int64_t k0, int64_t k1,
                                      Ahead* ahead) {
  for (int64_t k = k0; k < k1; k += F::kBlock) {
    const int64_t left = k1 - k, length = left < F::kBlock ? left : F::kBlock;
    if (ahead) ahead->ask();
    BlockSums<F, kRows, kVectors> acc[1];
    clear_tile(acc[0]);
    add_blocks<1, kRows, kVectors, F>(acc, weights, rows, k, length, length);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) F::add_block(&out[r][v * F::kSums], acc[0][r][v]);
  }
}

// out[r][v] += sum over words k in [k0, k1) of rows[r][k] * weights[k][v], where a block begins at
// k0, and at k1 unless the sum ends there. A large tile asks for what lies `ahead`.
template <int kRows, int kVectors, class F,
          int kSets = block_sets(kRows * kVectors * F::kBlockSums), class Weights>
FASTRNN_INLINE void multiply(Sums<F, kRows, kVectors>& out, const Weights& weights,
                             const typename F::Word* const* rows, int64_t k0, int64_t k1,
                             int64_t block, Ahead* ahead = nullptr) {
  if constexpr (F::kWidens) {
    multiply_integers<kRows, kVectors, F>(out, weights, rows, k0, k1, ahead);
  } else if constexpr (F::kScaled && kSets == 1) {
    // Sums of integers have no order, so they need no blocks.
    if (ahead) ahead->ask();
    Sums<F, kRows, kVectors> acc[1];
    set_tile(acc[0], out);
    add_blocks<1, kRows, kVectors, F>(acc, weights, rows, k0, k1 - k0, k1 - k0);
    set_tile(out, acc[0]);
  } else if constexpr (kSets == 1) {
    if (k0 >= k1) return;
    constexpr int kHeld = rows_held(kRows, kVectors * F::kSums);
    Sums<F, kRows, kVectors> acc[1], before;
    // The sums of the other rows wait in memory.
    const auto wait = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = kHeld; r < kRows; ++r) asm("" : "+m"(before[r]));
    };
    if (k0) {
      set_tile(before, out);
      clear_tile(acc[0]);
    } else {
      set_tile(acc[0], out);
    }
    for (int64_t k = k0;;) {
      const int64_t left = k1 - k;
      if (ahead) ahead->ask();
      add_blocks<1, kRows, kVectors, F>(acc, weights, rows, k, block, left < block ? left : block);
      if (k) {
        wait();
        add_tile(acc[0], before);
      }
      if (left <= block) break;
      set_tile(before, acc[0]);
      wait();
      clear_tile(acc[0]);
      k += block;
    }
    set_tile(out, acc[0]);
  } else {
    for (int64_t k = k0; k < k1;) {
      const int64_t left = k1 - k;
      with_block_count<kSets>(left, block, [&](auto count) __attribute__((always_inline)) {
        constexpr int kCount = decltype(count)::value;
        const int64_t last = left - (kCount - 1) * block;
        Sums<F, kRows, kVectors> acc[kCount];
        set_tile(acc[0], out);
        if (k) clear_tile(acc[0]);
#pragma GCC unroll 8
        for (int set = 1; set < kCount; ++set) clear_tile(acc[set]);
        add_blocks<kCount, kRows, kVectors, F>(acc, weights, rows, k, block,
                                               last < block ? last : block);
        if (k) add_tile(acc[0], out);
#pragma GCC unroll 8
        for (int set = 1; set < kCount; ++set) add_tile(acc[0], acc[set]);
        set_tile(out, acc[0]);
        k += kCount * block;
      });
    }
  }
}

// multiply() of vectors [kFirst, kFirst + kAtOnce) of a tile of kVectors, with as many blocks at a
// time as the tile has.
template <int kFirst, int kAtOnce, int kVectors, class F, int kRows, class Weights>
FASTRNN_INLINE void multiply_part(typename F::Sum (&out)[kRows][kAtOnce * F::kSums],
                                  const Weights& weights, const typename F::Word* const* rows,
                                  int64_t k0, int64_t k1, int64_t block, Ahead* ahead = nullptr) {
  multiply<kRows, kAtOnce, F, block_sets(kRows * kVectors * F::kBlockSums)>(
      out, some_vectors<kFirst, kAtOnce, kVectors>(weights), rows, k0, k1, block, ahead);
}

// The sums of the blocks in [k0, k1), at most two and not the first of all, each on its own.
template <int kRows, int kVectors, class F, class Weights>
FASTRNN_INLINE void multiply_apart(Sums<F, kRows, kVectors> (&out)[2], const Weights& weights,
                                   const typename F::Word* const* rows, int64_t k0, int64_t k1,
                                   int64_t block) {
  if constexpr (block_sets(kRows * kVectors * F::kSums) > 1) {
    if (k1 - k0 > block) {
      Sums<F, kRows, kVectors> acc[2];
      clear_tile(acc[0]);
      clear_tile(acc[1]);
      add_blocks<2, kRows, kVectors, F>(acc, weights, rows, k0, block, k1 - k0 - block);
      set_tile(out[0], acc[0]);
      set_tile(out[1], acc[1]);
      return;
    }
  }
  for (int n = 0; k0 < k1; ++n, k0 += block) {
    Sums<F, kRows, kVectors> acc[1];
    clear_tile(acc[0]);
    add_blocks<1, kRows, kVectors, F>(acc, weights, rows, k0, block,
                                      k1 - k0 < block ? k1 - k0 : block);
    set_tile(out[n], acc[0]);
  }
}

// Weights of kVectors vectors of units in torch's layout: `first[v]` is the row of the first unit
// of vector v, `live[v]` its number of units; rows are `stride` apart.
template <class T, int kVectors>
struct Unpacked {
  const T* first[kVectors];
  int live[kVectors];
  int64_t stride;
};

// sum[r] += products [begin, end) of rows[r] and `live` rows of weights in torch's layout, `stride`
// apart. A square of weights is transposed in registers and serves all rows.
template <int kRows, class T>
FASTRNN_SHARED void add_squares(Vec<T> (&sum)[kRows], const T* weights, int64_t stride, int live,
                                const T* const* rows, int64_t begin, int64_t end);

// multiply() of weights in torch's layout.
template <int kRows, int kVectors, class T>
__attribute__((noinline)) void multiply_unpacked(Vec<T> (&out)[kRows][kVectors],
                                                 const Unpacked<T, kVectors>& weights,
                                                 const T* const* rows, int64_t k0, int64_t k1,
                                                 int64_t block) {
  using V = Vec<T>;
  for (int64_t begin = k0; begin < k1; begin += block) {
    const int64_t end = k1 - begin < block ? k1 : begin + block;
    for (int v = 0; v < kVectors; ++v) {
      V sum[kRows];
      for (int r = 0; r < kRows; ++r) sum[r] = begin ? splat<V>(0) : out[r][v];
      add_squares<kRows, T>(sum, weights.first[v], weights.stride, weights.live[v], rows, begin,
                            end);
      for (int r = 0; r < kRows; ++r) out[r][v] = begin ? out[r][v] + sum[r] : sum[r];
    }
  }
}

#ifndef FASTRNN_PART

// add_squares() of some rows or columns of weights.
template <int kRows, class T>
__attribute__((noinline)) void add_partial_squares(Vec<T> (&sum)[kRows], const T* weights,
                                                   int64_t stride, int live, const T* const* rows,
                                                   int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int n = lanes<V>();
  for (int64_t k = begin; k < end; k += n) {
    const int columns = end - k < n ? static_cast<int>(end - k) : n;
    V square[n];
    load_transposed<T>(weights + k, stride, live, columns, square);
    for (int c = 0; c < columns; ++c)
      for (int r = 0; r < kRows; ++r)
        sum[r] = multiply_add(broadcast<V>(rows[r][k + c]), square[c], sum[r]);
  }
}

template <int kRows, class T>
void add_squares(Vec<T> (&sum)[kRows], const T* weights, int64_t stride, int live,
                 const T* const* rows, int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int n = lanes<V>();
  const int64_t whole = live == n ? begin + (end - begin) / n * n : begin;
  V own[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) own[r] = sum[r];
  for (int64_t k = begin; k < whole; k += n) {
    V square[n];
    prefetch_rows(weights + k, stride);
    load_transposed<T>(weights + k, stride, square);
#pragma GCC unroll 16
    for (int c = 0; c < n; ++c)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        own[r] = multiply_add(broadcast<V>(rows[r][k + c]), square[c], own[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = own[r];
  if (whole < end) add_partial_squares<kRows, T>(sum, weights, stride, live, rows, whole, end);
}

#endif

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
