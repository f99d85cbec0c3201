# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton cannot unpack tuples.
"""The random numbers of cells: the same bits as `cells/noise.py` and csrc/core/noise.h give.

A number is a function of the seed, the sequence, the time step, the unit and the draw, so a program
draws the numbers of its rows and units, and the backward sweep draws them again. `D` is the number
of draws of a step; bit d of `PER_SEQUENCE` says that draw d is made once for all steps, and bit d
of `SCALED` that its mean is 1. The operand `noise` holds the seed, the threshold of each draw, and
if `ORDERED`, the caller's index of each sequence.
"""

import triton
import triton.language as tl

EVERY_STEP = tl.constexpr(0xFFFFFFFF)  # the step of what is drawn per sequence


@triton.jit
def sequences(noise, b, batch, D: tl.constexpr, ORDERED: tl.constexpr):
    """[BB, 1], the caller's index of each row of the batch."""
    if ORDERED:
        return tl.load(noise + 1 + D + b, mask=b < batch, other=0).to(tl.uint32)[:, None]
    else:
        return b.to(tl.uint32)[:, None]


@triton.jit
def _draw(noise, d, p, step, sequence, n, dtype, SCALED: tl.constexpr):
    """[BB, N], the numbers of draw d for units n."""
    unit = n.to(tl.uint32)[None, :]
    place = (p * 65536 + d).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(noise), unit // 64 * 8 + unit % 16 // 2, step.to(tl.uint32), sequence, place
    )
    first = unit % 2 == 0
    one = tl.where(unit // 16 % 2 == 0, tl.where(first, w0, w1), tl.where(first, w2, w3))
    mine = tl.where(unit // 32 % 2 == 0, one, one << 16 | one >> 16)
    threshold = tl.load(noise + 1 + d)
    drawn = (mine <= (threshold - 1).to(tl.uint32)) & (threshold > 0)
    if SCALED:
        value = (4294967296.0 / threshold.to(tl.float64)).to(dtype)
    else:
        value = tl.full([], 1.0, dtype)
    return tl.where(drawn, value, 0.0)


@triton.jit
def drawn_once(
    noise, p, sequence, n, dtype, D: tl.constexpr, PER_SEQUENCE: tl.constexpr, SCALED: tl.constexpr
):
    """D blocks: the numbers that are drawn per sequence, and zeros in the place of the others."""
    out = ()
    for d in tl.static_range(D):
        if (PER_SEQUENCE >> d) & 1:
            step = tl.full([], EVERY_STEP, tl.uint32)
            own = _draw(noise, d, p, step, sequence, n, dtype, (SCALED >> d) & 1)
        else:
            own = tl.zeros([1, 1], dtype)
        out = out + (own,)
    return out


@triton.jit
def drawn(
    once, noise, p, t, sequence, n, dtype, D: tl.constexpr, PER_SEQUENCE: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """D blocks: the numbers of time t, with those of `drawn_once`."""
    out = ()
    for d in tl.static_range(D):
        if (PER_SEQUENCE >> d) & 1:
            own = once[d]
        else:
            own = _draw(noise, d, p, t, sequence, n, dtype, (SCALED >> d) & 1)
        out = out + (own,)
    return out
