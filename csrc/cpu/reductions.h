// Reductions over the units of a row, between two stages of a step (staged.h).
//
// Units are cut into blocks. A block gives a partial result, lane by lane, and the blocks of a row
// are taken in their order: so a row's numbers do not depend on which threads have which blocks.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/math.h"
#include "core/stages.h"
#include "cpu/contract.h"
#include "cpu/tiles.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

constexpr int64_t kBlockUnits = kPadding;
constexpr int64_t blocks_of(int64_t units) { return (units + kBlockUnits - 1) / kBlockUnits; }

// The sum of the lanes of a vector: its halves are added until one lane is left.
template <class T, int bytes = kVectorBytes>
FASTRNN_INLINE T add_lanes(typename VectorOf<T, bytes>::Type x) {
  if constexpr (bytes == 2 * sizeof(T)) {
    return x[0] + x[1];
  } else {
    typename VectorOf<T, bytes / 2>::Type halves[2];
    memcpy(halves, &x, bytes);
    return add_lanes<T, bytes / 2>(halves[0] + halves[1]);
  }
}

// The largest lane; as torch's, it is NaN if one of them is.
template <class V>
FASTRNN_INLINE Scalar<V> largest_lane(V x) {
  constexpr int n = lanes<V>();
  Scalar<V> lane[n];
  store(lane, x);
  for (int l = 1; l < n; ++l)
    if (!(lane[0] >= lane[l]) && lane[0] == lane[0]) lane[0] = lane[l];
  return lane[0];
}

// x with `fill` past the first n lanes.
template <class V>
FASTRNN_INLINE V first_lanes(V x, int n, double fill) {
  Scalar<V> lane[lanes<V>()];
  store(lane, x);
  for (int l = n; l < lanes<V>(); ++l) lane[l] = static_cast<Scalar<V>>(fill);
  return load<V>(lane);
}

// Sums and maxima. Of a row, `partial` is [blocks][results][lanes].
template <class T>
class Reductions {
  using V = Vec<T>;
  static constexpr int kLanes = lanes<V>();

 public:
  static constexpr int kMost = 64;  // bits of Stage::sums

  // Where the sums and maxima of a stage begin, for one block.
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
  // Writes what a block gives.
  static FASTRNN_INLINE void end(const Stage& stage, int results, const V* total, T* partial) {
#pragma GCC unroll 64
    for (int k = 0; k < results; ++k)
      if (has(stage.sums | stage.maxima, k)) store(partial + k * kLanes, total[k]);
  }
  // The results of a row, from those of its blocks.
  static FASTRNN_INLINE void complete(const Stage& stage, int results, int64_t blocks,
                                      const T* partial, T* to) {
#pragma GCC unroll 64
    for (int k = 0; k < results; ++k) {
      if (!has(stage.sums | stage.maxima, k)) continue;
      V total = load<V>(partial + k * kLanes);
      for (int64_t b = 1; b < blocks; ++b) {
        const V block = load<V>(partial + (b * results + k) * kLanes);
        total = has(stage.sums, k) ? total + block : maximum(total, block);
      }
      to[k] = has(stage.sums, k) ? add_lanes<T>(total) : largest_lane(total);
    }
  }
};

// The mean of several rows of `width` numbers side by side, and the sum of squared deviations from
// it. Every lane of a block has a mean of its own, and Chan's formula puts them together: squares
// of deviations do not cancel, and one exchange does for both results.
template <class T>
class DeviationsOf {
  using V = Vec<T>;
  static constexpr int kLanes = lanes<V>();

 public:
  DeviationsOf(int rows, int64_t width)
      : rows_(rows),
        width_(width),
        blocks_(blocks_of(width)),
        whole_(splat<V>(rows * (kBlockUnits / kLanes))),
        last_(numbers_of_last()),
        of_whole_(splat<V>(1) / whole_),
        of_last_(splat<V>(1) / maximum(last_, splat<V>(1))) {}

  // Writes the sum and the squared deviations of a block, [2][lanes]; source(k) begins row k of
  // kRows.
  template <int kRows, class Source>
  FASTRNN_INLINE void reduce(int64_t block, const Source& source, T* to) const {
    constexpr int kVectors = kBlockUnits / kLanes;
    const int64_t begin = block * kBlockUnits, end = begin + kBlockUnits;
    if constexpr (kRows * kVectors <= kAccumulators) {  // a whole block fits the registers
      if (end <= width_) {
        V x[kRows * kVectors];
#pragma GCC unroll 32
        for (int k = 0; k < kRows * kVectors; ++k)
          x[k] = load<V>(source(k / kVectors) + begin + k % kVectors * kLanes);
        return put(block, to, [&x](const auto& each) __attribute__((always_inline)) {
          V sum = splat<V>(0);
#pragma GCC unroll 32
          for (int k = 0; k < kRows * kVectors; ++k) sum = sum + each(x[k]);
          return sum;
        });
      }
    }
    const int64_t last = end < width_ ? end : width_;
    put(block, to, [&](const auto& each) __attribute__((always_inline)) {
      V sum = splat<V>(0);
      for (int k = 0; k < kRows; ++k) {
        const T* from = source(k);
        int64_t unit = begin;
        for (; unit + kLanes <= last; unit += kLanes) sum = sum + each(load<V>(from + unit));
        if (unit < last)
          sum = sum + first_lanes(each(load<V>(from + unit)), static_cast<int>(last - unit), 0);
      }
      return sum;
    });
  }

  // Writes the mean and the deviations of all, from those of the blocks, `stride` apart.
  FASTRNN_INLINE void complete(const T* partial, int64_t stride, T* to) const {
    V sum = load<V>(partial);
    for (int64_t b = 1; b < blocks_; ++b) sum = sum + load<V>(partial + b * stride);
    const T mean = add_lanes<T>(sum) / static_cast<T>(rows_ * width_);
    V deviations = splat<V>(0);
    for (int64_t b = 0; b < blocks_; ++b) {
      const T* from = partial + b * stride;
      const bool last = b + 1 == blocks_;
      const V own = load<V>(from) * (last ? of_last_ : of_whole_) - mean;
      deviations =
          deviations + multiply_add(own * (last ? last_ : whole_), own, load<V>(from + kLanes));
    }
    to[0] = mean;
    to[1] = add_lanes<T>(deviations);
  }

 private:
  // total(f) is the sum of f of all numbers of the block.
  template <class Total>
  FASTRNN_INLINE void put(int64_t block, T* to, const Total& total) const {
    const V sum = total([](V x) { return x; });
    const V mean = sum * (block + 1 < blocks_ ? of_whole_ : of_last_);
    store(to, sum);
    store(to + kLanes, total([mean](V x) { return (x - mean) * (x - mean); }));
  }
  V numbers_of_last() const {
    const int64_t units = width_ - (blocks_ - 1) * kBlockUnits;
    const int rest = static_cast<int>(units % kLanes);
    const V whole = splat<V>(static_cast<double>(rows_ * (units / kLanes)));
    return rest ? whole + first_lanes(splat<V>(rows_), rest, 0) : whole;
  }

  const int rows_;
  const int64_t width_, blocks_;
  const V whole_, last_;        // numbers in each lane of a block: of the last one, and of others
  const V of_whole_, of_last_;  // their inverses, or one if there are none
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
