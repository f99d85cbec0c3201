// The formats: how weights, and the rows that they are multiplied by, are stored in words, and what
// the product of two words adds to a sum.
//
// Weights of every format lie in the same panels and bands: a lane of a vector is a word, with
// kGroup consecutive weights of one column. So tiles, walks and packing, which moves words, are
// written once. A row is converted to words when its products begin (kConverts), or is read as it
// lies. Sums of scaled formats are integers: value() makes them numbers, which the scales of the
// column and of the row multiply. Integers are exact, so their sums have no order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/math.h"
#include "cpu/exported.h"
#include "cpu/tiles.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// Numbers as they are computed.
template <class T>
struct FASTRNN_EXPORTED Plain {
  using Number = T;    // the type of states and gates
  using Word = T;      // what weights are packed in
  using Sum = Vec<T>;  // of one vector of columns
  static constexpr Format kFormat = std::is_same_v<T, double> ? Format::kDouble : Format::kFloat;
  static constexpr int kGroup = 1;      // weights in a word
  static constexpr int kRowWords = 1;   // words of a row for each word of weights
  static constexpr int kSums = 1;       // sums for each vector of columns
  static constexpr int kBlockSums = 1;  // of these while a block is computed
  static constexpr bool kConverts = false, kScaled = false;
  static constexpr bool kWidens = false;  // in add(), so that rows of a tile share it

  struct Factor {
    Vec<T> x;
  };
  static FASTRNN_INLINE Factor factor(const T* row, int64_t at) {
    return {broadcast<Vec<T>>(row[at])};
  }
  static FASTRNN_INLINE void add(Sum* to, const Factor& a, Vec<T> w) {
    to[0] = multiply_add(a.x, w, to[0]);
  }
  // Numbers k, ..., k + n - 1 of a row.
  static FASTRNN_INLINE void put(T* row, int64_t k, Vec<T> x, int n) { store(row + k, x, n); }
  static FASTRNN_INLINE Vec<T> get(const T* row, int64_t k, int n) {
    return load<Vec<T>>(row + k, n);
  }
  // Ends a row of `width` numbers that put() wrote: what its last word has past them is zero.
  static FASTRNN_INLINE void end_row(T*, int64_t) {}
  // The words of a vector of columns, from as many rows as a word has weights.
  static FASTRNN_INLINE Vec<T> combine(const Vec<T> (&rows)[1]) { return rows[0]; }
  static FASTRNN_INLINE T combine(const T* const (&rows)[1], int64_t k) { return rows[0][k]; }
};

// The words that hold `depth` weights of a column, and those of a row of as many numbers, which has
// room for whole vectors.
template <class F>
FASTRNN_INLINE int64_t words_of(int64_t depth) {
  return (depth + F::kGroup - 1) / F::kGroup;
}
template <class F>
FASTRNN_INLINE int64_t row_words(int64_t depth) {
  constexpr int n = lanes<Vec<typename F::Number>>();
  return (depth + n - 1) / n * n / F::kGroup * F::kRowWords;
}

#if defined(__AVX2__)

// Formats whose words have 32 bits; what moves words takes them for float.
struct FASTRNN_EXPORTED Words {
  using Number = float;
  using Word = float;
  using V = Vec<float>;
  static constexpr bool kConverts = true;

  // A word of a row, in every lane.
  static FASTRNN_INLINE VectorOf<int32_t, kVectorBytes>::Type word(const float* row, int64_t at) {
    int32_t bits;
    memcpy(&bits, row + at, sizeof bits);
    return bits - VectorOf<int32_t, kVectorBytes>::Type{};
  }
};

#endif

#if defined(FASTRNN_VNNI)

// Sums in float of products of bfloat16, two of them in an instruction.
struct FASTRNN_EXPORTED Bfloat16 : Words {
  using Sum = Vec<float>;
  static constexpr Format kFormat = Format::kBfloat16;
  static constexpr int kGroup = 2, kRowWords = 1, kSums = 1, kBlockSums = 1;
  static constexpr bool kScaled = false, kWidens = false;

  struct Factor {
    __m512i x;
  };
  static FASTRNN_INLINE Factor factor(const float* row, int64_t at) {
    return {(__m512i)word(row, at)};
  }
  static FASTRNN_INLINE void add(Sum* to, const Factor& a, V w) {
    to[0] = _mm512_dpbf16_ps(to[0], (__m512bh)a.x, (__m512bh)w);
  }
  // Converts n numbers, which load(k, live) reads in vectors.
  template <class Load>
  static FASTRNN_INLINE float convert(float* to, int64_t n, const Load& load) {
    for (int64_t k = 0; k < n; k += 16) {
      const __m256bh x = _mm512_cvtneps_pbh(load(k, within<V>(k, n)));
      memcpy(to + k / 2, &x, sizeof x);
    }
    return 1;
  }
  static FASTRNN_INLINE void put(float* row, int64_t k, V x, int n) {
    store_half<V>(reinterpret_cast<uint16_t*>(row) + k, (Half<V>)_mm512_cvtneps_pbh(x), n);
  }
  static FASTRNN_INLINE V get(const float* row, int64_t k, int n) {
    return from_bfloat16<V>(load_half<V>(reinterpret_cast<const uint16_t*>(row) + k, n));
  }
  static FASTRNN_INLINE void end_row(float* row, int64_t width) {
    if (width % 2) reinterpret_cast<uint16_t*>(row)[width] = 0;
  }
  static FASTRNN_INLINE V combine(const V (&rows)[2]) {
    const auto bits = [](V x) { return widen<V>((Half<V>)_mm512_cvtneps_pbh(x)); };
    return bit_cast<V>(bits(rows[0]) | bits(rows[1]) << 16);
  }
  static FASTRNN_INLINE float combine(const float* const (&rows)[2], int64_t k) {
    uint16_t halves[2] = {};
    for (int j = 0; j < 2; ++j)
      if (rows[j]) memcpy(&halves[j], reinterpret_cast<const uint16_t*>(rows[j]) + k, 2);
    return bit_cast<float>(halves[0] | uint32_t{halves[1]} << 16);
  }
};

#endif

// Rows that products read, in words.
template <class F>
struct FASTRNN_EXPORTED WordRows {
  const typename F::Word* first;
  int64_t stride;
  const typename F::Number* scales;  // of each row, if the format has them

  FASTRNN_INLINE typename F::Number scale(int64_t row) const {
    if constexpr (F::kScaled) return scales[row];
    return 1;
  }
};

// Writes a row of `count` numbers, which load(k, live) reads in vectors, in words, with its scale.
template <class F, class Load>
FASTRNN_INLINE void put_row(typename F::Word* to, int64_t count, typename F::Number* scale,
                            const Load& load) {
  using V = Vec<typename F::Number>;
  if constexpr (F::kConverts) {
    const typename F::Number found = F::convert(to, count, load);
    if constexpr (F::kScaled) *scale = found;
  } else {
    for (int64_t k = 0; k < count; k += lanes<V>()) store(to + k, load(k, within<V>(k, count)));
  }
}

// What turns the sums of the columns of a matrix into numbers: of scaled formats, a scale and the
// integer at which sums begin, for each lane.
template <class F>
struct FASTRNN_EXPORTED Columnwise {
  typename F::Number* scale;
  int32_t* zero;

  // The same for the columns of a matrix that begins at this one.
  Columnwise from(int64_t column) const {
    if constexpr (F::kScaled) return {scale + column, zero + column};
    return {};
  }
};

// Where the sum of a vector of columns begins; `value` is what it is added to.
template <class F>
FASTRNN_INLINE void begin_sum(typename F::Sum* sum, const Columnwise<F>& columns, int64_t column,
                              Vec<typename F::Number> value) {
  if constexpr (F::kScaled) {
    for (int d = 0; d < F::kSums; ++d) sum[d] = typename F::Sum{};
    if constexpr (F::kZero != 0) {
      typename F::Sum zero;
      memcpy(&zero, columns.zero + column, sizeof zero);
      sum[0] = zero;
    }
  } else {
    sum[0] = value;
  }
}

// The number that the sum is, with `value` added.
template <class F>
FASTRNN_INLINE Vec<typename F::Number> end_sum(const typename F::Sum* sum,
                                               const Columnwise<F>& columns, int64_t column,
                                               typename F::Number row_scale,
                                               Vec<typename F::Number> value) {
  if constexpr (F::kScaled) {
    using V = Vec<typename F::Number>;
    return multiply_add<V>(F::value(sum), load<V>(columns.scale + column) * row_scale, value);
  } else {
    return sum[0];
  }
}

// The number that a sum is which began at zero.
template <class F>
FASTRNN_INLINE Vec<typename F::Number> end_product(const typename F::Sum* sum,
                                                   const Columnwise<F>& columns, int64_t column,
                                                   typename F::Number row_scale) {
  if constexpr (F::kScaled) {
    typename F::Sum whole[F::kSums];
    begin_sum<F>(whole, columns, column, splat<Vec<float>>(0));
    for (int d = 0; d < F::kSums; ++d) whole[d] += sum[d];
    return end_sum<F>(whole, columns, column, row_scale, splat<Vec<float>>(0));
  } else {
    return sum[0];
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
