// Formats whose weights are integers of 8 bits, and whose rows are integers of 8 or 16.
//
// Sums are exact, so every instruction set gives the same products, as far as it has the format:
// with VNNI one instruction adds four products to a sum; without it four do, and three more widen a
// word of weights. value() depends on a sum alone, and not on the parts in which it was computed.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "cpu/exported.h"
#include "cpu/formats.h"

#if defined(__AVX2__)

namespace fastrnn {
inline namespace FASTRNN_ISA {

struct FASTRNN_EXPORTED Integers : Words {
  using Sum = VectorOf<int32_t, kVectorBytes>::Type;
  static constexpr int kGroup = 4;
  static constexpr bool kScaled = true;

 protected:
  // Calls put(k, integers) for n numbers, the largest of which becomes `levels`; returns the row's
  // scale, which is NaN if a number is not finite.
  template <class Load, class Put>
  static FASTRNN_INLINE float quantize(int64_t n, const Load& load, float levels, const Put& put) {
    constexpr int kLanes = lanes<V>();
    const auto each = [&](const auto& f) __attribute__((always_inline)) {
      const int64_t whole = n / kLanes * kLanes;
      for (int64_t k = 0; k < whole; k += kLanes) f(k, load(k, kLanes));
      if (whole < n) f(whole, load(whole, static_cast<int>(n - whole)));
    };
    // The bits of magnitudes are in the order of the numbers, with those that are not finite last.
    Sum most{};
    each([&](int64_t, V x) __attribute__((always_inline)) {
      const Sum bits = (Sum)x & 0x7fffffff;
      most = most > bits ? most : bits;
    });
    int32_t bits = 0;
    for (int l = 0; l < kLanes; ++l) bits = bits > most[l] ? bits : most[l];
    if (bits >= 0x7f800000) return __builtin_nanf("");
    constexpr float kLeast = 1e-30f;  // its inverse is finite
    const float largest = bit_cast<float>(bits);
    const float magnitude = largest < kLeast ? kLeast : largest;
    const V inverse = splat<V>(levels / magnitude);
    each([&](int64_t k, V x) __attribute__((always_inline)) { put(k, nearest(x * inverse)); });
    return magnitude / levels;
  }

  static FASTRNN_INLINE Sum nearest(V x) {
#if defined(__AVX512F__)
    return (Sum)_mm512_cvtps_epi32(x);
#else
    return (Sum)_mm256_cvtps_epi32(x);
#endif
  }
  // The number high * 256 + low, for any parts of the same sum.
  static FASTRNN_INLINE V combined(Sum high, Sum low) {
    return multiply_add<V>(__builtin_convertvector(high + (low >> 8), V), splat<V>(256),
                           __builtin_convertvector(low & 255, V));
  }
};

#if defined(FASTRNN_VNNI)

// Rows of unsigned numbers, of which kZero stands for zero: where sums begin takes its share off.
struct FASTRNN_EXPORTED Int8 : Integers {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr bool kWidens = false;
  static constexpr int kRowWords = 1, kSums = 1, kBlockSums = 1;
  static constexpr int32_t kZero = 128;

  struct Factor {
    __m512i x;
  };
  static FASTRNN_INLINE Factor factor(const float* row, int64_t at) {
    return {(__m512i)word(row, at)};
  }
  static FASTRNN_INLINE void add(Sum* to, const Factor& a, V w) {
    to[0] = (Sum)_mm512_dpbusd_epi32((__m512i)to[0], a.x, (__m512i)w);
  }
  static FASTRNN_INLINE V value(const Sum* sum) { return __builtin_convertvector(sum[0], V); }

  // Converts n numbers; returns the row's scale.
  template <class Load>
  static FASTRNN_INLINE float convert(float* to, int64_t n, const Load& load) {
    return quantize(n, load, 127, [&](int64_t k, Sum q) {
      const __m128i x = _mm512_cvtepi32_epi8((__m512i)(q + kZero));
      memcpy(to + k / 4, &x, sizeof x);
    });
  }
};

// The same with rows in 16 bits: a high and a low byte, each with a sum of its own.
struct FASTRNN_EXPORTED Int16 : Integers {
  static constexpr Format kFormat = Format::kInt16;
  static constexpr bool kWidens = false;
  static constexpr int kRowWords = 2, kSums = 2, kBlockSums = 2;
  static constexpr int32_t kZero = 128;  // of the high byte

  struct Factor {
    __m512i high, low;
  };
  static FASTRNN_INLINE Factor factor(const float* row, int64_t at) {
    return {(__m512i)word(row, 2 * at), (__m512i)word(row, 2 * at + 1)};
  }
  static FASTRNN_INLINE void add(Sum* to, const Factor& a, V w) {
    to[0] = (Sum)_mm512_dpbusd_epi32((__m512i)to[0], a.high, (__m512i)w);
    to[1] = (Sum)_mm512_dpbusd_epi32((__m512i)to[1], a.low, (__m512i)w);
  }
  static FASTRNN_INLINE V value(const Sum* sum) { return combined(sum[0], sum[1]); }
  template <class Load>
  static FASTRNN_INLINE float convert(float* to, int64_t n, const Load& load) {
    // The largest magnitude that stays within 16 bits when it is rounded.
    return quantize(n, load, 32639, [&](int64_t k, Sum q) {
      const __m512i x = (__m512i)(q + kZero * 256);
      const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8));
      const __m128i low = _mm512_cvtepi32_epi8(x);
      const __m128i words[2] = {_mm_unpacklo_epi32(high, low), _mm_unpackhi_epi32(high, low)};
      memcpy(to + k / 2, words, sizeof words);
    });
  }
};

#else

// Rows of signed numbers in 16 bits, of which an instruction multiplies pairs. Weights are widened
// in registers, once for all rows of a tile.
struct FASTRNN_EXPORTED Int8 : Integers {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr bool kWidens = true;
  static constexpr int kRowWords = 2, kSums = 1, kBlockSums = 1;
  static constexpr int64_t kBlock = int64_t{1} << 30;
  static constexpr int32_t kZero = 0;

  // Numbers 0 and 2, and 1 and 3, of a word.
  struct Factor {
    Sum even, odd;
  };
  static FASTRNN_INLINE Factor factor(const float* row, int64_t at) {
    return {word(row, 2 * at), word(row, 2 * at + 1)};
  }
  static FASTRNN_INLINE void add(Sum* to, const Factor& a, V w) {
#if defined(__AVX512F__)
    const __m512i odd = _mm512_srai_epi16((__m512i)w, 8);
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8);
    to[0] += (Sum)_mm512_madd_epi16((__m512i)a.even, even);
    to[0] += (Sum)_mm512_madd_epi16((__m512i)a.odd, odd);
#else
    const __m256i odd = _mm256_srai_epi16((__m256i)w, 8);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8);
    to[0] += (Sum)_mm256_madd_epi16((__m256i)a.even, even);
    to[0] += (Sum)_mm256_madd_epi16((__m256i)a.odd, odd);
#endif
  }
  // Adds the sum of a block to those of a product.
  static FASTRNN_INLINE void add_block(Sum* to, Sum block) { to[0] += block; }
  static FASTRNN_INLINE V value(const Sum* sum) { return __builtin_convertvector(sum[0], V); }

  // Converts n numbers; returns the row's scale.
  template <class Load>
  static FASTRNN_INLINE float convert(float* to, int64_t n, const Load& load) {
    return convert_to(to, n, load, 127);
  }

 protected:
  template <class Load>
  static FASTRNN_INLINE float convert_to(float* to, int64_t n, const Load& load, float levels) {
    // Puts numbers 0, 2, 1 and 3 of each four beside each other.
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return quantize(n, load, levels, [&](int64_t k, Sum q) {
#if defined(__AVX512F__)
      const __m256i x = _mm256_shuffle_epi8(_mm512_cvtepi32_epi16((__m512i)q),
                                            _mm256_broadcastsi128_si256(order));
#else
      const __m256i both = (__m256i)q;
      const __m128i x = _mm_shuffle_epi8(
          _mm_packs_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)), order);
#endif
      memcpy(to + k / 2, &x, sizeof x);
    });
  }
};

// The same with numbers of all 16 bits, whose sums soon leave 32 bits: those of blocks are split
// into a high part and a low byte.
struct FASTRNN_EXPORTED Int16 : Int8 {
  static constexpr Format kFormat = Format::kInt16;
  static constexpr int kSums = 2;
  static constexpr int64_t kBlock = 128;  // 4 * 128 * 32639 * 128 is below 2^31

  static FASTRNN_INLINE void add_block(Sum* to, Sum block) {
    to[0] += block >> 8;
    to[1] += block & 255;
  }
  static FASTRNN_INLINE V value(const Sum* sum) { return combined(sum[0], sum[1]); }

  template <class Load>
  static FASTRNN_INLINE float convert(float* to, int64_t n, const Load& load) {
    // The largest magnitude that stays within 16 bits when it is rounded.
    return convert_to(to, n, load, 32639);
  }
};

#endif

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif
