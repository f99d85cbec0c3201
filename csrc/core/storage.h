// How a number is stored in memory, as opposed to the type it is computed in.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTRNN_INLINE __forceinline__
#else
#define FASTRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fastrnn {

enum class Storage : int32_t {
  kSame = 0,      // stored as computed: float or double
  kBfloat16 = 1,  // computed in float
  kFloat16 = 2,   // computed in float
};

// Bytes of a number that is computed as T.
template <class T>
constexpr int64_t stored_bytes(Storage storage) {
  return storage == Storage::kSame ? sizeof(T) : 2;
}

// How a CPU kernel multiplies: the type of weights, and of the x and h that they are multiplied by.
// All else is computed in float, or in double for kDouble. fastrnn/plan has a row for each.
enum class Format : int32_t {
  kFloat = 0,
  kDouble = 1,
  kBfloat16 = 2,  // both in bfloat16, sums in float
  kInt8 = 3,      // both in 8 bits, weights with a scale per row, x and h with one per step and row
  kInt16 = 4,     // weights as in kInt8, x and h in 16 bits
};
constexpr int kFormats = 5;

constexpr int index_of(Format format) { return static_cast<int>(format); }
constexpr bool is_scaled(Format format) {
  return format == Format::kInt8 || format == Format::kInt16;
}

}  // namespace fastrnn
