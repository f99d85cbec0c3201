# mypy: ignore-errors
# Triton's functions have no types: they are compiled, not run.
"""The functions that generated cells call, for float32 and float64 blocks in Triton.

They use only operations that Triton's interpreter has too, so that a cell computes the same there
as on a device, and they do not need libdevice. Several functions only call one of `tl`: a generated
cell finds all names in this module, and the interpreter replaces the functions of `tl`, which an
alias made at import would miss.

`tanh`, `expm1` and `log1p` keep their digits near zero, where formulas with `exp` and `log` would
lose them.
"""

import triton
import triton.language as tl


@triton.jit
def _power_of_two(n):
    """2^n from its bits, for integer n in the range of the type's normal numbers."""
    if n.dtype == tl.float64:
        return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reduce(x):
    """`(n, r)` with `x = n ln 2 + r`, integer n and |r| <= ln 2 / 2."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    if x.dtype == tl.float64:  # n * the first part is exact
        return n, (x - n * 0.693145751953125) - n * 1.4286068203094173e-06
    else:
        return n, (x - n * 0.693359375) + n * 0.00021219444170128554


@triton.jit
def _expm1_reduced(r):
    """e^r - 1 for |r| <= ln 2 / 2, to the last digit or two, as in csrc/core/math.h."""
    z = r * r
    if r.dtype == tl.float64:
        even = (2.762615813968465e-07 * z + 2.480150498674311e-05) * z + 0.0013888888931788846
        even = (even * z + 0.041666666666576126) * z + 0.5000000000000006
        odd = (2.505377990157576e-08 * z + 2.7557407846343403e-06) * z + 0.00019841269718369903
        odd = (odd * z + 0.008333333333389944) * z + 0.16666666666666588
    else:
        even = (0.0013838786398991942 * z + 0.041667744517326355) * z + 0.4999999701976776
        odd = 0.00836706068366766 * z + 0.16666539013385773
    return (odd * r + even) * z + r


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def expm1(x):
    # Beyond these bounds the result is -1 or infinite; NaN stays NaN.
    low: tl.constexpr = -40.0
    high: tl.constexpr = 709.0 if x.dtype == tl.float64 else 88.0
    y = tl.where(x < low, low, tl.where(x > high, high, x))
    n, r = _reduce(y)
    half = _power_of_two(n - 1)  # finite if the result is
    e = half * _expm1_reduced(r) + (half - 0.5)
    return tl.where(x > high, tl.exp(x), e + e)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """E / (E + 2) with E = e^(2|x|) - 1."""
    most: tl.constexpr = 40.0 if x.dtype == tl.float64 else 20.0
    y = 2.0 * tl.abs(x)
    n, r = _reduce(tl.where(y > most, most, y))
    scale = _power_of_two(n)
    e = scale * _expm1_reduced(r) + (scale - 1.0)
    t = e / (e + 2.0)
    return tl.where(x < 0, -t, t)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def log1p(x):
    """2 artanh(x / (2 + x)) by its series near zero, else by `log`."""
    s = x / (2.0 + x)
    z = s * s
    if x.dtype == tl.float64:
        near = 0.25  # the series below is exact to 1e-17 up to |s| of 1/7
        p = ((z * (1.0 / 17) + 1.0 / 15) * z + 1.0 / 13) * z + 1.0 / 11
        p = (((p * z + 1.0 / 9) * z + 1.0 / 7) * z + 1.0 / 5) * z + 1.0 / 3
    else:
        near = 0.25
        p = ((z * (1.0 / 9) + 1.0 / 7) * z + 1.0 / 5) * z + 1.0 / 3
    return tl.where(tl.abs(x) < near, 2.0 * s + 2.0 * s * z * p, tl.log(1.0 + x))


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def pow(x, exponent: tl.constexpr):
    """`x ** exponent` for a constant exponent."""
    magnitude = tl.exp(exponent * tl.log(tl.abs(x)))
    zero = 0.0 if exponent > 0 else float("inf")
    magnitude = tl.where(x == 0, zero, magnitude)
    if exponent % 2 == 1 or exponent % 2 == -1:
        return tl.where(x < 0, -magnitude, magnitude)
    elif exponent % 1 == 0:
        return magnitude
    else:
        return tl.where(x < 0, float("nan"), magnitude)


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def floor(x):
    return tl.floor(x)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(mask, x, y):
    return tl.where(mask, x, y)


@triton.jit
def both(x, y):
    return x & y


@triton.jit
def either(x, y):
    return x | y


@triton.jit
def negate(x):
    return x == 0


@triton.jit
def constant(value: tl.constexpr, dtype: tl.constexpr):
    """A number as a block [1, 1], which broadcasts to any shape."""
    return tl.full([1, 1], value, dtype)
