// The lane type Vec and every function a cell may call, written once for float, double and
// vectors of them. A function is a template on V; V is a scalar in CUDA and in tests, a Vec in the
// CPU kernels.
//
// This header is compiled several times into one library, once per instruction set, so everything
// lives in an inline namespace named by FASTRNN_ISA and is inlined: no symbol of one build may be
// picked by the linker for another. For the same reason nothing here calls inline functions of the
// C++ library. Include it as "math.h" from this folder and never put this folder on the path of
// <...> includes, where it would hide the C library's header of the same name.
//
// Flags: -ffp-contract=fast (multiply-adds become FMA), -fno-math-errno, -fno-trapping-math; never
// -ffast-math, which would break the rounding constants and NaN below.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "storage.h"

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

// Largest error of each function in units in the last place (ULP) of the true result, for every
// argument whose result is a normal number; the tests read these. Functions not listed are either
// exact, correctly rounded, or the C library's.
template <class T>
struct UlpBound {
  static constexpr double exp = 1.0, expm1 = 2.0, sigmoid = 2.0, tanh = 2.0;
};

// ---- Lanes -------------------------------------------------------------------------------------

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

// Unsigned integers of the same width and number as V's lanes.
template <class V>
using Bits = typename LaneTraits<V>::Bits;

// What comparing two V gives: bool, or integers 0 and -1 in each lane.
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

// ---- Exact or correctly rounded ----------------------------------------------------------------

template <class V>
FASTRNN_HD FASTRNN_INLINE Bits<V> sign_bit(V x) {
  using B = Bits<Scalar<V>>;
  return bit_cast<Bits<V>>(x) & (B{1} << (8 * sizeof(B) - 1));
}

// magnitude must not be negative.
template <class V>
FASTRNN_HD FASTRNN_INLINE V with_sign_of(V magnitude, V sign) {
  return bit_cast<V>(bit_cast<Bits<V>>(magnitude) | sign_bit(sign));
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V abs(V x) {
  return bit_cast<V>(bit_cast<Bits<V>>(x) & ~sign_bit(splat<V>(-0.0)));
}

// The operand order in these four is that of the x86 instructions, which return the second operand
// when one is NaN or both are zero: one instruction each where the compiler sees it, and NaN
// passes.
template <class V>
FASTRNN_HD FASTRNN_INLINE V at_least(V x, Scalar<V> low) {
  return x < low ? low - V{} : x;
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V at_most(V x, Scalar<V> high) {
  return x > high ? high - V{} : x;
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V maximum(V a, V b) {
  return where(a != a, a, where(a > b, a, b));
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V minimum(V a, V b) {
  return where(a != a, a, where(a < b, a, b));
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V relu(V x) {
  return at_least(x, 0);
}

// 0 for NaN, as torch.sign.
template <class V>
FASTRNN_HD FASTRNN_INLINE V sign(V x) {
  const V zero{}, one = splat<V>(1);
  return where(x > zero, one, zero) - where(x < zero, one, zero);
}

// Adding and taking away 2^23 (2^52) rounds to an integer; larger numbers are integers already.
template <class V>
FASTRNN_HD FASTRNN_INLINE V floor(V x) {
  const V shift = splat<V>(sizeof(Scalar<V>) == 4 ? 0x1p23 : 0x1p52);
  const V size = abs(x), one = splat<V>(1);
  const V rounded = with_sign_of((size + shift) - shift, x);
  return where(size < shift, rounded - where(rounded > x, one, V{}), x);
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V reciprocal(V x) {
  return Scalar<V>(1) / x;
}

// ---- Lane by lane through the C library --------------------------------------------------------

template <class V, class F>
FASTRNN_HD FASTRNN_INLINE V per_lane(V x, F f) {
  if constexpr (lanes<V>() == 1) {
    return f(x);
  } else {
    V y{};
    for (int i = 0; i < lanes<V>(); ++i) y[i] = f(x[i]);
    return y;
  }
}

#define FASTRNN_PER_LANE(name)              \
  template <class V>                        \
  FASTRNN_HD FASTRNN_INLINE V name(V x) {   \
    return per_lane(x, [](Scalar<V> lane) { \
      if constexpr (sizeof(lane) == 4) {    \
        return ::name##f(lane);             \
      } else {                              \
        return ::name(lane);                \
      }                                     \
    });                                     \
  }
FASTRNN_PER_LANE(log)
FASTRNN_PER_LANE(log1p)
FASTRNN_PER_LANE(sin)
FASTRNN_PER_LANE(cos)
FASTRNN_PER_LANE(erf)
FASTRNN_PER_LANE(sqrt)
#undef FASTRNN_PER_LANE

template <class V>
FASTRNN_HD FASTRNN_INLINE V rsqrt(V x) {
  return Scalar<V>(1) / sqrt(x);
}

// The exponent is a literal in a cell, so the chain of ifs is gone in the code it compiles to.
template <class V>
FASTRNN_HD FASTRNN_INLINE V pow(V x, double exponent) {
  if (exponent == 1) return x;
  if (exponent == 2) return x * x;
  if (exponent == 3) return x * x * x;
  if (exponent == 0.5) return sqrt(x);
  if (exponent == -0.5) return rsqrt(x);
  if (exponent == -1) return reciprocal(x);
  return per_lane(x, [exponent](Scalar<V> lane) {
    if constexpr (sizeof(lane) == 4) {
      return ::powf(lane, static_cast<float>(exponent));
    } else {
      return ::pow(lane, exponent);
    }
  });
}

// ---- Exponentials ------------------------------------------------------------------------------
//
// e^x = 2^n e^r with n an integer and |r| <= ln 2 / 2. Adding `round` = 1.5 * 2^23 (2^52) to
// x / ln 2 leaves n in the low bits of the sum, plus whatever small integer was added to `round`;
// shifting those bits into the place of the exponent gives the power of two.

template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kRound = 0x1.8p23f, kBias = 127;
  static constexpr float kLog2e = 0x1.715476p0f;
  // kLn2High has so few bits that n * kLn2High is exact, with FMA or without.
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kLn2 = 0x1.62e43p-1f;
  static constexpr float kOverflow = 89, kUnderflow = -104;    // e^x is inf, is 0
  static constexpr float kSmallest = -88;                      // n = -127: 2^n by bits is 0
  static constexpr float kExpm1IsMinus1 = -18, kTanhIs1 = 19;  // tanh: for 2 |x|
};

template <>
struct ExpConstants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 0x1.8p52, kBias = 1023;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e4p-1, kLn2Low = 0x1.7f7d1cf79abcap-20;
  static constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  static constexpr double kOverflow = 710, kUnderflow = -746;
  static constexpr double kSmallest = -709;
  static constexpr double kExpm1IsMinus1 = -38, kTanhIs1 = 39;
};

template <class V>
struct Reduced {
  V r;
  Bits<V> n;  // n plus the integer in `round`, in the low bits; rubbish above
};

template <class V>
FASTRNN_HD FASTRNN_INLINE Reduced<V> reduce(V x, Scalar<V> round) {
  using C = ExpConstants<Scalar<V>>;
  const V shifted = x * C::kLog2e + round;
  const V n = shifted - round;
  return {x - n * C::kLn2High - n * C::kLn2Low, bit_cast<Bits<V>>(shifted)};
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V power_of_two(Bits<V> exponent) {
  return bit_cast<V>(exponent << ExpConstants<Scalar<V>>::kMantissaBits);
}

// e^r - 1 for |r| <= ln 2 / 2: r + r^2 P(r), P by Remez for the least relative error, which is
// 1.4e-8 in float and 3.2e-17 in double.
template <class V>
FASTRNN_HD FASTRNN_INLINE V expm1_reduced(V r) {
  using S = Scalar<V>;
  const V r2 = r * r;
  V even, odd;
  if constexpr (sizeof(S) == 4) {
    even = (0x1.6ac686p-10f * r2 + 0x1.555798p-5f) * r2 + 0x1.fffffep-2f;
    odd = 0x1.122bfep-7f * r2 + 0x1.5554aap-3f;
  } else {
    even =
        (((0x1.28a2348c247a1p-22 * r2 + 0x1.a019a71e88616p-16) * r2 + 0x1.6c16c17ef4dc8p-10) * r2 +
         0x1.555555555225dp-5) *
            r2 +
        0x1.0000000000005p-1;
    odd =
        (((0x1.ae6bb0750daa2p-26 * r2 + 0x1.71de88496789dp-19) * r2 + 0x1.a01a0174dc2a0p-13) * r2 +
         0x1.111111111908bp-7) *
            r2 +
        0x1.5555555555539p-3;
  }
  return (odd * r + even) * r2 + r;
}

// 2^n is applied in two factors, so that it may lie outside the range of the type.
template <class V>
FASTRNN_HD FASTRNN_INLINE V exp(V x) {
  using C = ExpConstants<Scalar<V>>;
  const auto [r, n] =
      reduce(at_most(at_least(x, C::kUnderflow), C::kOverflow), C::kRound + 2 * C::kBias);
  const Bits<V> half = n >> 1;
  return (expm1_reduced(r) + Scalar<V>(1)) * power_of_two<V>(half) * power_of_two<V>(n - half);
}

// 2^n e^r - 1 from e^r - 1. Half of 2^n is used, which stays finite where the result does.
template <class V>
FASTRNN_HD FASTRNN_INLINE V expm1(V x) {
  using S = Scalar<V>;
  using C = ExpConstants<S>;
  const auto [r, n] =
      reduce(at_most(at_least(x, C::kExpm1IsMinus1), C::kOverflow), C::kRound + (C::kBias - 1));
  const V scale = power_of_two<V>(n);
  const V half = scale * expm1_reduced(r) + (scale - S(0.5));
  return bit_cast<V>(bit_cast<Bits<V>>(half + half) | sign_bit(x));  // -0 for -0
}

// 1 / (1 + e^-x). Where the result would be subnormal it is rounded to fewer bits or to 0.
template <class V>
FASTRNN_HD FASTRNN_INLINE V sigmoid(V x) {
  using S = Scalar<V>;
  using C = ExpConstants<S>;
  const auto [r, n] =
      reduce(-at_most(at_least(x, -C::kOverflow), -C::kSmallest), C::kRound + C::kBias);
  return S(1) / ((expm1_reduced(r) + S(1)) * power_of_two<V>(n) + S(1));
}

// E / (E + 2) with E = e^(2|x|) - 1, which keeps all digits near 0; an odd function bit by bit.
template <class V>
FASTRNN_HD FASTRNN_INLINE V tanh(V x) {
  using S = Scalar<V>;
  using C = ExpConstants<S>;
  const V y = at_most(abs(x) * S(2), C::kTanhIs1);
  const V shifted = y * C::kLog2e + (C::kRound + C::kBias);
  // ln 2 in one constant is enough: its error counts only where tanh is flat.
  const V r = y - (shifted - (C::kRound + C::kBias)) * C::kLn2;
  const V scale = power_of_two<V>(bit_cast<Bits<V>>(shifted));
  const V e = scale * expm1_reduced(r) + (scale - S(1));
  return with_sign_of(e / (e + S(2)), x);
}

// ---- State of the processor --------------------------------------------------------------------

#ifndef __CUDACC__

// While it lives, subnormal results and operands of this thread count as zero, which on x86 is
// worth a factor of a hundred where they occur. Nothing where the processor is not known.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(saved_ | kFlushToZero | kDenormalsAreZero);
  }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | kFlushToZero));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
  unsigned saved_;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
  uint64_t saved_;
#endif
};

// For the body of a spinning wait.
FASTRNN_INLINE void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// ---- Memory: the first n lanes, 0 <= n <= lanes<V>(), and not a byte beyond ---------------------

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

// To the nearest, ties to even.
template <class V>
FASTRNN_INLINE Half<V> to_bfloat16(V x) {
  const Bits<V> bits = bit_cast<Bits<V>>(x);
  const Bits<V> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow<V>(x != x ? Bits<V>{} + 0x7fc0u : rounded);
}

template <class V>
FASTRNN_INLINE V from_float16(Half<V> x) {
#if defined(__AVX512F__)
  if constexpr (lanes<V>() == 16) return _mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  if constexpr (lanes<V>() == 8) return _mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  if constexpr (lanes<V>() == 4) return vcvt_f32_f16((float16x4_t)x);
#endif
  constexpr uint32_t rebias = 112u << 23;
  const Bits<V> bits = widen<V>(x), magnitude = (bits & 0x7fffu) << 13;
  const Bits<V> normal = magnitude + rebias;
  // A subnormal number as the tail of 2^-14: no float here is subnormal, which FlushDenormals
  // would flush.
  const V tail = bit_cast<V>(normal + (1u << 23)) - 0x1p-14f;
  const Bits<V> special = normal + rebias;
  const Bits<V> unsigned_bits = magnitude < (1u << 23)       ? bit_cast<Bits<V>>(tail)
                                : magnitude >= (0x7cu << 21) ? special
                                                             : normal;
  return bit_cast<V>(unsigned_bits | (bits & 0x8000u) << 16);
}

// To the nearest, ties to even; infinite from 65520 up.
template <class V>
FASTRNN_INLINE Half<V> to_float16(V x) {
#if defined(__AVX512F__)
  if constexpr (lanes<V>() == 16) return (Half<V>)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  if constexpr (lanes<V>() == 8) return (Half<V>)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  if constexpr (lanes<V>() == 4) return (Half<V>)vcvt_f16_f32(x);
#endif
  const V size = abs(x);
  const Bits<V> bits = bit_cast<Bits<V>>(x), magnitude = bit_cast<Bits<V>>(size);
  const Bits<V> normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The sum's last place is that of a subnormal result.
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
  } else {
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
  } else {
    uint16_t lane[lanes<V>()];
    memcpy(lane, &x, sizeof x);
    copy(to, lane, n);
  }
}

// Elements index, ..., index + n - 1 of an array of the given storage. A V of double knows only
// kSame and does not look.
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

// The sum of the lanes, in pairs.
template <class V>
FASTRNN_INLINE Scalar<V> hsum(V x) {
  Scalar<V> lane[lanes<V>()];
  store(lane, x);
  for (int width = lanes<V>() / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

#endif  // __CUDACC__

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
