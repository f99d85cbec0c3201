// Tensor cores: products of matrices that the lanes of a warp hold in registers (mma), and loads of
// matrices into that layout (ldmatrix).
#include "machine.h"

namespace fastrnn {
namespace sim {
namespace {

struct Operands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float widen(Product product, uint16_t bits) {
  if (product == Product::kBfloat16) return from_bits(static_cast<uint32_t>(bits) << 16);
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t i = 0; i < values.size(); ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      values[i] = __half2float(__half(raw));
    }
    return values;
  }();
  return table[bits];
}

// d[16][8] += a[16][k] b[k][8], added up in float32 in the order of k.
template <int k_size, class Element>
void multiply(void** lanes, Element element) {
  float a[16][k_size], b[k_size][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    constexpr int per = k_size / 8;  // numbers in a register
    for (int i = 0; i < per; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[g + 8 * (r % 2)][per * q + i + per * 4 * (r / 2)] = element(mine.a[r], i);
      }
      for (int r = 0; r < 2; ++r) b[per * q + i + per * 4 * r][g] = element(mine.b[r], i);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * q + i % 2] = mine.d[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < k_size; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) mine.d[i] = d[g + 8 * (i / 2)][2 * q + i % 2];
  }
}

template <Product product>
void multiply16(void** lanes) {
  multiply<16>(lanes, [](uint32_t bits, int i) {
    return widen(product, static_cast<uint16_t>(bits >> (16 * i)));
  });
}

void multiply_tf32(void** lanes) {
  // A tensor core does not read the last 13 bits.
  multiply<8>(lanes, [](uint32_t bits, int) { return from_bits(bits & ~uint32_t{0x1fff}); });
}

struct Rows {
  uint32_t* r;
  Vector16 row;
};

}  // namespace

void mma(Product product, float* d, const uint32_t* a, const uint32_t* b) {
  Operands operands{d, a, b};
  if (product == Product::kTf32) {
    meet("mma_tf32", ~0u, &operands, multiply_tf32, false);
  } else if (product == Product::kBfloat16) {
    meet("mma of bfloat16", ~0u, &operands, multiply16<Product::kBfloat16>, false);
  } else {
    meet("mma of float16", ~0u, &operands, multiply16<Product::kFloat16>, false);
  }
}

void exchange_rows(uint32_t* r, Vector16 row, bool transposed) {
  Rows rows{r, row};
  const auto plain = [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const auto& from = *static_cast<const Rows*>(lanes[8 * m + lane / 4]);
        static_cast<Rows*>(lanes[lane])->r[m] = from.row[lane % 4];
      }
    }
  };
  const auto columns = [](void** lanes) {
    const auto element = [&](int row, int column) {
      const uint32_t word = static_cast<const Rows*>(lanes[row])->row[column / 2];
      return word >> (16 * (column % 2)) & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int row = 8 * m + 2 * (lane % 4), column = lane / 4;
        static_cast<Rows*>(lanes[lane])->r[m] = element(row, column) | element(row + 1, column)
                                                                           << 16;
      }
    }
  };
  // All lanes have read their rows before any of them goes on and writes over a row.
  if (transposed) {
    meet("ldmatrix4_transposed", ~0u, &rows, columns, true);
  } else {
    meet("ldmatrix4", ~0u, &rows, plain, true);
  }
}

}  // namespace sim
}  // namespace fastrnn
