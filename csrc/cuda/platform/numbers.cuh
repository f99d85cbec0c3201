// Conversions of stored numbers, and the GPU's own functions.
#pragma once

#include <cmath>

#include "cuda/platform/compiler.cuh"

namespace fastrnn {
namespace platform {

// Converts a stored number to the type of sums.
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

namespace detail {
template <class T>
struct Rounded {
  template <class V>
  static __device__ __forceinline__ T of(V v) {
    return static_cast<T>(v);
  }
};
template <>
struct Rounded<bfloat16> {
  static __device__ __forceinline__ bfloat16 of(float v) { return __float2bfloat16_rn(v); }
  static __device__ __forceinline__ bfloat16 of(double v) { return __double2bfloat16(v); }
};
template <>
struct Rounded<float16> {
  static __device__ __forceinline__ float16 of(float v) { return __float2half_rn(v); }
  static __device__ __forceinline__ float16 of(double v) { return __double2half(v); }
};
}  // namespace detail

// Rounds to nearest.
template <class T, class V>
__device__ __forceinline__ T from_float(V v) {
  return detail::Rounded<T>::of(v);
}

template <class T, class V>
__device__ __forceinline__ void store(T* p, V v) {
  const T rounded = from_float<T>(v);
#if defined(FASTRNN_CUDASIM)
  // GCC's thread sanitizer does not see an assignment of the result of a call to a class.
  sim::store_bits(p, rounded);
#else
  *p = rounded;
#endif
}

// Rounds to TF32, ties away from zero: the bits of a float whose last 13 are zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if defined(FASTRNN_CUDASIM)
  return sim::to_tf32(x);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// The GPU's own functions, with errors of a few units in the last place; `rough_tanh` has 11 bits.
#if defined(FASTRNN_CUDASIM)
inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float rough_tanh(float x) {
  const uint32_t bits = sim::to_tf32(std::tanh(x));
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
#else
#define FASTRNN_APPROXIMATE(name, instruction)          \
  __device__ __forceinline__ float name(float x) {      \
    float y;                                            \
    asm(instruction ".f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                           \
  }
FASTRNN_APPROXIMATE(exp2, "ex2.approx.ftz")
FASTRNN_APPROXIMATE(reciprocal, "rcp.approx.ftz")
FASTRNN_APPROXIMATE(rough_tanh, "tanh.approx")
#undef FASTRNN_APPROXIMATE
#endif
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }

// Hides a value from the optimizer: what is derived from it is computed where it is used, not
// before the loop, from where it would hold registers.
__device__ __forceinline__ uint32_t opaque(uint32_t bits) {
#if !defined(FASTRNN_CUDASIM)
  asm volatile("" : "+r"(bits));
#endif
  return bits;
}

// from + count * stride, a product of 32 bits by 32. If the compiler knew that the stride stays the
// same in a loop, it would keep 64 bits of it and multiply those.
template <class T>
__device__ __forceinline__ T* moved(T* from, int count, int stride) {
#if !defined(FASTRNN_CUDASIM)
  asm("" : "+r"(stride));
#endif
  return from + int64_t{count} * stride;
}

}  // namespace platform
}  // namespace fastrnn
