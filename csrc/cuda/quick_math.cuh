// The number types of cells in the persistent kernels: floats whose exponentials and quotients are
// the GPU's own functions. They take one or two instructions, those of csrc/core/math.h twenty, and
// a step of a persistent kernel is short enough for that to count.
//
// `Quick` differs from math.h by some 1e-7 of the result, or of 1 for the sigmoid of large numbers;
// its arguments, sums of TF32 or 16-bit products, have far larger errors. `Rough` has a tanh with
// 11 correct bits, three more than bfloat16, and Quick's sigmoid, because an error of a forget gate
// near 1 would grow with every step.
#pragma once

#include "core/math.h"
#include "cuda/platform.cuh"

namespace fastrnn {
inline namespace FASTRNN_ISA {

template <bool rough>
struct QuickFloat {
  float x;

  QuickFloat() = default;
  __device__ __forceinline__ constexpr QuickFloat(float x) : x(x) {}

  __device__ __forceinline__ QuickFloat operator-() const { return -x; }

  // Friends, so that mixed arguments convert to QuickFloat.
  friend __device__ __forceinline__ QuickFloat operator+(QuickFloat a, QuickFloat b) {
    return a.x + b.x;
  }
  friend __device__ __forceinline__ QuickFloat operator-(QuickFloat a, QuickFloat b) {
    return a.x - b.x;
  }
  friend __device__ __forceinline__ QuickFloat operator*(QuickFloat a, QuickFloat b) {
    return a.x * b.x;
  }
  friend __device__ __forceinline__ QuickFloat operator/(QuickFloat a, QuickFloat b) {
    return a.x / b.x;
  }
  friend __device__ __forceinline__ bool operator<(QuickFloat a, QuickFloat b) { return a.x < b.x; }
  friend __device__ __forceinline__ bool operator>(QuickFloat a, QuickFloat b) { return a.x > b.x; }
  friend __device__ __forceinline__ bool operator<=(QuickFloat a, QuickFloat b) {
    return a.x <= b.x;
  }
  friend __device__ __forceinline__ bool operator>=(QuickFloat a, QuickFloat b) {
    return a.x >= b.x;
  }
  friend __device__ __forceinline__ bool operator==(QuickFloat a, QuickFloat b) {
    return a.x == b.x;
  }
  friend __device__ __forceinline__ bool operator!=(QuickFloat a, QuickFloat b) {
    return a.x != b.x;
  }

  // These replace the templates of math.h.
  friend __device__ __forceinline__ QuickFloat sigmoid(QuickFloat a) {
    constexpr float kLog2e = 1.44269504f;
    return platform::reciprocal(1 + platform::exp2(-kLog2e * a.x));
  }
  friend __device__ __forceinline__ QuickFloat tanh(QuickFloat a) {
    return rough ? platform::rough_tanh(a.x) : platform::tanh(a.x);
  }
};

template <bool rough>
struct LaneTraits<QuickFloat<rough>> : LaneTraits<float> {};

using Quick = QuickFloat<false>;
using Rough = QuickFloat<true>;

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
