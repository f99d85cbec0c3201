"""The functions that an exported source defines for itself: products, reductions, and the
mathematics of a cell."""

from __future__ import annotations

import re
from collections.abc import Set

__all__ = ["definitions"]


def definitions(called: Set[str]) -> list[str]:
    """The functions of these names and those that they call, callees first; other names are
    operators, or functions of the C library."""
    needed = set(called)
    for name, text in reversed((_FUNCTIONS | _EXPONENTIALS).items()):
        if name in needed:
            needed |= {n for n in _CALLEES if re.search(rf"\b{n}\(", text)}
    others = [text for name, text in _FUNCTIONS.items() if name in needed]
    exponentials = [name for name in _SIMPLE if name in called]
    if not exponentials:
        return others
    simple = [
        f"static float {name}(float x) {{ return {_SIMPLE[name]}; }}" for name in exponentials
    ]
    return [
        *others,
        "#if FLT_EVAL_METHOD == 0 && !defined(__FAST_MATH__)",
        *(text for name, text in _EXPONENTIALS.items() if name in needed),
        "#else",
        *simple,
        "#endif",
    ]


# The functions of a source.
_FUNCTIONS = {
    "add_product": """\
/* sum += x * weight, with weight [rows, columns]. */
static void add_product(int rows, int columns, const float *restrict weight,
                        const float *restrict x, float *restrict sum) {
  int k = 0;
  for (; k + 4 <= rows; k += 4) {
    const float *restrict w0 = weight, *restrict w1 = w0 + columns;
    const float *restrict w2 = w1 + columns, *restrict w3 = w2 + columns;
    const float x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];
    for (int j = 0; j < columns; ++j) {
      sum[j] += (w0[j] * x0 + w1[j] * x1) + (w2[j] * x2 + w3[j] * x3);
    }
    weight = w3 + columns;
  }
  for (; k < rows; ++k) {
    for (int j = 0; j < columns; ++j) {
      sum[j] += weight[j] * x[k];
    }
    weight += columns;
  }
}""",
    "add_rounded_product": """\
/* sum += x * weight * scale, with weight [rows, columns] and scale [columns]. */
static void add_rounded_product(int rows, int columns, const int8_t *restrict weight,
                                const float *restrict scale, const float *restrict x,
                                float *restrict part, float *restrict sum) {
  for (int j = 0; j < columns; ++j) {
    part[j] = 0.0f;
  }
  int k = 0;
  for (; k + 4 <= rows; k += 4) {
    const int8_t *restrict w0 = weight, *restrict w1 = w0 + columns;
    const int8_t *restrict w2 = w1 + columns, *restrict w3 = w2 + columns;
    const float x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];
    for (int j = 0; j < columns; ++j) {
      part[j] += (w0[j] * x0 + w1[j] * x1) + (w2[j] * x2 + w3[j] * x3);
    }
    weight = w3 + columns;
  }
  for (; k < rows; ++k) {
    for (int j = 0; j < columns; ++j) {
      part[j] += weight[j] * x[k];
    }
    weight += columns;
  }
  for (int j = 0; j < columns; ++j) {
    sum[j] += scale[j] * part[j];
  }
}""",
    "both": "static int both(int a, int b) { return a & b; }",
    "either": "static int either(int a, int b) { return a | b; }",
    "negate": "static int negate(int a) { return !a; }",
    "where": "static float where(int mask, float yes, float no) { return mask ? yes : no; }",
    "maximum": """\
/* NaN if either is. */
static float maximum(float a, float b) { return a != a || a > b ? a : b; }""",
    "minimum": """\
/* NaN if either is. */
static float minimum(float a, float b) { return a != a || a < b ? a : b; }""",
    "relu": "static float relu(float x) { return 0.0f > x ? 0.0f : x; }",
    "sign": """\
static float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }""",
    "reciprocal": "static float reciprocal(float x) { return 1.0f / x; }",
    "rsqrt": "static float rsqrt(float x) { return 1.0f / sqrtf(x); }",
    "sum_of": """\
/* The sum of n numbers, in eight parts, which compilers add side by side. */
static float sum_of(int n, const float *x) {
  float part[8] = {0.0f};
  int k = 0;
  for (; k + 8 <= n; k += 8) {
    for (int j = 0; j < 8; ++j) {
      part[j] += x[k + j];
    }
  }
  for (; k < n; ++k) {
    part[k % 8] += x[k];
  }
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}""",
    "deviations_of": """\
/* The sum of squared deviations of n numbers from their mean. */
static float deviations_of(int n, const float *x, float mean) {
  float part[8] = {0.0f};
  int k = 0;
  for (; k + 8 <= n; k += 8) {
    for (int j = 0; j < 8; ++j) {
      part[j] += (x[k + j] - mean) * (x[k + j] - mean);
    }
  }
  for (; k < n; ++k) {
    part[k % 8] += (x[k] - mean) * (x[k] - mean);
  }
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}""",
    "largest_of": """\
/* The largest of n numbers. */
static float largest_of(int n, const float *x) {
  float largest = x[0];
  for (int k = 1; k < n; ++k) {
    largest = maximum(largest, x[k]);
  }
  return largest;
}""",
}
# Exponentials, callees first. They are those of csrc/core/math.h, within 2.7 ULP, because compilers
# vectorise them.
_EXPONENTIALS = {
    "float_of": """\
static float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}""",
    "bits_of": """\
static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}""",
    "limited": """\
/* x between low and high; NaN stays. */
static float limited(float x, float low, float high) {
  const float above = low > x ? low : x;
  return high < above ? high : above;
}""",
    "expm1_reduced": """\
/* e^r - 1 for |r| <= ln 2 / 2. */
static float expm1_reduced(float r) {
  const float r2 = r * r;
  const float even = (0x1.6ac686p-10f * r2 + 0x1.555798p-5f) * r2 + 0x1.fffffep-2f;
  const float odd = 0x1.122bfep-7f * r2 + 0x1.5554aap-3f;
  return (odd * r + even) * r2 + r;
}""",
    "reduced": """\
/* r with x = n ln 2 + r, and n + bias in the low bits of *n: adding 1.5 * 2^23 rounds. */
static float reduced(float x, float bias, uint32_t *n) {
  const float shifted = x * 0x1.715476p0f + (0x1.8p23f + bias);
  const float whole = shifted - (0x1.8p23f + bias);
  *n = bits_of(shifted);
  return (x - whole * 0x1.63p-1f) - whole * -0x1.bd0106p-13f;
}""",
    "exponential": """\
static float exponential(float x) {
  uint32_t n;
  const float r = reduced(limited(x, -104.0f, 89.0f), 254.0f, &n);
  const uint32_t half = n >> 1; /* 2^n has two factors, as it may be out of range */
  return (expm1_reduced(r) + 1.0f) * float_of(half << 23) * float_of((n - half) << 23);
}""",
    "sigmoid": """\
static float sigmoid(float x) {
  uint32_t n;
  const float r = reduced(-limited(x, -89.0f, 88.0f), 127.0f, &n);
  return 1.0f / ((expm1_reduced(r) + 1.0f) * float_of(n << 23) + 1.0f);
}""",
    "hyperbolic_tangent": """\
static float hyperbolic_tangent(float x) {
  /* E / (E + 2) with E = e^(2|x|) - 1 keeps all digits near 0. */
  uint32_t n;
  const float size = fabsf(x) * 2.0f, y = 19.0f < size ? 19.0f : size;
  const float r = reduced(y, 127.0f, &n), scale = float_of(n << 23);
  const float e = scale * expm1_reduced(r) + (scale - 1.0f);
  return copysignf(e / (e + 2.0f), x);
}""",
}
# Extended precision and -ffast-math break the rounding of those, and the C library takes their
# place.
_SIMPLE = {
    "exponential": "expf(x)",
    "sigmoid": "1.0f / (1.0f + expf(-x))",
    "hyperbolic_tangent": "tanhf(x)",
}
_CALLEES = ("maximum", *_EXPONENTIALS)
