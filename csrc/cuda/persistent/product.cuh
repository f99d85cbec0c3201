// The product that every persistent kernel repeats at each step.
//
// A group of blocks computes A * B at every step. A [rows, depth] are recurrent weights, which stay
// on chip for the whole launch. B [depth, columns] changes with every step; its columns are rows of
// the batch. A block owns some rows of A and computes its part of the next B from its sums; all
// blocks of the group need all of B: see csrc/cuda/persistent/exchange.cuh.
//
// The depth is counted in bytes: a row of an mma's operands is 32 bytes for 16-bit numbers and for
// TF32 alike, a fragment of A is 16 bytes per thread, and only the mma itself knows the type. A
// k-block is 64 bytes of the depth: two mma, and one ldmatrix of B for 8 columns. In memory a row
// of B is a column of the product, with its depth side by side.
#pragma once

#include "cuda/persistent/layout.cuh"

namespace fastrnn {
namespace tile {

// ---- Numbers -----------------------------------------------------------------------------------

// How a number is stored (Stored) and multiplied (Operand, which `store` writes), with its mma.
template <Precision precision>
struct Format;

template <class T>
struct Format16 {
  using Stored = T;
  using Operand = T;
  __device__ __forceinline__ static void store(T* to, float x) { platform::store(to, x); }
  template <int kColumnTiles>
  __device__ __forceinline__ static void multiply(float (&d)[kColumnTiles][4],
                                                  const uint32_t (&a)[4],
                                                  const uint32_t (&b)[kColumnTiles][2]) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) platform::mma(d[j], a, b[j], T{});
  }
};

template <>
struct Format<Precision::kBfloat16> : Format16<platform::bfloat16> {};
template <>
struct Format<Precision::kFloat16> : Format16<platform::float16> {};

__device__ __forceinline__ float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ __forceinline__ uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <>
struct Format<Precision::kTf32> {
  using Stored = float;
  using Operand = float;
  __device__ __forceinline__ static uint32_t weight_bits(float x) { return platform::to_tf32(x); }
  __device__ __forceinline__ static void store(float* to, float x) {
    platform::store(to, as_float(platform::to_tf32(x)));
  }
  template <int kColumnTiles>
  __device__ __forceinline__ static void multiply(float (&d)[kColumnTiles][4],
                                                  const uint32_t (&a)[4],
                                                  const uint32_t (&b)[kColumnTiles][2]) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) platform::mma_tf32(d[j], a, b[j]);
  }
};

// x = big + small, both TF32; the product of the small parts is below float precision. Weights are
// kept as floats and split at each use, which takes half the memory of two parts.
template <>
struct Format<Precision::kTf32x3> {
  using Stored = float;
  using Operand = float;
  __device__ __forceinline__ static uint32_t weight_bits(float x) { return as_bits(x); }
  __device__ __forceinline__ static void store(float* to, float x) { platform::store(to, x); }
  __device__ __forceinline__ static void split(uint32_t x, uint32_t& big, uint32_t& small) {
    big = platform::to_tf32(as_float(x));
    small = platform::to_tf32(as_float(x) - as_float(big));
  }
  template <int kColumnTiles>
  __device__ __forceinline__ static void multiply(float (&d)[kColumnTiles][4],
                                                  const uint32_t (&a)[4],
                                                  const uint32_t (&b)[kColumnTiles][2]) {
    uint32_t a_big[4], a_small[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) split(platform::opaque(a[r]), a_big[r], a_small[r]);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      uint32_t b_big[2], b_small[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) split(b[j][r], b_big[r], b_small[r]);
      platform::mma_tf32(d[j], a_small, b_big);
      platform::mma_tf32(d[j], a_big, b_small);
      platform::mma_tf32(d[j], a_big, b_big);
    }
  }
};

// The 16-bit numbers k and k + 1, of some that lie `stride` apart, as a word; zero from `depth` on.
template <class T>
__device__ __forceinline__ uint32_t pair_bits(const T* from, int64_t stride, int k, int depth) {
  uint16_t low = 0, high = 0;
  if (k < depth) memcpy(&low, from + k * stride, sizeof low);
  if (k + 1 < depth) memcpy(&high, from + (k + 1) * stride, sizeof high);
  return low | static_cast<uint32_t>(high) << 16;
}

// Word w, of 32 bits, of a row of weights [depth]: one number or two, zero past its end. `aligned`
// says that a row of 16-bit numbers begins at a whole word, as it does for even depths.
template <class F, bool aligned>
__device__ __forceinline__ uint32_t row_word(const typename F::Stored* row, int w, int depth) {
  if constexpr (sizeof(typename F::Stored) == 4) {
    return w < depth ? F::weight_bits(row[w]) : 0;
  } else if constexpr (aligned) {
    return 2 * w < depth ? reinterpret_cast<const uint32_t*>(row)[w] : 0;
  } else {
    return pair_bits(row, 1, 2 * w, depth);
  }
}

// The same for a column [depth], whose numbers lie `stride` apart, from number k on.
template <class F>
__device__ __forceinline__ uint32_t column_word(const typename F::Stored* column, int64_t stride,
                                                int k, int depth) {
  if constexpr (sizeof(typename F::Stored) == 4) {
    return k < depth ? F::weight_bits(column[k * stride]) : 0;
  } else {
    return pair_bits(column, stride, k, depth);
  }
}

// ---- The product -------------------------------------------------------------------------------

// One warp's part of A * B: kTiles times 16 rows of A, a slice of the depth, and kColumnTiles times
// 8 columns.
//
// Thread l of the warp holds the rows l/4 and l/4 + 8 of tile m, and gets their sums in columns
// 8j + 2(l%4) + {0, 1}: sum[m][j][0..1] for the first row and [2..3] for the second.
//
// An mma adds up its terms in any order of the depth, as long as A and B agree. ldmatrix loads B
// from shared memory in the order that the mma is defined with. If B is read in place, a thread's
// words of two mma lie side by side instead, so that it reads 16 bytes, and four threads the 64 of
// a k-block.
template <Precision precision, int kTiles, int kColumnTiles, int kResident>
class Product {
 public:
  using Sums = float[kTiles][kColumnTiles][4];

  // Loads the weights. `word(row, w)` gives the w-th 32 bits of the depth of a row of this warp's
  // row group: one number or two, and zero past the edges. No other thread reads those that this
  // one puts into shared memory, so no barrier is needed.
  template <class Word>
  __device__ __forceinline__ void load(const Layout& at, char* shared, int warp, int slice,
                                       Word word) {
    const bool in_place = at.tile == 0;
    const int lane = threadIdx.x % kWarp;
    const int first = slice * at.depth;
    const int rest = at.k_blocks - first;
    k_blocks_ = rest < at.depth ? rest : at.depth;
    const int pitch = in_place ? at.exchanged : at.pitch;
    const int row = in_place ? lane / 4 : lane % 8, piece = in_place ? lane % 4 : lane / 8;
    operand_ = first * kKBlock + row * pitch + piece * kPiece;
    columns_ = 8 * pitch;
    whole_ = k_blocks_ -
             (first * kKBlock + k_blocks_ * kKBlock - kKBlock + piece * kPiece >= at.exchanged);
    spilled_ = reinterpret_cast<uint4*>(shared + at.weights) +
               int64_t{warp} * (at.depth - at.resident) * 2 * kTiles * kWarp + lane;
    const auto fragment = [&](int k_block, int half, int m, uint32_t (&a)[4]) {
      const int row = 16 * m + lane / 4;
      const int w =
          16 * (first + k_block) + (in_place ? lane % 4 * 4 + 2 * half : 8 * half + lane % 4);
      const int next = in_place ? w + 1 : w + 4;
      a[0] = word(row, w);
      a[1] = word(row + 8, w);
      a[2] = word(row, next);
      a[3] = word(row + 8, next);
    };
#pragma unroll
    for (int c = 0; c < kResident; ++c) {
      if (c >= k_blocks_) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) fragment(c, half, m, held_[c][half][m]);
      }
    }
    uint4* to = spilled_;
    for (int c = kResident; c < k_blocks_; ++c) {
      for (int half = 0; half < 2; ++half) {
        for (int m = 0; m < kTiles; ++m, to += kWarp) {
          uint32_t a[4];
          fragment(c, half, m, a);
          *to = make_uint4(a[0], a[1], a[2], a[3]);
        }
      }
    }
  }

  // sum = A * B, with B at `operand` in shared memory, which `exchange` lets arrive.
  template <class Exchange>
  __device__ __forceinline__ void run(const Exchange& exchange, const char* operand,
                                      Sums& sum) const {
    float d[kChains][kTiles][kColumnTiles][4] = {};
    uint32_t b[kBuffers][kColumnTiles][4];
    const char* from = operand + operand_;
    const int last = k_blocks_ - 1;
    if (kBuffers > 1) fetch(from, 0, b[0]);
#pragma unroll
    for (int c = 0; c < kResident; ++c) {
      if (c > last) break;
      // The operand of the next k-block is being loaded while this one is multiplied.
      const int next = c + kBuffers - 1;
      if (next < kResident && next <= last) fetch(from, next, b[next % kBuffers]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        multiply(d, (2 * c + half) % kChains, held_[c][half], b[c % kBuffers], half);
    }
    exchange.template arrive<true>();
    const uint4* spilled = spilled_;
#pragma unroll(precision == Precision::kTf32x3 ? 1 : 2)
    for (int c = kResident; c <= last; ++c) {
      fetch(from, c, b[0]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[kTiles][4];
        take(spilled, a);
        multiply(d, half % kChains, a, b[0], half);
      }
    }
    add_chains(d, sum);
  }

  // The same with B at `operand` in global memory (`Need::in_place`), rows `exchanged` bytes apart.
  // A load takes hundreds of cycles, so several k-blocks are in flight.
  __device__ __forceinline__ void run_in_place(const char* operand, Sums& sum) const {
    float d[kChains][kTiles][kColumnTiles][4] = {};
    uint32_t b[kAhead][kColumnTiles][4];
    const char* from = operand + operand_;
    const int last = k_blocks_ - 1;
#pragma unroll
    for (int c = 0; c < kAhead; ++c) fetch_in_place(from, c, b[c]);
#pragma unroll
    for (int c = 0; c < kResident; ++c) {
      if (c > last) break;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        multiply(d, (2 * c + half) % kChains, held_[c][half], b[c % kAhead], half);
      fetch_in_place(from, c + kAhead, b[c % kAhead]);
    }
    const uint4* spilled = spilled_;
#pragma unroll 1
    for (int first = kResident; first <= last; first += kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (first + ahead > last) break;
        auto& now = b[(kResident + ahead) % kAhead];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[kTiles][4];
          take(spilled, a);
          multiply(d, half % kChains, a, now, half);
        }
        fetch_in_place(from, first + ahead + kAhead, now);
      }
    }
    add_chains(d, sum);
  }

 private:
  // Many mma in a k-block leave no registers for a second buffer, and hide the load without one.
  static constexpr int kBuffers =
      kTiles * kColumnTiles >= 8 || precision == Precision::kTf32x3 ? 1 : 2;
  // Independent sums: the latency of an mma is about four times the interval at which independent
  // ones are issued.
  static constexpr int kChains = kTiles * kColumnTiles >= 4   ? 1
                                 : kTiles * kColumnTiles >= 2 ? 2
                                                              : 4;

  // K-blocks that are loaded ahead if the operand is read in place: 32 registers, or half of that
  // if numbers are split and sums are many.
  static constexpr bool kFull = precision == Precision::kTf32x3 && kTiles * kColumnTiles >= 8;
  static constexpr int kAhead = (kFull ? 4 : 8) / kColumnTiles;

  __device__ __forceinline__ void fetch(const char* from, int k_block,
                                        uint32_t (&b)[kColumnTiles][4]) const {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
      platform::ldmatrix4(b[j], from + k_block * kKBlock + j * columns_);
  }

  // Gives zeros past the end of the slice, or of the rows.
  __device__ __forceinline__ void fetch_in_place(const char* from, int k_block,
                                                 uint32_t (&b)[kColumnTiles][4]) const {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (k_block < whole_)
        x = platform::load_shared_by_all(from + k_block * kKBlock + j * columns_);
      b[j][0] = x.x, b[j][1] = x.y, b[j][2] = x.z, b[j][3] = x.w;
    }
  }

  // Takes the next weights from shared memory.
  __device__ __forceinline__ static void take(const uint4*& from, uint32_t (&a)[kTiles][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m, from += kWarp) {
      const uint4 x = *from;
      a[m][0] = x.x, a[m][1] = x.y, a[m][2] = x.z, a[m][3] = x.w;
    }
  }

  __device__ __forceinline__ static void add_chains(
      const float (&d)[kChains][kTiles][kColumnTiles][4], Sums& sum) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float x = d[0][m][j][r];
#pragma unroll
          for (int chain = 1; chain < kChains; ++chain) x += d[chain][m][j][r];
          sum[m][j][r] = x;
        }
      }
    }
  }

  __device__ __forceinline__ static void multiply(float (&d)[kChains][kTiles][kColumnTiles][4],
                                                  int chain, const uint32_t (&a)[kTiles][4],
                                                  const uint32_t (&b)[kColumnTiles][4], int half) {
    uint32_t part[kColumnTiles][2];
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      part[j][0] = b[j][2 * half];
      part[j][1] = b[j][2 * half + 1];
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) Format<precision>::multiply(d[chain][m], a[m], part);
  }

  uint32_t held_[kResident][2][kTiles][4];
  uint4* spilled_;  // weights in shared memory, one fragment after another; this thread's first
  int k_blocks_;    // of this slice
  int whole_;       // those of them that have a piece for this thread
  int operand_;     // offset in B at which this thread begins to read
  int columns_;     // bytes from 8 columns of B to the next
};

// Adds up the sums of the slices of a row group, always in the same order; slice 0 gets the result.
// The partial sums are overwritten only after the next operand has arrived, which slice 0 helps to
// compute from these; or, in a grid, after it has called `Exchange::sent`, as another slice may
// need nothing that slice 0 computes.
template <int kTiles, int kColumnTiles>
__device__ __forceinline__ void add_slices(const Layout& at, char* shared, int group, int slice,
                                           float (&sum)[kTiles][kColumnTiles][4]) {
  if (at.slices == 1) return;
  // Registers are few, so addresses are computed anew at each step.
  group = platform::opaque(group);
  const int lane = platform::opaque(threadIdx.x) % kWarp;
  float4* partial = reinterpret_cast<float4*>(shared + at.partial) +
                    group * (at.slices - 1) * kTiles * kColumnTiles * kWarp + lane;
  if (slice > 0) {
    float4* to = partial + (slice - 1) * kTiles * kColumnTiles * kWarp;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        to[(m * kColumnTiles + j) * kWarp] =
            make_float4(sum[m][j][0], sum[m][j][1], sum[m][j][2], sum[m][j][3]);
      }
    }
  }
  platform::named_barrier(1 + group, at.slices * kWarp);
  if (slice > 0) return;
#pragma unroll 1
  for (int other = 1; other < at.slices; ++other, partial += kTiles * kColumnTiles * kWarp) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const float4 x = partial[(m * kColumnTiles + j) * kWarp];
        sum[m][j][0] += x.x, sum[m][j][1] += x.y, sum[m][j][2] += x.z, sum[m][j][3] += x.w;
      }
    }
  }
}

// Another way to add up slices, for results that the warps of a row group share. An *item* is 8
// rows of the result in 8 columns; a thread has two columns of row lane / 4, as in the sums. All
// warps of the row group call `share_sums`; then `sum_of` gives an item to one warp.
template <int kTiles, int kColumnTiles>
__device__ __forceinline__ void share_sums(const Layout& at, char* shared, int group, int slice,
                                           const float (&sum)[kTiles][kColumnTiles][4]) {
  float2* to = reinterpret_cast<float2*>(shared + at.partial) +
               (group * at.slices + slice) * 2 * kTiles * kColumnTiles * kWarp +
               threadIdx.x % kWarp;
#pragma unroll
  for (int octet = 0; octet < 2 * kTiles; ++octet) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const int r = octet % 2 * 2;
      to[(octet * kColumnTiles + j) * kWarp] =
          make_float2(sum[octet / 2][j][r], sum[octet / 2][j][r + 1]);
    }
  }
  if (at.slices > 1) platform::named_barrier(1 + group, at.slices * kWarp);
}

template <int kItems>
__device__ __forceinline__ float2 sum_of(const Layout& at, const char* shared, int group,
                                         int item) {
  const float2* from = reinterpret_cast<const float2*>(shared + at.partial) +
                       (group * at.slices * kItems + item) * kWarp + threadIdx.x % kWarp;
  float2 sum = *from;
#pragma unroll
  for (int slice = 1; slice < kMaxWarps; ++slice) {
    if (slice < at.slices) {
      const float2 more = from[slice * kItems * kWarp];
      sum.x += more.x, sum.y += more.y;
    }
  }
  return sum;
}

}  // namespace tile
}  // namespace fastrnn
