// Random numbers of cells as a pure function of where they are drawn: Philox4x32-10 (Salmon et al.
// 2011, "Parallel random numbers: as easy as 1, 2, 3"). fastrnn/cells/noise.py has the same in
// torch.
//
// The key is the seed. A word of 32 bits serves two units of a block of 64: unit q < 32 takes word
// q/16*2 + q%2 of the counter (8*block + q%16/2, step, sequence, recurrence and draw), and unit
// q + 32 takes the same word rotated by 16 bits. So 8 counters serve a block, and vectors of any
// width have their numbers side by side. Both numbers are uniform. They depend on each other only
// where an upper half equals that of the threshold, once in 65,536: their correlation is below
// 3e-5 for probabilities from 1e-5 on.
#pragma once

#include <cstdint>
#include <cstring>

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

// The state of the generator for as many counters as lanes: first counters, then random words.
struct Philox {
  Lanes64 a, b, c, d;

  // Counters `first`, `first` + 1 and so on.
  FASTRNN_INLINE Philox(uint64_t first, uint32_t step, uint32_t sequence, uint32_t place)
      : b(Lanes64{} + step), c(Lanes64{} + sequence), d(Lanes64{} + place) {
    Lanes64 own;
    for (int l = 0; l < kLanes64; ++l) own[l] = l;
    a = own + first;
  }
  FASTRNN_INLINE void round(uint32_t key0, uint32_t key1) {
    const Lanes64 x = product(a, 0xD2511F53), y = product(c, 0xCD9E8D57);
    a = (y >> 32) ^ b ^ uint64_t{key0};
    c = (x >> 32) ^ d ^ uint64_t{key1};
    b = y;
    d = x;
  }
};

// Writes the words of each counter next to each other; lower halves of lanes come first in memory.
FASTRNN_INLINE void put_words(Lanes64 first, Lanes64 second, uint32_t* to) {
  const Lanes64 both = (first & 0xFFFFFFFF) | (second << 32);
  memcpy(to, &both, sizeof both);
}

// Numbers for the units [begin, end), which are whole blocks of 64 but for the first and the last:
// `value` where a word is smaller than the threshold, a probability times 2^32, and else 0.
template <class T>
void draw(uint64_t seed, uint32_t step, uint32_t sequence, uint32_t place, int64_t threshold,
          T value, int64_t begin, int64_t end, T* to) {
  const uint32_t most = static_cast<uint32_t>(threshold > 0 ? threshold - 1 : 0);
  const T most_value = threshold > 0 ? value : T{0};
  for (int64_t block = begin / 64 * 64; block < end; block += 64) {
    uint32_t words[32];
    for (int first = 0; first < 8; first += kLanes64) {
      Philox random(block / 8 + first, step, sequence, place);
      uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        random.round(key0, key1);
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
      }
      put_words(random.a, random.b, words + 2 * first);
      put_words(random.c, random.d, words + 16 + 2 * first);
    }
    T numbers[64];
    for (int unit = 0; unit < 32; ++unit) {
      const uint32_t word = words[unit];
      numbers[unit] = word <= most ? most_value : T{0};
      numbers[unit + 32] = (word >> 16 | word << 16) <= most ? most_value : T{0};
    }
    const int64_t from = begin > block ? begin - block : 0;
    const int64_t last = end < block + 64 ? end - block : 64;
    T* own = to + (block + from - begin);
    if (last - from == 64)
      memcpy(own, numbers, sizeof numbers);
    else
      for (int64_t unit = from; unit < last; ++unit) own[unit - from] = numbers[unit];
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
