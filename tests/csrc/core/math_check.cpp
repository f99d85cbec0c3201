// csrc/core/math.h and csrc/core/vec.h behind plain C functions on arrays, for test_math.py.
// It calls them as a kernel does: from within the namespace, which hides C's functions.
#include "core/math.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// clang-format off
#define UNARY(X)                                                                        \
  X(exp) X(expm1) X(sigmoid) X(tanh) X(log) X(log1p) X(sin) X(cos) X(erf) X(sqrt)       \
  X(rsqrt) X(reciprocal) X(relu) X(abs) X(sign) X(floor)
#define BINARY(X) X(maximum) X(minimum) X(masks)
// clang-format on

namespace fastrnn {
inline namespace FASTRNN_ISA {

// Sets one bit for each comparison and combination of masks that holds.
template <class V>
V masks(V a, V b) {
  const Mask<V> less = a<b, positive = a> V{};
  const Mask<V> all[] = {less,
                         a <= b,
                         a > b,
                         a >= b,
                         a == b,
                         a != b,
                         both(less, positive),
                         either(less, positive),
                         negate(less)};
  V code{};
  double bit = 1;
  for (const Mask<V>& mask : all) {
    code = code + where(mask, splat<V>(bit), V{});
    bit *= 2;
  }
  return code;
}

constexpr const char* kNames[] = {
#define NAME(name) #name,
    UNARY(NAME) BINARY(NAME)
#undef NAME
};

template <class V>
V call(int function, V a, V b) {
  int index = 0;
#define CALL1(name) \
  if (function == index++) return name(a);
#define CALL2(name) \
  if (function == index++) return name(a, b);
  UNARY(CALL1)
  BINARY(CALL2)
#undef CALL1
#undef CALL2
  return splat<V>(NAN);
}

template <class F>
void for_each_vector(int lanes, int64_t size, F f) {
  for (int64_t i = 0; i < size; i += lanes) {
    f(i, size - i < lanes ? static_cast<int>(size - i) : lanes);
  }
}

template <class T>
double bound(int function) {
  using Bound = UlpBound<T>;
  const double bounds[] = {Bound::exp, Bound::expm1, Bound::sigmoid, Bound::tanh};
  return bounds[function];
}

template <class V, class T = Scalar<V>>
void call(int function, const T* a, const T* b, T* out, int64_t size) {
  for_each_vector(lanes<V>(), size, [&](int64_t i, int n) {
    store(out + i, call(function, load<V>(a + i, n), load<V>(b + i, n)), n);
  });
}

template <class V, class T = Scalar<V>>
void power(double exponent, const T* x, T* out, int64_t size) {
  for_each_vector(lanes<V>(), size,
                  [&](int64_t i, int n) { store(out + i, pow(load<V>(x + i, n), exponent), n); });
}

template <class V>
void convert(const void* from, Storage in, void* to, Storage out, int64_t size) {
  for_each_vector(lanes<V>(), size,
                  [&](int64_t i, int n) { store_as(to, i, load_as<V>(from, i, n, in), n, out); });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

using namespace fastrnn;

EXPORT const char* name(int function) {
  return function < static_cast<int>(sizeof kNames / sizeof *kNames) ? kNames[function] : nullptr;
}

#define EXPORTS(type, T, V)                                                                       \
  EXPORT int lanes_##type() { return lanes<V>(); }                                                \
  EXPORT double bound_##type(int function) { return bound<T>(function); }                         \
  EXPORT void call_##type(int function, const T* a, const T* b, T* out, int64_t size) {           \
    call<V>(function, a, b, out, size);                                                           \
  }                                                                                               \
  EXPORT void power_##type(double exponent, const T* x, T* out, int64_t size) {                   \
    power<V>(exponent, x, out, size);                                                             \
  }                                                                                               \
  EXPORT void convert_##type(const void* from, Storage in, void* to, Storage out, int64_t size) { \
    convert<V>(from, in, to, out, size);                                                          \
  }                                                                                               \
  /* All lanes, those beyond n too. */                                                            \
  EXPORT void load_##type(const void* from, int n, Storage storage, T* out) {                     \
    store(out, load_as<V>(from, 0, n, storage));                                                  \
  }                                                                                               \
  EXPORT void splat_##type(double value, T* out) { store(out, splat<V>(value)); }

EXPORTS(float, float, float)
EXPORTS(double, double, double)
EXPORTS(floats, float, Vec<float>)
EXPORTS(doubles, double, Vec<double>)

// x / 2: before the scope, inside it, after an inner scope has ended, and after the scope.
EXPORT void halve_around_flush(const volatile float* x, volatile float* out) {
  out[0] = *x * 0.5f;
  {
    FlushDenormals outer;
    out[1] = *x * 0.5f;
    {
      FlushDenormals inner;
    }
    out[2] = *x * 0.5f;
  }
  out[3] = *x * 0.5f;
}
