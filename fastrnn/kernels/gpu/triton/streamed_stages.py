# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton cannot unpack tuples.
"""Both sweeps for cells whose step has stages, with streamed weights; see `common.py`, `stages.py`.

A program walks over the units of its rows tile by tile, once for each stage. What crosses between
stages, and products that a later stage reads, lie in `scratch`, in rows that no other program
touches; sums of units are carried from tile to tile in registers. Stages read all states before the
step, and gradients of all states after it, so both have two buffers, between which steps alternate.
"""

import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.backward import before_step, move_to_begins, reads
from fastrnn.kernels.gpu.triton.common import (
    RUN_TIME,
    begun,
    cuts,
    joined,
    learned,
    program,
    row_numbers,
    times,
)
from fastrnn.kernels.gpu.triton.forward import biases, gates
from fastrnn.kernels.gpu.triton.noise import drawn, drawn_once, sequences
from fastrnn.kernels.gpu.triton.projection import gather, gradient_of_m, project
from fastrnn.kernels.gpu.triton.stages import (
    add_parts,
    begin_totals,
    save_results,
    saved_results,
    zeros,
)


@triton.jit
def _loads(scratch, n, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr):
    """Blocks [BB, N] of the values FIRST, FIRST + 1, ... of rows of scratch."""
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (tl.load(scratch + (FIRST + k) * H + n[None, :], mask=inside, other=0.0),)
    return out


@triton.jit
def _store_some(to, stride, blocks, n, mask, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Write block k to `to + k * stride` if bit k is set."""
    for k in tl.static_range(COUNT):
        if (BITS >> k) & 1:
            value = blocks[k].to(to.dtype.element_ty)
            at = to + k * stride + n[None, :]
            tl.store(at, tl.broadcast_to(value, mask.shape), mask=mask)


@triton.jit
def _moment_source(
    code: tl.constexpr, u, rows, scratch, n, here, dtype, H: tl.constexpr, GU: tl.constexpr,
    GV: tl.constexpr,
):  # fmt: skip
    """A source of `Moments`; scratch has GV products, then temporaries."""
    if code < -GV:
        at = u + rows[:, None] * (GU * H) + (-1 - GV - code) * H + n[None, :]
    elif code < 0:
        at = scratch + (-1 - code) * H + n[None, :]
    else:
        at = scratch + (GV + code) * H + n[None, :]
    return tl.load(at, mask=here, other=0.0).to(dtype)


@triton.jit
def _with_moments(
    results, u, rows, scratch, alive, MOMENTS: tl.constexpr, H: tl.constexpr, GU: tl.constexpr,
    GV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The results with a mean and a sum of squared deviations of units of several values."""
    COUNT: tl.constexpr = len(MOMENTS.sources)
    dtype = results[MOMENTS.result].dtype
    mean = tl.zeros_like(results[MOMENTS.result])
    for n0 in tl.range(0, H, BN, num_stages=1):
        n = n0 + tl.arange(0, BN)
        here = alive & (n < H)[None, :]
        for k in tl.static_range(COUNT):
            x = _moment_source(MOMENTS.sources[k], u, rows, scratch, n, here, dtype, H, GU, GV)
            mean += tl.sum(x, axis=1, keep_dims=True)
    mean = mean / (COUNT * H)
    deviation = tl.zeros_like(mean)
    for n0 in tl.range(0, H, BN, num_stages=1):
        n = n0 + tl.arange(0, BN)
        here = alive & (n < H)[None, :]
        for k in tl.static_range(COUNT):
            x = _moment_source(MOMENTS.sources[k], u, rows, scratch, n, here, dtype, H, GU, GV)
            x = tl.where(here, x - mean, 0.0)
            deviation += tl.sum(x * x, axis=1, keep_dims=True)
    return results[: MOMENTS.result] + (mean, deviation) + results[MOMENTS.result + 2 :]


@triton.jit
def _take_second(
    buffers, own, state, b, batch, H: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Copy the states, or gradients of states, of the second buffer to the first."""
    for j in tl.static_range(S):
        for n0 in tl.range(0, Q if j == 0 else H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            in_batch = (b < batch)[:, None] & (n < (Q if j == 0 else H))[None, :]
            at = own + j * state + n[None, :]
            last = tl.load(buffers + S * state + at, mask=in_batch, other=0.0)
            tl.store(buffers + at, last, mask=in_batch)


@triton.jit(do_not_specialize=RUN_TIME)
def forward_streamed_stages(
    u,  # arguments without a comment are as in `forward_streamed`
    w_hh,
    b_hh,
    parameters,
    noise,
    begins,
    carry,  # [2, S, P, B, W]
    y,
    tape,
    scratch,  # [P, B, GV + X, H] in the type of computation: products, then temporaries, then m if
    # state 0 is projected, as one more
    w_hr,
    first,
    length,
    resets,
    steps: tl.int32,
    batch: tl.int64,
    begin: tl.int32,
    end: tl.int32,
    base: tl.int64,
    base_reverse: tl.int64,
    chunk_rows: tl.int64,
    reverse: tl.int64,
    hidden: tl.int32,
    width: tl.int32,
    CELL: tl.constexpr,
    PROGRAM: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    PROJECTED: tl.constexpr,
    GU: tl.constexpr,
    GV: tl.constexpr,
    INPUT_OF: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    SCALED: tl.constexpr,
    ORDERED: tl.constexpr,
    SUMMED: tl.constexpr,
    BIAS: tl.constexpr,
    TAPE: tl.constexpr,
    TAPE_WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    p, recurrences, backward, b, stop, low, high, into = program(
        length, steps, batch, begin, end, base, base_reverse, chunk_rows, reverse, RAGGED, BB
    )
    X: tl.constexpr = PROGRAM.temporaries
    dtype = carry.dtype.element_ty
    u += into * (GU * H)
    W: tl.constexpr = H if H > Q else Q
    state = recurrences * batch * W  # stride of a state
    own = (p * batch + b[:, None]) * W
    scratch += (p * batch + b[:, None]) * ((GV + X + PROJECTED) * H)
    own_m = scratch + (GV + X) * H
    sequence = sequences(noise, b, batch, D, ORDERED)
    count = tl.full([1, 1], H, dtype)

    for step in tl.range(low, high, num_stages=1):
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = (t < stop)[:, None]
        odd = ((step - low) & 1).to(tl.int64)
        before_at = own + odd * S * state
        after_at = own + (1 - odd) * S * state
        tape_at = (rows[:, None] * recurrences + p) * TAPE_WIDTH * H
        if RESETS:
            cut = cuts(resets, first, t, b, stop, steps, batch, backward, PACKED)
        else:
            cut = (b < 0)[:, None]
        results = zeros(PROGRAM.results, BB, 1, dtype)
        for k in tl.static_range(len(PROGRAM.written)):
            for m in tl.static_range(len(PROGRAM.moments)):
                if PROGRAM.moments[m].stage == k:
                    results = _with_moments(
                        results, u, rows, scratch, alive, PROGRAM.moments[m], H, GU, GV, BN
                    )
            totals = begin_totals(results, PROGRAM.written[k], PROGRAM.results)
            for n0 in tl.range(0, H, BN, num_stages=1):
                n = n0 + tl.arange(0, BN)
                inside = (n < H)[None, :]
                in_batch = (b < batch)[:, None] & inside
                here = alive & inside
                vs = _loads(scratch, n, here, 0, GV, H)
                given = gates(u, rows, n, t < stop, H, GU)
                us = ()
                for g in tl.static_range(GU):
                    us = us + (given[g].to(dtype),)
                if PROGRAM.gates[k] != 0:
                    products = zeros(GV, BB, BN, dtype)
                    for k0 in tl.range(0, width, BK):
                        q = k0 + tl.arange(0, BK)
                        row_inside = (b < batch)[:, None] & (q < Q)[None, :]
                        sums = ()
                        for g in tl.static_range(GV):
                            total = products[g]
                            if (PROGRAM.gates[k] >> g) & 1:
                                if PROGRAM.site_of[g] < 0:
                                    a = tl.load(
                                        carry + before_at + q[None, :], mask=row_inside, other=0.0
                                    )
                                    fresh = begun(begins, own + q[None, :], cut, row_inside, GIVEN)
                                    a = tl.where(cut, fresh, a)
                                else:
                                    a = _loads(
                                        scratch, q, row_inside,
                                        GV + PROGRAM.operands[PROGRAM.site_of[g]], 1, H,
                                    )[0]  # fmt: skip
                                w_at = w_hh + ((p * GV + g) * H + n[None, :]) * Q + q[:, None]
                                weights = (q < Q)[:, None] & inside
                                w = tl.load(w_at, mask=weights, other=0.0)
                                total += times(a, w, DOT, PRECISION)
                            sums = sums + (total,)
                        products = sums
                    bias = biases(b_hh, p, n, dtype, H, GV, BIAS)
                    values = ()
                    for g in tl.static_range(GV):
                        value = vs[g]
                        if (PROGRAM.gates[k] >> g) & 1:
                            value = joined(products[g], g, us, bias, INPUT_OF, SUMMED, BIAS)
                        values = values + (value,)
                    vs = values
                    if k + 1 < len(PROGRAM.written):
                        _store_some(scratch, H, vs, n, here, PROGRAM.gates[k], GV)
                x = _loads(scratch, n, here, GV, X, H)
                s = ()
                before = ()
                for j in tl.static_range(S):
                    if PROJECTED and j == 0:  # the cell does not read a projected state
                        s = s + (tl.zeros((BB, BN), dtype),)
                        before = before + (tl.zeros((BB, BN), dtype),)
                    else:
                        at = j * state + n[None, :]
                        old = tl.load(carry + before_at + at, mask=in_batch, other=0.0)
                        s = s + (old,)
                        fresh = begun(begins, own + at, cut, in_batch, GIVEN)
                        before = before + (tl.where(cut, fresh, old),)
                own_params = learned(parameters, p, n, dtype, H, L)
                once = drawn_once(noise, p, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
                z = drawn(once, noise, p, t, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
                out = zeros(S + K, BB, BN, dtype)
                made = CELL(k, us, vs, before, own_params + z, x, results, count, out)
                for j in tl.static_range(PROJECTED, S):
                    if (PROGRAM.written[k].states >> j) & 1:
                        new = tl.where(here, tl.broadcast_to(made[j], (BB, BN)), s[j])
                        tl.store(carry + after_at + j * state + n[None, :], new, mask=in_batch)
                        if j == 0:
                            y_at = y + (rows[:, None] * recurrences + p) * H + n[None, :]
                            tl.store(y_at, new.to(y.dtype.element_ty), mask=here)
                if PROJECTED:
                    _store_some(own_m, H, made[:1], n, here, PROGRAM.written[k].states, 1)
                if TAPE:
                    states: tl.constexpr = PROGRAM.written[k].states >> 1
                    _store_some(tape + tape_at, H, made[1:S], n, here, states, S - 1)
                    _store_some(
                        tape + tape_at + (S - 1) * H, H, made[S : S + K], n, here,
                        PROGRAM.written[k].saved, K,
                    )  # fmt: skip
                    if PROJECTED:
                        _store_some(
                            tape + tape_at + (S - 1 + K) * H, H, made[:1], n, here,
                            PROGRAM.written[k].states, 1,
                        )  # fmt: skip
                _store_some(
                    scratch + GV * H, H, made[S + K : S + K + X], n, here,
                    PROGRAM.written[k].temporaries, X,
                )  # fmt: skip
                totals = add_parts(
                    totals, made[S + K + X :], inside, PROGRAM.written[k], PROGRAM.results
                )  # fmt: skip
            results = totals
            tl.debug_barrier()  # what the stage wrote is complete
        if TAPE:
            results_at = tape_at + (S - 1 + K + PROJECTED) * H
            save_results(tape, results_at, results, alive, PROGRAM.saved_results)
        if PROJECTED:
            project(
                own_m, w_hr, carry + before_at, carry + after_at, y, rows, alive, b, batch, p,
                recurrences, hidden, H, Q, DOT, PRECISION, BB, BN, BK,
            )  # fmt: skip
    if (high - low) % 2 == 1:  # the last step left the states in the second buffer
        _take_second(carry, own, state, b, batch, H, Q, S, BN)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_streamed_stages(
    dy,  # arguments without a comment are as in `backward_streamed`
    dsteps,
    w_hh,
    parameters,
    noise,
    begins,
    s0,
    dbegins,
    ds,  # [2, S, P, B, W]
    y,
    tape,
    du,
    dv,
    h_prev,
    dp,
    operands,
    scratch,  # [P, B, X + J, H] in the type of computation: temporaries, then products, then the
    # gradient of m if state 0 is projected, as one more
    w_hr,
    dh,
    first,
    length,
    resets,
    steps: tl.int32,
    batch: tl.int64,
    begin: tl.int32,
    end: tl.int32,
    base: tl.int64,
    base_reverse: tl.int64,
    chunk_rows: tl.int64,
    reverse: tl.int64,
    hidden: tl.int32,
    width: tl.int32,
    CELL: tl.constexpr,
    PROGRAM: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    PROJECTED: tl.constexpr,
    GU: tl.constexpr,
    GV: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    SCALED: tl.constexpr,
    ORDERED: tl.constexpr,
    SUMMED: tl.constexpr,
    DY: tl.constexpr,
    DSTEPS: tl.constexpr,
    LIMIT: tl.constexpr,
    TAPE_WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    p, recurrences, backward, b, stop, low, high, into = program(
        length, steps, batch, begin, end, base, base_reverse, chunk_rows, reverse, RAGGED, BB
    )
    X: tl.constexpr = PROGRAM.temporaries
    J: tl.constexpr = PROGRAM.sites
    OUT: tl.constexpr = GU + GV + S + L + J
    dtype = s0.dtype.element_ty
    W: tl.constexpr = H if H > Q else Q
    state = recurrences * batch * W
    own = (p * batch + b[:, None]) * W
    scratch += (p * batch + b[:, None]) * ((X + J + PROJECTED) * H)
    sequence = sequences(noise, b, batch, D, ORDERED)
    count = tl.full([1, 1], H, dtype)
    all_summed: tl.constexpr = GU == GV and SUMMED == (1 << GV) - 1

    for back in tl.range(0, high - low, num_stages=1):
        step = high - 1 - back
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = (t < stop)[:, None]
        odd = ((high - 1 - step) & 1).to(tl.int64)
        after_at = own + odd * S * state  # gradients of the states after the step
        before_at = own + (1 - odd) * S * state
        rows_before, from_row, from_start, cut = before_step(
            first, resets, t, b, stop, steps, batch, backward, PACKED, RESETS
        )
        out_rows = (into + rows)[:, None]
        results = saved_results(
            tape, ((rows[:, None] * recurrences + p) * TAPE_WIDTH + S - 1 + K + PROJECTED) * H,
            alive, dtype, PROGRAM.saved_results, PROGRAM.results,
        )  # fmt: skip
        if PROJECTED:
            gather(
                dy, y, s0 + own, begins, own, ds + after_at, h_prev, dh, rows, rows_before,
                from_row, from_start, cut, alive, out_rows, p, recurrences, Q, DY, LIMIT, GIVEN,
                BN,
            )  # fmt: skip
            for n0 in tl.range(0, H, BN, num_stages=1):
                n = n0 + tl.arange(0, BN)
                dm = gradient_of_m(
                    ds + after_at, w_hr, p, n, alive, width, H, Q, DOT, PRECISION, BB, BN, BK
                )
                to = scratch + (X + J) * H + n[None, :]
                tl.store(to, dm, mask=alive & (n < H)[None, :])
            tl.debug_barrier()
        for k in tl.static_range(len(PROGRAM.written)):
            totals = begin_totals(results, PROGRAM.written[k], PROGRAM.results)
            for n0 in tl.range(0, H, BN, num_stages=1):
                n = n0 + tl.arange(0, BN)
                inside = (n < H)[None, :]
                in_batch = (b < batch)[:, None] & inside
                here = alive & inside
                products = ()
                for j in tl.static_range(J):
                    if (PROGRAM.written[k].sites >> j) & 1:
                        total = tl.zeros((BB, BN), dtype)
                        for k0 in tl.range(0, hidden, BK):
                            q = k0 + tl.arange(0, BK)
                            for g in tl.static_range(GV):
                                if PROGRAM.site_of[g] == j:
                                    total += _transposed(
                                        dv + out_rows * (GV * H) + g * H,
                                        w_hh + (p * GV + g) * H * Q,
                                        n, q, alive, dtype, H, Q, DOT, PRECISION,
                                    )  # fmt: skip
                        if k + 1 < len(PROGRAM.written):
                            tl.store(scratch + (X + j) * H + n[None, :], total, mask=here)
                    else:
                        total = _loads(scratch, n, here, X + j, 1, H)[0]
                    products = products + (total,)
                carried = ()
                for j in tl.static_range(S):
                    if PROJECTED and j == 0:
                        carried = carried + _loads(scratch, n, here, X + J, 1, H)
                    else:
                        at = ds + after_at + j * state + n[None, :]
                        carried = carried + (tl.load(at, mask=in_batch, other=0.0),)
                saved, before, after, dafter = reads(
                    dy, dsteps, y, tape, s0 + own, begins, own, state, carried, rows, rows_before,
                    from_row, from_start, cut, alive, n, p, recurrences, H, S, K, DY, DSTEPS, LIMIT,
                    GIVEN, PROJECTED, TAPE_WIDTH,
                )  # fmt: skip
                x = _loads(scratch, n, here, 0, X, H)
                own_params = learned(parameters, p, n, dtype, H, L)
                once = drawn_once(noise, p, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
                z = drawn(once, noise, p, t, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
                out = zeros(OUT, BB, BN, dtype)
                made = CELL(
                    k, saved, before, own_params + z, after, dafter, x, products, results, count,
                    out,
                )  # fmt: skip
                if not all_summed:
                    _store_some(
                        du + out_rows * (GU * H), H, made[:GU], n, here, PROGRAM.written[k].du, GU
                    )
                _store_some(
                    dv + out_rows * (GV * H), H, made[GU : GU + GV], n, here,
                    PROGRAM.written[k].dv, GV,
                )  # fmt: skip
                for j in tl.static_range(PROJECTED, S):
                    if (PROGRAM.written[k].states >> j) & 1:
                        d = tl.broadcast_to(made[GU + GV + j], (BB, BN))
                        if j > 0 and not GIVEN:  # the product is added below
                            d = tl.where(cut, 0.0, d)
                        d = tl.where(here, d, carried[j])
                        tl.store(ds + before_at + j * state + n[None, :], d, mask=in_batch)
                _store_some(
                    dp + out_rows * (L * H),
                    H,
                    made[GU + GV + S :],
                    n,
                    here,
                    PROGRAM.written[k].dp,
                    L,
                )
                _store_some(
                    operands + out_rows * (J * H), H, made[GU + GV + S + L :], n, here,
                    PROGRAM.written[k].operands, J,
                )  # fmt: skip
                _store_some(
                    scratch, H, made[OUT : OUT + X], n, here, PROGRAM.written[k].temporaries, X
                )
                if k == 0 and not PROJECTED:
                    h_at = h_prev + out_rows * H + n[None, :]
                    tl.store(h_at, before[0].to(h_prev.dtype.element_ty), mask=here)
                totals = add_parts(
                    totals, made[OUT + X :], inside, PROGRAM.written[k], PROGRAM.results
                )  # fmt: skip
            results = totals
            tl.debug_barrier()  # what the stage wrote is complete
        for n0 in tl.range(0, Q, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            here = alive & (n < Q)[None, :]
            total = tl.zeros((BB, BN), dtype)
            for k0 in tl.range(0, hidden, BK):
                q = k0 + tl.arange(0, BK)
                for g in tl.static_range(GV):
                    if PROGRAM.site_of[g] < 0:
                        total += _transposed(
                            dv + out_rows * (GV * H) + g * H, w_hh + (p * GV + g) * H * Q, n, q,
                            alive, dtype, H, Q, DOT, PRECISION,
                        )  # fmt: skip
            if not PROJECTED:
                total += tl.load(ds + before_at + n[None, :], mask=here, other=0.0)
            if not GIVEN:
                total = tl.where(cut, 0.0, total)
            if PROJECTED:
                in_batch = (b < batch)[:, None] & (n < Q)[None, :]
                old = tl.load(ds + after_at + n[None, :], mask=in_batch, other=0.0)
                tl.store(ds + before_at + n[None, :], tl.where(here, total, old), mask=in_batch)
            else:
                tl.debug_barrier()  # all threads have read the tile before any writes it
                tl.store(ds + before_at + n[None, :], total, mask=here)
        tl.debug_barrier()
        if GIVEN:
            second = (1 - odd) * S * state
            move_to_begins(ds + second, dbegins, own, state, cut, H, Q, S, BN)
    if (high - low) % 2 == 1:  # the last step left the gradients in the second buffer
        _take_second(ds, own, state, b, batch, H, Q, S, BN)


@triton.jit
def _transposed(
    dv, w, n, q, alive, dtype, H: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of `dv * w` of the rows q of a gate's block, for its columns n."""
    d = tl.load(dv + q[None, :], mask=alive & (q < H)[None, :], other=0.0)
    inside = (q < H)[:, None] & (n < Q)[None, :]
    block = tl.load(w + q[:, None] * Q + n[None, :], mask=inside, other=0.0)
    return times(d.to(dtype), block, DOT, PRECISION)
