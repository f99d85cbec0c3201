// The lane type Vec: registers of float or double, their masks, and how they are read and written.
//
// This header and math.h are compiled several times into one library, once per instruction set, so
// everything lives in an inline namespace named by FASTRNN_ISA and is inlined: the linker must not
// pick a symbol of one build for another. For the same reason, nothing here calls inline functions
// of the C++ library.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/storage.h"

#if defined(__CUDACC__)
#define FASTRNN_HD __host__ __device__
#ifndef FASTRNN_ISA
#define FASTRNN_ISA cuda
#endif
#else
#define FASTRNN_HD
#ifndef FASTRNN_ISA
#error "compile with -DFASTRNN_ISA=<name>, one name per set of instruction-set flags"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <class V>
struct LaneTraits;

template <>
struct LaneTraits<float> {
  using Scalar = float;
  using Bits = uint32_t;
  using Mask = bool;
  static constexpr int kLanes = 1;
};

template <>
struct LaneTraits<double> {
  using Scalar = double;
  using Bits = uint64_t;
  using Mask = bool;
  static constexpr int kLanes = 1;
};

#ifndef __CUDACC__

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T, int bytes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(bytes)));
};

// kVectorBytes / sizeof(T) numbers in a register, with the compiler's own operators: + - * / and
// comparisons work lane by lane, also with a scalar of type T on one side, and v[i] is a lane.
template <class T>
using Vec = typename VectorOf<T, kVectorBytes>::Type;

template <>
struct LaneTraits<Vec<float>> {
  using Scalar = float;
  using Bits = Vec<uint32_t>;
  using Mask = Vec<int32_t>;
  static constexpr int kLanes = kVectorBytes / 4;
};

template <>
struct LaneTraits<Vec<double>> {
  using Scalar = double;
  using Bits = Vec<uint64_t>;
  using Mask = Vec<int64_t>;
  static constexpr int kLanes = kVectorBytes / 8;
};

#endif  // __CUDACC__

template <class V>
using Scalar = typename LaneTraits<V>::Scalar;

// Unsigned integers, as many and as wide as V's lanes.
template <class V>
using Bits = typename LaneTraits<V>::Bits;

// The result of a comparison of two V: bool, or an integer in each lane, 0 or -1.
template <class V>
using Mask = typename LaneTraits<V>::Mask;

template <class V>
FASTRNN_HD constexpr int lanes() {
  return LaneTraits<V>::kLanes;
}

// value - 0 keeps -0 and folds to a broadcast.
template <class V>
FASTRNN_HD FASTRNN_INLINE V splat(double value) {
  return static_cast<Scalar<V>>(value) - V{};
}

template <class To, class From>
FASTRNN_HD FASTRNN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- Products and sums that are rounded once ---------------------------------------------------
//
// multiply_add is a * b + c, multiply_subtract a * b - c, subtract_product c - a * b; they round
// twice where the instruction set has none of this. Compilers contract nothing by themselves
// (-ffp-contract=off), so an expression has the same bits wherever it is inlined.

#if defined(__AVX512F__) && !defined(__CUDACC__)
#define FASTRNN_FUSED_VECTORS(avx)                                   \
  if constexpr (lanes<V>() == 16) return _mm512_##avx##_ps(a, b, c); \
  if constexpr (lanes<V>() == 8) return _mm512_##avx##_pd(a, b, c);
#elif defined(__FMA__) && !defined(__CUDACC__)
#define FASTRNN_FUSED_VECTORS(avx)                                  \
  if constexpr (lanes<V>() == 8) return _mm256_##avx##_ps(a, b, c); \
  if constexpr (lanes<V>() == 4) return _mm256_##avx##_pd(a, b, c);
#else
#define FASTRNN_FUSED_VECTORS(avx)
#endif

template <class V>
FASTRNN_HD FASTRNN_INLINE V multiply_add(V a, V b, V c) {
  FASTRNN_FUSED_VECTORS(fmadd)
#if defined(__aarch64__) && !defined(__CUDACC__)
  if constexpr (lanes<V>() == 4) return vfmaq_f32(c, a, b);
  if constexpr (lanes<V>() == 2) return vfmaq_f64(c, a, b);
#endif
#if (defined(__FMA__) || defined(__aarch64__)) && !defined(__CUDACC__)
  if constexpr (sizeof(V) == 4) return __builtin_fmaf(a, b, c);
  if constexpr (sizeof(V) == 8) return __builtin_fma(a, b, c);
#endif
  return a * b + c;
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V multiply_subtract(V a, V b, V c) {
  FASTRNN_FUSED_VECTORS(fmsub)
  return multiply_add(a, b, -c);
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V subtract_product(V a, V b, V c) {
  FASTRNN_FUSED_VECTORS(fnmadd)
  return multiply_add(-a, b, c);
}
#undef FASTRNN_FUSED_VECTORS

// ---- Masks: comparisons make them --------------------------------------------------------------

template <class V>
FASTRNN_HD FASTRNN_INLINE V where(Mask<V> mask, V yes, V no) {
  return mask ? yes : no;
}

template <class M>
FASTRNN_HD FASTRNN_INLINE M both(M a, M b) {
  return a & b;
}

template <class M>
FASTRNN_HD FASTRNN_INLINE M either(M a, M b) {
  return a | b;
}

template <class M>
FASTRNN_HD FASTRNN_INLINE M negate(M a) {
  return a == M{};
}

#ifndef __CUDACC__

// ---- Memory: touches only the first n lanes, 0 <= n <= lanes<V>() ------------------------------

template <class V>
FASTRNN_INLINE V load(const Scalar<V>* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
FASTRNN_INLINE void store(Scalar<V>* to, V x) {
  memcpy(to, &x, sizeof x);
}

// The lanes below n.
template <class V>
FASTRNN_INLINE Mask<V> first(int n) {
  V index{};
  for (int i = 0; i < lanes<V>(); ++i) index[i] = i;
  return index < static_cast<Scalar<V>>(n);
}

template <class T>
FASTRNN_INLINE void copy(T* to, const T* from, int n) {
  for (int i = 0; i < n; ++i) to[i] = from[i];
}

template <class V>
FASTRNN_INLINE V load(const Scalar<V>* from, int n) {
  if (n == lanes<V>()) return load<V>(from);
  if constexpr (lanes<V>() == 1) {
    return V{};
#if defined(__AVX512F__)
  } else if constexpr (sizeof(Scalar<V>) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
  } else {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), from);
#elif defined(__AVX__)
  } else if constexpr (sizeof(Scalar<V>) == 4) {
    return _mm256_maskload_ps(from, (__m256i)first<V>(n));
  } else {
    return _mm256_maskload_pd(from, (__m256i)first<V>(n));
#else
  } else {
    Scalar<V> lane[lanes<V>()] = {};
    copy(lane, from, n);
    return load<V>(lane);
#endif
  }
}

template <class V>
FASTRNN_INLINE void store(Scalar<V>* to, V x, int n) {
  if (n == lanes<V>()) return store(to, x);
  if constexpr (lanes<V>() == 1) {
    return;
#if defined(__AVX512F__)
  } else if constexpr (sizeof(Scalar<V>) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), x);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1), x);
#elif defined(__AVX__)
  } else if constexpr (sizeof(Scalar<V>) == 4) {
    _mm256_maskstore_ps(to, (__m256i)first<V>(n), x);
  } else {
    _mm256_maskstore_pd(to, (__m256i)first<V>(n), x);
#else
  } else {
    Scalar<V> lane[lanes<V>()];
    store(lane, x);
    copy(to, lane, n);
#endif
  }
}

// ---- 16-bit storage of float -------------------------------------------------------------------

template <class V>
struct HalfOf;
template <>
struct HalfOf<float> {
  using Type = uint16_t;
};
template <>
struct HalfOf<Vec<float>> {
  using Type = VectorOf<uint16_t, kVectorBytes / 2>::Type;
};

// The bits of one 16-bit number for each lane of V.
template <class V>
using Half = typename HalfOf<V>::Type;

template <class V>
FASTRNN_INLINE Bits<V> widen(Half<V> x) {
  if constexpr (lanes<V>() == 1) {
    return x;
  } else {
    return __builtin_convertvector(x, Bits<V>);
  }
}

template <class V>
FASTRNN_INLINE Half<V> narrow(Bits<V> x) {
  if constexpr (lanes<V>() == 1) {
    return static_cast<uint16_t>(x);
  } else {
    return __builtin_convertvector(x, Half<V>);
  }
}

template <class V>
FASTRNN_INLINE V from_bfloat16(Half<V> x) {
  return bit_cast<V>(widen<V>(x) << 16);
}

// Rounds to nearest, ties to even.
template <class V>
FASTRNN_INLINE Half<V> to_bfloat16(V x) {
  const Bits<V> bits = bit_cast<Bits<V>>(x);
  const Bits<V> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow<V>(x != x ? Bits<V>{} + 0x7fc0u : rounded);
}

template <class V>
FASTRNN_INLINE V from_float16(Half<V> x) {
#if defined(__AVX512F__)
  if constexpr (lanes<V>() == 16) return _mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#elif defined(__F16C__)
  if constexpr (lanes<V>() == 8) return _mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  if constexpr (lanes<V>() == 4) return vcvt_f32_f16((float16x4_t)x);
#endif
  constexpr uint32_t rebias = 112u << 23;
  const Bits<V> bits = widen<V>(x), magnitude = (bits & 0x7fffu) << 13;
  const Bits<V> normal = magnitude + rebias;
  // A subnormal number becomes the tail of 2^-14: no float here is subnormal, so FlushDenormals
  // does not flush it.
  const V tail = bit_cast<V>(normal + (1u << 23)) - 0x1p-14f;
  const Bits<V> special = normal + rebias;
  const Bits<V> unsigned_bits = magnitude < (1u << 23)       ? bit_cast<Bits<V>>(tail)
                                : magnitude >= (0x7cu << 21) ? special
                                                             : normal;
  return bit_cast<V>(unsigned_bits | (bits & 0x8000u) << 16);
}

// Rounds to nearest, ties to even; magnitudes of 65520 and above become infinite.
template <class V>
FASTRNN_INLINE Half<V> to_float16(V x) {
#if defined(__AVX512F__)
  if constexpr (lanes<V>() == 16)
    return (Half<V>)_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  if constexpr (lanes<V>() == 8) return (Half<V>)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  if constexpr (lanes<V>() == 4) return (Half<V>)vcvt_f16_f32(x);
#endif
  const Bits<V> bits = bit_cast<Bits<V>>(x), magnitude = bits & 0x7fffffffu;
  const V size = bit_cast<V>(magnitude);
  const Bits<V> normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The last place of this sum is the last place of a subnormal result.
  const Bits<V> subnormal = bit_cast<Bits<V>>(size + 0.5f) - (126u << 23);
  const Bits<V> infinite = Bits<V>{} + 0x7c00u, not_a_number = Bits<V>{} + 0x7e00u;
  const Bits<V> finite = size < 0x1p-14f ? subnormal : normal;
  const Bits<V> unsigned_bits = x != x ? not_a_number : size >= 0x1p16f ? infinite : finite;
  return narrow<V>(unsigned_bits | (bits >> 16 & 0x8000u));
}

template <class V>
FASTRNN_INLINE Half<V> load_half(const uint16_t* from, int n) {
  Half<V> x{};
  if (n == lanes<V>()) {
    memcpy(&x, from, sizeof x);
  } else if constexpr (lanes<V>() > 1) {
    uint16_t lane[lanes<V>()] = {};
    copy(lane, from, n);
    memcpy(&x, lane, sizeof x);
  }
  return x;
}

template <class V>
FASTRNN_INLINE void store_half(uint16_t* to, Half<V> x, int n) {
  if (n == lanes<V>()) {
    memcpy(to, &x, sizeof x);
  } else if constexpr (lanes<V>() > 1) {
    uint16_t lane[lanes<V>()];
    memcpy(lane, &x, sizeof x);
    copy(to, lane, n);
  }
}

// Elements index, ..., index + n - 1 of an array of the given storage. A V of double is always
// stored as computed and ignores `storage`.
template <class V>
FASTRNN_INLINE V load_as(const void* base, int64_t index, int n, Storage storage) {
  if constexpr (sizeof(Scalar<V>) == 4) {
    if (storage != Storage::kSame) {
      const Half<V> x = load_half<V>(static_cast<const uint16_t*>(base) + index, n);
      return storage == Storage::kBfloat16 ? from_bfloat16<V>(x) : from_float16<V>(x);
    }
  }
  return load<V>(static_cast<const Scalar<V>*>(base) + index, n);
}

template <class V>
FASTRNN_INLINE void store_as(void* base, int64_t index, V x, int n, Storage storage) {
  if constexpr (sizeof(Scalar<V>) == 4) {
    if (storage != Storage::kSame) {
      const Half<V> bits = storage == Storage::kBfloat16 ? to_bfloat16(x) : to_float16(x);
      return store_half<V>(static_cast<uint16_t*>(base) + index, bits, n);
    }
  }
  store(static_cast<Scalar<V>*>(base) + index, x, n);
}

#endif  // __CUDACC__

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
