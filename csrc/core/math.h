// All functions that a cell may call. Each is written once, as a template on V: a scalar in CUDA
// and in tests, a Vec in the CPU kernels. Call them inside namespace fastrnn, where they hide C's
// functions of the same names.
//
// Include this as "core/math.h". Never put its folder on the path of <...> includes, where it would
// hide the C library's header.
//
// Flags: -ffp-contract=off (multiply_add says where to fuse), -fno-math-errno, -fno-trapping-math;
// never -ffast-math, which would break the rounding constants and NaN below.
#pragma once

#include <cmath>

#include "core/vec.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// Largest error, in units in the last place (ULP) of the true result if that is a normal number, on
// every instruction set. Measured over all arguments of type float and, for double, over samples of
// every binade; the tests check these bounds. The other functions are exact, correctly rounded, a
// few correctly rounded operations, or the C library's.
template <class T>
struct UlpBound;
template <>
struct UlpBound<float> {
  static constexpr double exp = 1.1, expm1 = 1.9, sigmoid = 2.5, tanh = 2.7;
};
template <>
struct UlpBound<double> {
  static constexpr double exp = 1.1, expm1 = 2.5, sigmoid = 2.5, tanh = 2.8;
};

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

// a > b ? a : b and a < b ? a : b, which give b when either is NaN or both are zero. x86 has
// instructions that do this, but compilers do not find them for vectors.
template <class V>
FASTRNN_HD FASTRNN_INLINE V greater(V a, V b) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  if constexpr (lanes<V>() == 16) return _mm512_maskz_max_ps(0xffff, a, b);
  if constexpr (lanes<V>() == 8) return _mm512_maskz_max_pd(0xff, a, b);
#elif defined(__AVX__) && !defined(__CUDACC__)
  if constexpr (lanes<V>() == 8) return _mm256_max_ps(a, b);
  if constexpr (lanes<V>() == 4) return _mm256_max_pd(a, b);
#elif defined(__SSE2__) && !defined(__CUDACC__)
  if constexpr (lanes<V>() == 4) return _mm_max_ps(a, b);
  if constexpr (lanes<V>() == 2) return _mm_max_pd(a, b);
#endif
  return where(a > b, a, b);
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V smaller(V a, V b) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  if constexpr (lanes<V>() == 16) return _mm512_maskz_min_ps(0xffff, a, b);
  if constexpr (lanes<V>() == 8) return _mm512_maskz_min_pd(0xff, a, b);
#elif defined(__AVX__) && !defined(__CUDACC__)
  if constexpr (lanes<V>() == 8) return _mm256_min_ps(a, b);
  if constexpr (lanes<V>() == 4) return _mm256_min_pd(a, b);
#elif defined(__SSE2__) && !defined(__CUDACC__)
  if constexpr (lanes<V>() == 4) return _mm_min_ps(a, b);
  if constexpr (lanes<V>() == 2) return _mm_min_pd(a, b);
#endif
  return where(a < b, a, b);
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V at_least(V x, Scalar<V> low) {
  return greater(low - V{}, x);
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V at_most(V x, Scalar<V> high) {
  return smaller(high - V{}, x);
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V maximum(V a, V b) {
  return where(a != a, a, greater(a, b));
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V minimum(V a, V b) {
  return where(a != a, a, smaller(a, b));
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V relu(V x) {
  return at_least(x, 0);
}

// 0 for NaN, like torch.sign.
template <class V>
FASTRNN_HD FASTRNN_INLINE V sign(V x) {
  const V zero{}, one = splat<V>(1);
  return where(x > zero, one, zero) - where(x < zero, one, zero);
}

// Adding and subtracting 2^23 (double: 2^52) rounds to an integer; larger numbers are integers.
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

// ---- Lane by lane through the C library (sqrt becomes an instruction) --------------------------

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

// The exponent is a literal in a cell, so the compiler removes the chain of ifs.
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
// e^x = 2^n e^r with n an integer and |r| <= ln 2 / 2. Adding `round` = 1.5 * 2^23 (double: 2^52)
// to x / ln 2 leaves n in the low bits of the sum, plus any small integer that was added to
// `round`; shifting those bits into the exponent field gives the power of two.

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
  static constexpr float kOverflow = 89, kUnderflow = -104;    // e^x is infinite, 0
  static constexpr float kSmallest = -88;                      // n = -127: 2^n from its bits is 0
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
  Bits<V> n;  // n plus the integer in `round`, in the low bits; garbage above
};

template <class V>
FASTRNN_HD FASTRNN_INLINE Reduced<V> reduce(V x, Scalar<V> round) {
  using C = ExpConstants<Scalar<V>>;
  const V shifted = multiply_add(x, splat<V>(C::kLog2e), splat<V>(round));
  const V n = shifted - round;
  const V high = subtract_product(n, splat<V>(C::kLn2High), x);
  return {subtract_product(n, splat<V>(C::kLn2Low), high), bit_cast<Bits<V>>(shifted)};
}

template <class V>
FASTRNN_HD FASTRNN_INLINE V power_of_two(Bits<V> exponent) {
  return bit_cast<V>(exponent << ExpConstants<Scalar<V>>::kMantissaBits);
}

// c0 + c1 x + c2 x^2 + ...
template <class V, class... C>
FASTRNN_HD FASTRNN_INLINE V polynomial(V x, Scalar<V> c0, C... more) {
  if constexpr (sizeof...(more) == 0) {
    return c0 - V{};
  } else {
    return multiply_add(polynomial(x, more...), x, splat<V>(c0));
  }
}

// e^r - 1 for |r| <= ln 2 / 2: r + r^2 P(r), P by Remez for the least relative error, which is
// 1.4e-8 in float and 3.2e-17 in double.
template <class V>
FASTRNN_HD FASTRNN_INLINE V expm1_reduced(V r) {
  const V r2 = r * r;
  V even, odd;
  if constexpr (sizeof(Scalar<V>) == 4) {
    even = polynomial(r2, 0x1.fffffep-2f, 0x1.555798p-5f, 0x1.6ac686p-10f);
    odd = polynomial(r2, 0x1.5554aap-3f, 0x1.122bfep-7f);
  } else {
    even = polynomial(r2, 0x1.0000000000005p-1, 0x1.555555555225dp-5, 0x1.6c16c17ef4dc8p-10,
                      0x1.a019a71e88616p-16, 0x1.28a2348c247a1p-22);
    odd = polynomial(r2, 0x1.5555555555539p-3, 0x1.111111111908bp-7, 0x1.a01a0174dc2a0p-13,
                     0x1.71de88496789dp-19, 0x1.ae6bb0750daa2p-26);
  }
  return multiply_add(multiply_add(odd, r, even), r2, r);
}

// 2^n is applied as two factors, because it may lie outside the range of the type.
template <class V>
FASTRNN_HD FASTRNN_INLINE V exp(V x) {
  using C = ExpConstants<Scalar<V>>;
  const auto [r, n] =
      reduce(at_most(at_least(x, C::kUnderflow), C::kOverflow), C::kRound + 2 * C::kBias);
  const Bits<V> half = n >> 1;
  return (expm1_reduced(r) + Scalar<V>(1)) * power_of_two<V>(half) * power_of_two<V>(n - half);
}

// 2^n e^r - 1 from e^r - 1, with half of 2^n, which is finite whenever the result is.
template <class V>
FASTRNN_HD FASTRNN_INLINE V expm1(V x) {
  using S = Scalar<V>;
  using C = ExpConstants<S>;
  const auto [r, n] =
      reduce(at_most(at_least(x, C::kExpm1IsMinus1), C::kOverflow), C::kRound + (C::kBias - 1));
  const V scale = power_of_two<V>(n);
  const V half = multiply_add(scale, expm1_reduced(r), scale - S(0.5));
  return bit_cast<V>(bit_cast<Bits<V>>(half + half) | sign_bit(x));  // -0 for -0
}

// 1 / (1 + e^-x). A result that would be subnormal may be 0.
template <class V>
FASTRNN_HD FASTRNN_INLINE V sigmoid(V x) {
  using S = Scalar<V>;
  using C = ExpConstants<S>;
  const auto [r, n] =
      reduce(-at_most(at_least(x, -C::kOverflow), -C::kSmallest), C::kRound + C::kBias);
  return S(1) / multiply_add(expm1_reduced(r) + S(1), power_of_two<V>(n), splat<V>(1));
}

// E / (E + 2) with E = e^(2|x|) - 1, which keeps all digits near 0; odd to the last bit.
template <class V>
FASTRNN_HD FASTRNN_INLINE V tanh(V x) {
  using S = Scalar<V>;
  using C = ExpConstants<S>;
  const V y = at_most(abs(x) * S(2), C::kTanhIs1);
  const V shifted = multiply_add(y, splat<V>(C::kLog2e), splat<V>(C::kRound + C::kBias));
  // ln 2 in one constant is enough: its error counts only where tanh is flat.
  const V r = subtract_product(shifted - (C::kRound + C::kBias), splat<V>(C::kLn2), y);
  const V scale = power_of_two<V>(bit_cast<Bits<V>>(shifted));
  const V e = multiply_add(scale, expm1_reduced(r), scale - S(1));
  return with_sign_of(e / (e + S(2)), x);
}

// ---- State of the processor --------------------------------------------------------------------

#ifndef __CUDACC__

// While it lives, this thread takes subnormal operands and results for zero: an operation on them
// may take a hundred cycles. Does nothing on processors other than x86-64 and AArch64.
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

#endif  // __CUDACC__

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
