// Random numbers of cells as a pure function of where they are drawn: Philox4x32-10 (Salmon et al.
// 2011, "Parallel random numbers: as easy as 1, 2, 3"). fastrnn/cells/noise.py has the same in
// torch.
//
// The key is the seed. Unit q takes word q/16 % 4 of the counter (16*(q/64) + q%16, step, sequence,
// recurrence and draw): so 16 counters serve a block of 64 units, and vectors of any width have
// their numbers side by side.
#pragma once

#include <cstdint>

#include "core/vec.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// The step in the counter of what is drawn per sequence.
constexpr uint32_t kEveryStep = 0xFFFFFFFF;

// Words of 32 bits in the low halves of lanes of 64, as products need them; the high halves hold
// anything.
#if defined(__AVX512F__)
constexpr int kLanes64 = 8;
#elif defined(__AVX2__)
constexpr int kLanes64 = 4;
#else
constexpr int kLanes64 = 2;
#endif
typedef uint64_t Lanes64 __attribute__((vector_size(8 * kLanes64)));

// The products of the words with a word, in 64 bits.
FASTRNN_INLINE Lanes64 product(Lanes64 x, uint32_t factor) {
#if defined(__AVX512F__)
  return (Lanes64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (Lanes64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (Lanes64)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xFFFFFFFF) * factor;
#endif
}

// Numbers for the units [begin, end), which are whole blocks of 64 but for the first and the last:
// `value` where a word is smaller than the threshold, a probability times 2^32, and else 0.
template <class T>
void draw(uint64_t seed, uint32_t step, uint32_t sequence, uint32_t place, int64_t threshold,
          T value, int64_t begin, int64_t end, T* to) {
  const uint32_t most = static_cast<uint32_t>(threshold > 0 ? threshold - 1 : 0);
  const T most_value = threshold > 0 ? value : T{0};
  constexpr int kTogether = 2;  // vectors, so that one can start while another waits
  for (int64_t block = begin / 64 * 64; block < end; block += 64) {
    uint32_t words[64];
    for (int first = 0; first < 16; first += kTogether * kLanes64) {
      Lanes64 a[kTogether], b[kTogether], c[kTogether], d[kTogether];
      for (int k = 0; k < kTogether; ++k) {
        for (int l = 0; l < kLanes64; ++l) a[k][l] = block / 4 + first + k * kLanes64 + l;
        b[k] = Lanes64{} + step;
        c[k] = Lanes64{} + sequence;
        d[k] = Lanes64{} + place;
      }
      uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        for (int k = 0; k < kTogether; ++k) {
          const Lanes64 x = product(a[k], 0xD2511F53), y = product(c[k], 0xCD9E8D57);
          a[k] = (y >> 32) ^ b[k] ^ uint64_t { key0 };
          c[k] = (x >> 32) ^ d[k] ^ uint64_t { key1 };
          b[k] = y;
          d[k] = x;
        }
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
      }
      for (int k = 0; k < kTogether; ++k) {
        uint32_t* to_words = words + first + k * kLanes64;
        for (int l = 0; l < kLanes64; ++l) {
          to_words[l] = static_cast<uint32_t>(a[k][l]);
          to_words[16 + l] = static_cast<uint32_t>(b[k][l]);
          to_words[32 + l] = static_cast<uint32_t>(c[k][l]);
          to_words[48 + l] = static_cast<uint32_t>(d[k][l]);
        }
      }
    }
    T numbers[64];
    for (int unit = 0; unit < 64; ++unit) numbers[unit] = words[unit] <= most ? most_value : T{0};
    const int64_t from = begin > block ? begin - block : 0;
    const int64_t last = end < block + 64 ? end - block : 64;
    for (int64_t unit = from; unit < last; ++unit) to[block + unit - begin] = numbers[unit];
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
