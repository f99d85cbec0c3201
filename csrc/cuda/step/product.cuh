// The matrix product of one step, for both directions of csrc/cuda/step: a block's tile of the
// batch times some columns of the recurrent weights, which stream through shared memory.
//
//   forward:  v[b, g, n] = sum of h[b, k] * R[g, n, k] over k < H, for every gate g
//   backward: d[b, n] = sum of dv[b, k] * R[k, n] over k < G*H, the rows of R
//
// A block has kRows rows of the batch and kUnits units n. Its sums end in shared memory, those of
// each part of the depth apart, where any thread can read them.
#pragma once

#include "core/cell.h"
#include "cuda/launch.h"
#include "cuda/platform.cuh"
#include "cuda/rows.cuh"
#include "cuda/step/tiles.cuh"

namespace fastrnn {
namespace step {

// ---- Numbers -----------------------------------------------------------------------------------

// kInstructionDepth: the terms that an instruction of the matrix units adds up, or the numbers in a
// vector of 16 bytes.
template <Precision precision>
struct PrecisionTraits {
  using Stored = float;
  using Sum = float;
  static constexpr bool kMatrixUnits = precision != Precision::kFloat32;
  static constexpr int kInstructionDepth = kMatrixUnits ? 8 : 4;
};
template <>
struct PrecisionTraits<Precision::kFloat64> {
  using Stored = double;
  using Sum = double;
  static constexpr bool kMatrixUnits = false;
  static constexpr int kInstructionDepth = 2;
};
template <class T>
struct Numbers16 {
  using Stored = T;
  using Sum = float;
  static constexpr bool kMatrixUnits = true;
  static constexpr int kInstructionDepth = 16;
};
template <>
struct PrecisionTraits<Precision::kBfloat16> : Numbers16<platform::bfloat16> {};
template <>
struct PrecisionTraits<Precision::kFloat16> : Numbers16<platform::float16> {};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// ---- Tiles -------------------------------------------------------------------------------------

// A row of the batch at a step: its operand of the product, if it has one, and its location.
template <class Stored>
struct Row {
  const Stored* operand;  // null: zeros
  int64_t at;             // its row of `y`, if it lives
  int64_t before;         // that of the step before; -1 at the first step
  bool alive;
  bool cut;
  bool outer;  // its states are those that the caller gave, or its gradients
};

// kTransposed: the weights are [depth][unit], as the backward pass needs them.
template <Precision precision, class Shape, int gates, bool transposed>
class Product {
 public:
  using Stored = typename PrecisionTraits<precision>::Stored;
  using Sum = typename PrecisionTraits<precision>::Sum;
  using TileRow = Row<Stored>;

 private:
  static constexpr int kItem = sizeof(Stored);
  static constexpr int kPiece = 16 / kItem;                       // numbers copied at a time
  static constexpr int kStageDepth = Shape::kDepthBytes / kItem;  // numbers of a stage
  static constexpr int kTerms = PrecisionTraits<precision>::kInstructionDepth;  // of an instruction
  static constexpr int kTiles = gates * Shape::kTilesN;
  // Rows of shared memory are padded so that the loads of a warp meet different banks.
  static constexpr int kPitch = kStageDepth + kPiece;
  static constexpr int kWeightRows = transposed ? kStageDepth : gates * Shape::kUnits;
  static constexpr int kWeightPitch =
      transposed ? Shape::kUnits + (kItem == 4 ? 2 : 1) * kPiece : kPitch;
  static constexpr int kStageBytes = (Shape::kRows * kPitch + kWeightRows * kWeightPitch) * kItem;
  static constexpr int kSumBytes =
      Shape::kWarpsK * gates * Shape::kRows * Shape::kUnits * static_cast<int>(sizeof(Sum));
  static constexpr int kRowBytes = Shape::kRows * static_cast<int>(sizeof(TileRow));
  static_assert(kStageDepth % (kTerms * Shape::kWarpsK) == 0, "warps share the depth evenly");
  static_assert(!transposed || gates == 1,
                "weights of all gates are one operand in the backward pass");
  static_assert(!transposed || kItem != 2 || Shape::kTilesN % 2 == 0, "loaded two at a time");
  static_assert(kRowBytes % 16 == 0 && kStageBytes % 16 == 0, "copies are aligned");

 public:
  static constexpr size_t kSharedBytes =
      kRowBytes +
      (Shape::kStages * kStageBytes > kSumBytes ? Shape::kStages * kStageBytes : kSumBytes);
  static_assert(kSharedBytes <= 99 << 10, "every device has as much");

  // `weights` are [rows][hidden] of one recurrence; `depth` is the number of terms of a sum.
  __device__ __forceinline__ Product(unsigned char* shared, const Stored* weights, int hidden,
                                     int depth, int first_unit, int rows)
      : rows_(reinterpret_cast<TileRow*>(shared)),
        stages_(shared + kRowBytes),
        weights_(weights),
        hidden_(hidden),
        depth_(depth),
        first_unit_(first_unit),
        live_rows_(rows),
        aligned_(hidden % kPiece == 0) {}

  __device__ __forceinline__ TileRow& row(int r) { return rows_[r]; }

  // Begins to copy weights if any row has an operand; else run() does nothing, and sums are zero.
  // Call it after a barrier that follows the writes of the rows.
  __device__ __forceinline__ void start() {
    const int lane = threadIdx.x % 32;
    bool any = false;
    for (int r = lane; r < Shape::kRows; r += 32) any |= rows_[r].operand != nullptr;
    count_ = __ballot_sync(0xffffffffu, any) ? (depth_ + kStageDepth - 1) / kStageDepth : 0;
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1 && i < count_; ++i) copy_weights(i);
  }

  // Computes the product. start() has begun to copy weights; operands are first read here.
  __device__ __forceinline__ void run() {
    if (count_ == 0) return;
    Sum sums[kTiles][Shape::kTilesM][4] = {};
#pragma unroll 1
    for (int i = 1 - Shape::kStages; i < count_; ++i) {
      if (i >= 0) {
        platform::copy_async_wait<Shape::kStages - 2>();
        // Stage i has arrived for all threads, and all have read the one that is overwritten next.
        __syncthreads();
      }
      const int ahead = i + Shape::kStages - 1;
      if (ahead < count_) {
        if (i >= 0) copy_weights(ahead);
        copy_rows(ahead);
      }
      platform::copy_async_commit();
      if (i >= 0) multiply(sums, stage(i), depth_ - i * kStageDepth);
    }
    __syncthreads();  // the stages make room for sums
    put(sums);
    __syncthreads();
  }

  __device__ __forceinline__ Sum sum(int g, int r, int n) const {
    if (count_ == 0) return Sum(0);
    Sum total = 0;
    for (int k = 0; k < Shape::kWarpsK; ++k) total += sums()[place(k, g, r, n)];
    return total;
  }

 private:
  __device__ __forceinline__ Stored* stage(int i) const {
    return reinterpret_cast<Stored*>(stages_ + i % Shape::kStages * kStageBytes);
  }
  __device__ __forceinline__ Sum* sums() const { return reinterpret_cast<Sum*>(stages_); }
  static __device__ __forceinline__ int place(int k, int g, int r, int n) {
    return ((k * gates + g) * Shape::kRows + r) * Shape::kUnits + n;
  }
  static __device__ __forceinline__ int warp_k() { return threadIdx.x / 32 % Shape::kWarpsK; }
  static __device__ __forceinline__ int warp_row() {
    return threadIdx.x / 32 / (Shape::kWarpsK * Shape::kWarpsN) * 16 * Shape::kTilesM;
  }
  static __device__ __forceinline__ int warp_unit() {
    return threadIdx.x / 32 / Shape::kWarpsK % Shape::kWarpsN * 8 * Shape::kTilesN;
  }

  // Copies the first `count` of kPiece numbers, and zeros past them.
  __device__ __forceinline__ void copy_piece(Stored* to, const Stored* from, int count) const {
    if (aligned_) {
      platform::copy_async16(to, count > 0 ? from : weights_, count > 0);
      return;
    }
#pragma unroll 1
    for (int e = 0; e < kPiece; ++e) {
      if (e < count) {
        to[e] = from[e];
      } else {
        platform::store(to + e, Sum(0));
      }
    }
  }

  __device__ __forceinline__ void copy_weights(int i) const {
    Stored* const to = stage(i) + Shape::kRows * kPitch;
    constexpr int kPieces = (transposed ? Shape::kUnits : kStageDepth) / kPiece;  // of a row
    const int k0 = i * kStageDepth;
#pragma unroll 2
    for (int c = threadIdx.x; c < kWeightRows * kPieces; c += Shape::kThreads) {
      const int r = c / kPieces, e = c % kPieces * kPiece;
      if (transposed) {
        const int k = k0 + r, n = first_unit_ + e;
        copy_piece(to + r * kWeightPitch + e, weights_ + int64_t{k} * hidden_ + n,
                   k < depth_ ? hidden_ - n : 0);
      } else {
        const int n = first_unit_ + r % Shape::kUnits, k = k0 + e;
        const int64_t from = int64_t{r / Shape::kUnits} * hidden_ + n;
        copy_piece(to + r * kWeightPitch + e, weights_ + from * hidden_ + k,
                   n < hidden_ ? depth_ - k : 0);
      }
    }
  }

  __device__ __forceinline__ void copy_rows(int i) const {
    Stored* const to = stage(i);
    constexpr int kPieces = kStageDepth / kPiece;
    const int k0 = i * kStageDepth;
#pragma unroll 2
    for (int c = threadIdx.x; c < Shape::kRows * kPieces; c += Shape::kThreads) {
      const int r = c / kPieces, e = c % kPieces * kPiece, k = k0 + e;
      const TileRow& row = rows_[r];
      copy_piece(to + r * kPitch + e, row.operand + k, row.operand ? depth_ - k : 0);
    }
  }

  // Adds the products of a stage, which is zero from `depth` on.
  __device__ __forceinline__ void multiply(Sum (&sums)[kTiles][Shape::kTilesM][4],
                                           const Stored* stage, int depth) const {
    const Stored* const w = stage + Shape::kRows * kPitch;
#pragma unroll 2
    for (int i = 0; i < kStageDepth / kTerms / Shape::kWarpsK; ++i) {
      const int k = (i * Shape::kWarpsK + warp_k()) * kTerms;
      if (k >= depth) break;
      if constexpr (PrecisionTraits<precision>::kMatrixUnits) {
        multiply_tiles(sums, stage, w, k);
      } else {
        multiply_vectors(sums, stage, w, k);
      }
    }
  }

  // A fragment for the matrix units, in one part or two.
  static constexpr int kParts = precision == Precision::kTf32x3 ? 2 : 1;
  template <int n>
  struct Fragment {
    uint32_t part[kParts][n];

    __device__ __forceinline__ void set(int i, uint32_t bits) {
      if constexpr (kItem == 2) {
        part[0][i] = bits;
      } else {
        const float x = bit_cast<float>(bits);
        part[0][i] = platform::to_tf32(x);
        if constexpr (kParts == 2) part[1][i] = platform::to_tf32(x - bit_cast<float>(part[0][i]));
      }
    }
  };

  static __device__ __forceinline__ void add_product(float (&sum)[4], const Fragment<4>& a,
                                                     const Fragment<2>& b) {
    if constexpr (kItem == 2) {
      platform::mma(sum, a.part[0], b.part[0], Stored{});
    } else {
      if constexpr (kParts == 2) {
        platform::mma_tf32(sum, a.part[1], b.part[0]);
        platform::mma_tf32(sum, a.part[0], b.part[1]);
      }
      platform::mma_tf32(sum, a.part[0], b.part[0]);
    }
  }

  __device__ __forceinline__ void multiply_tiles(Sum (&sums)[kTiles][Shape::kTilesM][4],
                                                 const Stored* rows, const Stored* w, int k) const {
    const int lane = threadIdx.x % 32;
    Fragment<4> a[Shape::kTilesM];
#pragma unroll
    for (int m = 0; m < Shape::kTilesM; ++m) {
      uint32_t bits[4];
      const int r = warp_row() + 16 * m + lane % 16;
      platform::ldmatrix4(bits, rows + r * kPitch + k + lane / 16 * kPiece);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m].set(i, bits[i]);
    }
#pragma unroll
    for (int q = 0; q < kTiles; q += 2) {  // two tiles of 8 units at a time
      uint32_t bits[4];
      if constexpr (!transposed) {
        const int last = q + 1 < kTiles ? q + 1 : q, tile = lane < 16 ? q : last;
        const int r = tile / Shape::kTilesN * Shape::kUnits + warp_unit() +
                      tile % Shape::kTilesN * 8 + lane % 8;
        platform::ldmatrix4(bits, w + r * kWeightPitch + k + lane / 8 % 2 * kPiece);
      } else if constexpr (kItem == 2) {
        const int n = warp_unit() + 8 * q + lane / 16 * 8;
        platform::ldmatrix4_transposed(bits, w + (k + lane % 16) * kWeightPitch + n);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int tile = q + i / 2 < kTiles ? q + i / 2 : q;
          const int r = k + lane % 4 + i % 2 * 4, n = warp_unit() + 8 * tile + lane / 4;
          bits[i] = bit_cast<uint32_t>(w[r * kWeightPitch + n]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2 && q + half < kTiles; ++half) {
        Fragment<2> b;
        b.set(0, bits[2 * half]);
        b.set(1, bits[2 * half + 1]);
#pragma unroll
        for (int m = 0; m < Shape::kTilesM; ++m) add_product(sums[q + half][m], a[m], b);
      }
    }
  }

  // Without matrix units: a thread has every fourth of 16 rows, and one of 8 units. Rows past the
  // batch cost nothing, so this suits a few rows as well.
  struct alignas(16) Vector {
    Sum x[kTerms];
  };
  __device__ __forceinline__ void multiply_vectors(Sum (&sums)[kTiles][Shape::kTilesM][4],
                                                   const Stored* rows, const Stored* w,
                                                   int k) const {
    const int lane = threadIdx.x % 32;
    Vector b[kTiles];
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
      const int n =
          q / Shape::kTilesN * Shape::kUnits + warp_unit() + q % Shape::kTilesN * 8 + lane % 8;
      if constexpr (transposed) {
#pragma unroll
        for (int x = 0; x < kTerms; ++x) b[q].x[x] = w[(k + x) * kWeightPitch + n];
      } else {
        b[q] = *reinterpret_cast<const Vector*>(w + n * kWeightPitch + k);
      }
    }
#pragma unroll
    for (int m = 0; m < Shape::kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = warp_row() + 16 * m + 4 * i;
        if (r < live_rows_) {
          const Vector a = *reinterpret_cast<const Vector*>(rows + (r + lane / 8) * kPitch + k);
#pragma unroll
          for (int q = 0; q < kTiles; ++q) {
#pragma unroll
            for (int x = 0; x < kTerms; ++x) sums[q][m][i] += a.x[x] * b[q].x[x];
          }
        }
      }
    }
  }

  __device__ __forceinline__ void put(const Sum (&sums)[kTiles][Shape::kTilesM][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
#pragma unroll
      for (int m = 0; m < Shape::kTilesM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int r = warp_row() + 16 * m, n = warp_unit() + q % Shape::kTilesN * 8;
          if constexpr (PrecisionTraits<precision>::kMatrixUnits) {
            r += lane / 4 + i / 2 * 8;
            n += lane % 4 * 2 + i % 2;
          } else {
            r += lane / 8 + 4 * i;
            n += lane % 8;
          }
          this->sums()[place(warp_k(), q / Shape::kTilesN, r, n)] = sums[q][m][i];
        }
      }
    }
  }

  TileRow* const rows_;
  unsigned char* const stages_;
  const Stored* const weights_;
  const int hidden_, depth_, first_unit_, live_rows_;
  const bool aligned_;
  int count_ = 0;  // stages that the depth takes
};

// The number of elements that a thread loads at a time: their values must fit in registers.
template <class Shape>
FASTRNN_HD constexpr int elements_at_a_time(int bytes_each) {
  int count = Shape::kPerThread;
  while (count > 1 && count * bytes_each > 128) count /= 2;
  return count;
}

// Runs the product, then finishes the elements of a block's step. An element is loaded in two
// parts: `load_early` does not depend on the previous launch and runs before the wait for it;
// `load_late` does. While a group of elements is finished, the next one is being loaded.
template <class Element, class Shape, class Product, class Early, class Late, class Finish>
__device__ __forceinline__ void pipelined(Product& product, const Early& load_early,
                                          const Late& load_late, const Finish& finish) {
  constexpr int kGroup = elements_at_a_time<Shape>(sizeof(Element));
  Element ahead[kGroup] = {};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) load_early(i, ahead[i]);
  platform::wait_for_previous_launch();
#pragma unroll
  for (int i = 0; i < kGroup; ++i) load_late(i, ahead[i]);
  product.run();
#pragma unroll 1
  for (int first = 0; first < Shape::kPerThread; first += kGroup) {
    Element now[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      now[i] = ahead[i];
      if (first + kGroup < Shape::kPerThread) {
        load_early(first + kGroup + i, ahead[i]);
        load_late(first + kGroup + i, ahead[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) finish(first + i, now[i]);
  }
}

// ---- Launches ----------------------------------------------------------------------------------

// Blocks along x: tiles of units of a tile of the batch side by side; along y: recurrences.
template <class Shape>
dim3 grid(const Sweep& sweep) {
  const int64_t units = (sweep.hidden + Shape::kUnits - 1) / Shape::kUnits;
  const int64_t rows = (sweep.batch + Shape::kRows - 1) / Shape::kRows;
  return dim3(static_cast<unsigned>(units * rows), static_cast<unsigned>(sweep.recurrences));
}

// A block's part of the sweep. A thread has kPerThread elements of it, each a unit of a row.
template <class Shape>
struct Part {
  int first_unit;
  int64_t first_row;
  int rows;

  __device__ __forceinline__ explicit Part(const Sweep& sweep) {
    const unsigned tiles =
        (static_cast<unsigned>(sweep.hidden) + Shape::kUnits - 1) / Shape::kUnits;
    first_unit = static_cast<int>(blockIdx.x % tiles) * Shape::kUnits;
    first_row = int64_t{blockIdx.x / tiles} * Shape::kRows;
    const int64_t left = sweep.batch - first_row;
    rows = left < Shape::kRows ? static_cast<int>(left) : Shape::kRows;
  }

  // Row and unit of this thread's element i, counted in the block.
  static __device__ __forceinline__ int row(int i) {
    return (threadIdx.x + i * Shape::kThreads) / Shape::kUnits;
  }
  static __device__ __forceinline__ int unit(int i) {
    return (threadIdx.x + i * Shape::kThreads) % Shape::kUnits;
  }
};

// Calls f with the plan's precision as a constant.
template <Precision precision>
struct PrecisionConstant {
  static constexpr Precision kValue = precision;
};
template <Precision precision, class F>
int if_compiled(F f) {
  if constexpr (is_compiled(precision)) return f(PrecisionConstant<precision>{});
  return kInvalidConfiguration;
}
template <class F>
int with_precision(Precision precision, F f) {
  switch (precision) {
    case Precision::kFloat64:
      return if_compiled<Precision::kFloat64>(f);
    case Precision::kFloat32:
      return if_compiled<Precision::kFloat32>(f);
    case Precision::kTf32:
      return if_compiled<Precision::kTf32>(f);
    case Precision::kTf32x3:
      return if_compiled<Precision::kTf32x3>(f);
    case Precision::kBfloat16:
      return if_compiled<Precision::kBfloat16>(f);
    case Precision::kFloat16:
      return if_compiled<Precision::kFloat16>(f);
  }
  return kInvalidValue;
}

// Calls f(cell, precision, shape) with an object of the cell, the plan's precision as a constant,
// and an object of the shape among Tiles that fits the plan's batch tile.
template <class Tiles, class F>
int with_kernel(int cell, const CudaPlan& plan, F f) {
  return with_cell(cell, [&](auto c) {
    return with_precision(plan.precision, [&](auto precision) {
      if (plan.batch_tile <= 16) return f(c, precision, typename Tiles::Small{});
      // Large tiles of sums in double would not fit in registers.
      if constexpr (decltype(precision)::kValue != Precision::kFloat64) {
        if (plan.batch_tile > 32) return f(c, precision, typename Tiles::Large{});
      }
      return f(c, precision, typename Tiles::Middle{});
    });
  });
}

}  // namespace step
}  // namespace fastrnn
