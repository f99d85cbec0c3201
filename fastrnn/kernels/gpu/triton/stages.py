# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# Triton cannot unpack tuples, and `and` of constants evaluates both.
"""A step in stages, for programs that have all units of their rows, and what such steps share with
those that walk over tiles of units (`streamed_stages.py`).

A cell's functions compute one stage (`compiler/emit_triton.py`), and `PROGRAM`, a `Shape` of
`compiler/layout.py`, says what comes before it and what it writes. Products multiply blocks in
registers, reductions are sums over the units of a block, and what crosses between stages are
variables.
"""

import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.common import joined, times
from fastrnn.kernels.gpu.triton.math import maximum


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype):
    """COUNT blocks [ROWS, COLUMNS]."""
    out = ()
    for _k in tl.static_range(COUNT):
        out = out + (tl.zeros((ROWS, COLUMNS), dtype),)
    return out


@triton.jit
def add_parts(totals, parts, inside, WRITTEN: tl.constexpr, COUNT: tl.constexpr):
    """The totals [BB, 1] with the parts [BB, N] of a stage."""
    out = ()
    for r in tl.static_range(COUNT):
        total = totals[r]
        if (WRITTEN.sums >> r) & 1:
            total += tl.sum(tl.where(inside, parts[r], 0.0), axis=1, keep_dims=True)
        elif (WRITTEN.maxima >> r) & 1:
            part = tl.where(inside, parts[r], float("-inf"))
            total = maximum(total, tl.reduce(part, 1, maximum, keep_dims=True))
        out = out + (total,)
    return out


@triton.jit
def begin_totals(totals, WRITTEN: tl.constexpr, COUNT: tl.constexpr):
    """The totals, where those of the parts of a stage begin anew."""
    out = ()
    for r in tl.static_range(COUNT):
        total = totals[r]
        if (WRITTEN.sums >> r) & 1:
            total = tl.zeros_like(total)
        elif (WRITTEN.maxima >> r) & 1:
            total = tl.full(total.shape, float("-inf"), total.dtype)
        out = out + (total,)
    return out


@triton.jit
def save_results(tape, at, results, alive, COUNT: tl.constexpr):
    """Write the first results of each row from element `at` of the tape on. A tape of 16-bit
    numbers has them in halves, because they may lie at an odd element."""
    bits: tl.constexpr = tape.dtype.element_ty.primitive_bitwidth
    for r in tl.static_range(COUNT):
        if bits == 16:
            word = results[r].to(tl.int32, bitcast=True)
            for half in tl.static_range(2):
                part = (word >> (16 * half)).to(tl.int16)
                part = part.to(tape.dtype.element_ty, bitcast=True)
                tl.store(tape + at + 2 * r + half, part, mask=alive)
        else:
            tl.store(tape + at + r, results[r], mask=alive)


@triton.jit
def saved_results(tape, at, alive, dtype, COUNT: tl.constexpr, ALL: tl.constexpr):
    """ALL blocks [BB, 1], of which the first are those of `save_results`."""
    bits: tl.constexpr = tape.dtype.element_ty.primitive_bitwidth
    out = ()
    for r in tl.static_range(ALL):
        if r >= COUNT:
            own = tl.zeros(alive.shape, dtype)
        elif bits == 16:
            word = tl.zeros(alive.shape, tl.int32)
            for half in tl.static_range(2):
                part = tl.load(tape + at + 2 * r + half, mask=alive, other=0.0)
                part = part.to(tl.int16, bitcast=True).to(tl.int32)
                word |= (part & 0xFFFF) << (16 * half)
            own = word.to(tl.float32, bitcast=True)
        else:
            own = tl.load(tape + at + r, mask=alive, other=0.0)
        out = out + (own,)
    return out


@triton.jit
def source(code: tl.constexpr, u, v, x, GV: tl.constexpr):
    """A source of `Moments` of `compiler/layout.py`."""
    if code >= 0:
        return x[code]
    elif code >= -GV:
        return v[-1 - code]
    else:
        return u[-1 - GV - code]


@triton.jit
def _with_moments(
    results, u, v, x, inside, MOMENTS: tl.constexpr, H: tl.constexpr, GV: tl.constexpr
):
    """The results with a mean and a sum of squared deviations of units of several blocks."""
    mean = tl.zeros_like(results[MOMENTS.result])
    for k in tl.static_range(len(MOMENTS.sources)):
        own = tl.where(inside, source(MOMENTS.sources[k], u, v, x, GV), 0.0)
        mean += tl.sum(own, axis=1, keep_dims=True)
    mean = mean / (len(MOMENTS.sources) * H)
    deviation = tl.zeros_like(mean)
    for k in tl.static_range(len(MOMENTS.sources)):
        apart = tl.where(inside, source(MOMENTS.sources[k], u, v, x, GV) - mean, 0.0)
        deviation += tl.sum(apart * apart, axis=1, keep_dims=True)
    return results[: MOMENTS.result] + (mean, deviation) + results[MOMENTS.result + 2 :]


@triton.jit
def forward_stages(
    CELL, u, v, s, p, w, bias, inside, dtype, PROGRAM: tl.constexpr, H: tl.constexpr,
    GV: tl.constexpr, INPUT_OF: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    SUMMED: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A step: next states, saved values and results. `v` are the products with state 0."""
    X: tl.constexpr = PROGRAM.temporaries
    count = tl.full([1, 1], H, dtype)
    out = zeros(S + K, BB, BN, dtype)
    x = zeros(X, BB, BN, dtype)
    results = zeros(PROGRAM.results, BB, 1, dtype)
    for k in tl.static_range(len(PROGRAM.written)):
        vs = ()
        for g in tl.static_range(GV):
            own = v[g]
            if PROGRAM.site_of[g] >= 0:
                if (PROGRAM.written[k].sites >> PROGRAM.site_of[g]) & 1:
                    operand = tl.where(inside, x[PROGRAM.operands[PROGRAM.site_of[g]]], 0.0)
                    own = joined(
                        times(operand, w[g], DOT, PRECISION), g, u, bias, INPUT_OF, SUMMED, BIAS
                    )  # fmt: skip
            vs = vs + (own,)
        v = vs
        for m in tl.static_range(len(PROGRAM.moments)):
            if PROGRAM.moments[m].stage == k:
                results = _with_moments(results, u, v, x, inside, PROGRAM.moments[m], H, GV)
        made = CELL(k, u, v, s, p, x, results, count, out)
        out = made[: S + K]
        x = made[S + K : S + K + X]
        results = begin_totals(results, PROGRAM.written[k], PROGRAM.results)
        results = add_parts(
            results, made[S + K + X :], inside, PROGRAM.written[k], PROGRAM.results
        )  # fmt: skip
    return out + results


@triton.jit
def backward_stages(
    CELL, saved, s, p, after, dafter, results, w, here, inside, dtype, PROGRAM: tl.constexpr,
    H: tl.constexpr, GU: tl.constexpr, GV: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradients of a step: of `u`, `v`, states and parameters; then the operands of products.
    `results` are those that the step saved, and places for others."""
    X: tl.constexpr = PROGRAM.temporaries
    J: tl.constexpr = PROGRAM.sites
    OUT: tl.constexpr = GU + GV + S + L + J
    count = tl.full([1, 1], H, dtype)
    out = zeros(OUT, BB, BN, dtype)
    x = zeros(X, BB, BN, dtype)
    back = zeros(J, BB, BN, dtype)
    for k in tl.static_range(len(PROGRAM.written)):
        totals = ()
        for j in tl.static_range(J):
            total = back[j]
            if (PROGRAM.written[k].sites >> j) & 1:
                for g in tl.static_range(GV):
                    if PROGRAM.site_of[g] == j:
                        d = tl.where(here, out[GU + g], 0.0)
                        total += times(d, w[g], DOT, PRECISION)
            totals = totals + (total,)
        back = totals
        made = CELL(k, saved, s, p, after, dafter, x, back, results, count, out)
        out = made[:OUT]
        x = made[OUT : OUT + X]
        results = begin_totals(results, PROGRAM.written[k], PROGRAM.results)
        results = add_parts(results, made[OUT + X :], inside, PROGRAM.written[k], PROGRAM.results)
    return out
