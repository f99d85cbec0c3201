# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108
# Triton cannot unpack tuples, and a choice that depends on a constant reads best as `if`.
"""The backward sweep in Triton, resident and streamed; see `common.py`."""

import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.common import (
    RUN_TIME,
    begun,
    clipped,
    cuts,
    learned,
    program,
    row_numbers,
    state_0_before,
    times,
)
from fastrnn.kernels.gpu.triton.noise import drawn, drawn_once, sequences
from fastrnn.kernels.gpu.triton.projection import gather, gradient_of_m
from fastrnn.kernels.gpu.triton.stages import backward_stages, saved_results


@triton.jit
def before_step(
    first, resets, t, b, stop, steps, batch, backward, PACKED: tl.constexpr, RESETS: tl.constexpr
):
    """Where the states before a step are: the rows of the previous step, and [BB, 1] each, whether
    they are in those rows, whether they are initial states, and whether an episode begins here."""
    # `earlier` is a block [BB], because the interpreter has no `|` of a number and a block.
    earlier = tl.where(backward, t + 1, t - 1) + tl.zeros_like(stop)
    first_step = ((earlier < 0) | (earlier >= stop))[:, None]
    if RESETS:
        cut = cuts(resets, first, t, b, stop, steps, batch, backward, PACKED)
    else:
        cut = (b < 0)[:, None]
    from_row = (t < stop)[:, None] & (first_step == 0) & (cut == 0)
    from_start = (t < stop)[:, None] & first_step & (cut == 0)
    in_time = tl.where(backward, tl.minimum(t + 1, steps - 1), tl.maximum(t - 1, 0))
    return row_numbers(first, in_time, b, batch, PACKED), from_row, from_start, cut


@triton.jit
def reads(
    dy, dsteps, y, tape, start, begins, own, state, ds, rows, rows_before, from_row, from_start,
    cut, alive, n, p, recurrences, H: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    DY: tl.constexpr, DSTEPS: tl.constexpr, LIMIT: tl.constexpr, GIVEN: tl.constexpr,
    PROJECTED: tl.constexpr, TAPE_WIDTH: tl.constexpr,
):  # fmt: skip
    """The arguments of a step's derivative: saved values, states before and after it, and gradients
    of the states after it. A projected state 0 is here the cell's own output, without projection,
    and is not read before the step."""
    dtype = start.dtype.element_ty
    units = (n < H)[None, :]
    here = alive & units
    at = tape + (rows[:, None] * recurrences + p) * TAPE_WIDTH * H + n[None, :]
    at_y = (rows[:, None] * recurrences + p) * H + n[None, :]
    saved = ()
    for j in tl.static_range(K):
        saved = saved + (tl.load(at + (S - 1 + j) * H, mask=here, other=0.0).to(dtype),)
    if PROJECTED:
        after = (tl.load(at + (S - 1 + K) * H, mask=here, other=0.0).to(dtype),)
        before = (tl.zeros_like(after[0]),)
    else:
        after = (tl.load(y + at_y, mask=here, other=0.0).to(dtype),)
        before = (
            state_0_before(
                y, start, begins, own, rows_before, from_row, from_start, cut, n, p, recurrences,
                dtype, H, GIVEN,
            ),
        )  # fmt: skip
    if PROJECTED:
        dafter = (ds[0],)
    elif DY:
        dafter = (clipped(ds[0] + tl.load(dy + at_y, mask=here, other=0.0).to(dtype), LIMIT),)
    else:
        dafter = (clipped(ds[0], LIMIT),)
    at_before = tape + (rows_before[:, None] * recurrences + p) * TAPE_WIDTH * H + n[None, :]
    for j in tl.static_range(1, S):
        after = after + (tl.load(at + (j - 1) * H, mask=here, other=0.0).to(dtype),)
        d = ds[j]
        if DSTEPS:
            at_d = dsteps + ((rows[:, None] * recurrences + p) * (S - 1) + j - 1) * H + n[None, :]
            d += tl.load(at_d, mask=here, other=0.0).to(dtype)
        dafter = dafter + (clipped(d, LIMIT),)
        value = tl.load(at_before + (j - 1) * H, mask=from_row & units, other=0.0).to(dtype)
        initial = start + j * state + n[None, :]
        value += tl.load(initial, mask=from_start & units, other=0.0)
        value += begun(begins, own + (j * state + n)[None, :], cut, units, GIVEN)
        before = before + (value,)
    return saved, before, after, dafter


@triton.jit
def store_rows(to, blocks, rows, n, here, BB: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
               COUNT: tl.constexpr):  # fmt: skip
    """Write COUNT blocks side by side into rows of COUNT * H numbers."""
    at = to + rows[:, None] * (COUNT * H) + n[None, :]
    for j in tl.static_range(COUNT):
        value = tl.broadcast_to(blocks[j], (BB, BN)).to(to.dtype.element_ty)
        tl.store(at + j * H, value, mask=here)


@triton.jit
def _add_to_begins(dbegins, at, d, cut, inside):
    """Add gradients of a state before a step, where `cut`, to those of the given state."""
    total = d + tl.load(dbegins + at, mask=cut & inside, other=0.0)
    tl.debug_barrier()  # all threads have read the sums before any writes them
    tl.store(dbegins + at, total, mask=cut & inside)


@triton.jit
def move_to_begins(
    ds, dbegins, own, state, cut, H: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The same for all states of a row, which lie in global memory: zeros stay behind."""
    for j in tl.static_range(S):
        for n0 in tl.range(0, Q if j == 0 else H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            inside = (n < (Q if j == 0 else H))[None, :]
            at = own + (j * state + n)[None, :]
            d = tl.load(ds + at, mask=cut & inside, other=0.0)
            _add_to_begins(dbegins, at, d, cut, inside)
            tl.store(ds + at, tl.zeros_like(d), mask=cut & inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=RUN_TIME)
def backward_resident(
    dy,  # [rows, P, H]
    dsteps,  # [rows, P, S-1, H] gradients of the states after every step, or any pointer
    w_hh,
    parameters,  # [P, L, H], or any pointer
    noise,  # as in `forward.py`
    begins,
    s0,  # [S, P, B, H] in the type of computation
    dbegins,  # shaped as `begins`: receives the sums of their gradients
    ds,  # [S, P, B, H] gradients of the states, first after the chunk, then before it
    y,
    tape,
    du,  # [P, chunk_rows, GU*H]
    dv,  # [P, chunk_rows, GV*H]; the same tensor if all gates are summed
    h_prev,  # [P, chunk_rows, H] state 0 before each step
    dp,  # [P, chunk_rows, L*H] in the type of computation, or any pointer
    operands,  # [P, chunk_rows, J*H] what the J products of other values multiply, or any pointer
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
    CELL: tl.constexpr,
    PROGRAM: tl.constexpr,
    H: tl.constexpr,
    GU: tl.constexpr,  # gates with rows in w_ih
    GV: tl.constexpr,  # gates with rows in w_hh
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
    n = tl.arange(0, BN)
    k = tl.arange(0, BN)
    in_batch = (b < batch)[:, None] & (n < H)[None, :]
    all_summed: tl.constexpr = GU == GV and SUMMED == (1 << GV) - 1

    w = ()
    inside = (n < H)[:, None] & (k < H)[None, :]
    for g in tl.static_range(GV):
        w_at = w_hh + ((p * GV + g) * H + n[:, None]) * H + k[None, :]
        w = w + (tl.load(w_at, mask=inside, other=0.0),)
    carried = ()
    state = recurrences * batch * H  # stride of a state
    recurrence = (p * batch + b[:, None]) * H
    for j in tl.static_range(S):
        ds_at = ds + recurrence + j * state + n[None, :]
        carried = carried + (tl.load(ds_at, mask=in_batch, other=0.0),)
    own_params = learned(parameters, p, n, ds.dtype.element_ty, H, L)
    sequence = sequences(noise, b, batch, D, ORDERED)
    once = drawn_once(noise, p, sequence, n, ds.dtype.element_ty, D, PER_SEQUENCE, SCALED)

    for back in tl.range(0, high - low):
        step = high - 1 - back
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = (t < stop)[:, None]
        here = alive & (n < H)[None, :]
        rows_before, from_row, from_start, cut = before_step(
            first, resets, t, b, stop, steps, batch, backward, PACKED, RESETS
        )
        saved, before, after, dafter = reads(
            dy, dsteps, y, tape, s0 + recurrence, begins, recurrence, state, carried, rows,
            rows_before, from_row, from_start, cut, alive, n, p, recurrences, H, S, K, DY, DSTEPS,
            LIMIT, GIVEN, False, TAPE_WIDTH,
        )  # fmt: skip
        z = drawn(
            once, noise, p, t, sequence, n, ds.dtype.element_ty, D, PER_SEQUENCE, SCALED
        )  # fmt: skip
        if len(PROGRAM.written) > 0:
            results = saved_results(
                tape, ((rows[:, None] * recurrences + p) * TAPE_WIDTH + S - 1 + K) * H, alive,
                ds.dtype.element_ty, PROGRAM.saved_results, PROGRAM.results,
            )  # fmt: skip
            out = backward_stages(
                CELL, saved, before, own_params + z, after, dafter, results, w, here,
                (n < H)[None, :], ds.dtype.element_ty, PROGRAM, H, GU, GV, S, L, DOT,
                PRECISION, BB, BN,
            )  # fmt: skip
            store_rows(
                operands, out[GU + GV + S + L :], into + rows, n, here, BB, BN, H, PROGRAM.sites
            )  # fmt: skip
        else:
            out = CELL(saved, before, own_params + z, after, dafter)
        store_rows(dp, out[GU + GV + S :], into + rows, n, here, BB, BN, H, L)
        recurrent = tl.broadcast_to(out[GU + GV], (BB, BN))
        at = (into + rows)[:, None] * (GV * H) + n[None, :]
        for g in tl.static_range(GV):
            d = tl.where(here, tl.broadcast_to(out[GU + g], (BB, BN)), 0.0)
            if PROGRAM.site_of[g] < 0:
                recurrent += times(d, w[g], DOT, PRECISION)
            tl.store(dv + at + g * H, d.to(dv.dtype.element_ty), mask=here)
        if not all_summed:
            at = (into + rows)[:, None] * (GU * H) + n[None, :]
            for g in tl.static_range(GU):
                d = tl.broadcast_to(out[g], (BB, BN))
                tl.store(du + at + g * H, d.to(du.dtype.element_ty), mask=here)
        h_at = (into + rows)[:, None] * H + n[None, :]
        tl.store(h_prev + h_at, before[0].to(h_prev.dtype.element_ty), mask=here)
        passed = ()
        for j in tl.static_range(S):
            if j == 0:
                d = recurrent
            else:
                d = tl.broadcast_to(out[GU + GV + j], (BB, BN))
            if GIVEN:
                _add_to_begins(dbegins, recurrence + j * state + n[None, :], d, cut, here)
            if RESETS:
                d = tl.where(cut, 0.0, d)
            passed = passed + (tl.where(here, d, carried[j]),)
        carried = passed
    tl.debug_barrier()
    for j in tl.static_range(S):
        tl.store(ds + recurrence + j * state + n[None, :], carried[j], mask=in_batch)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_streamed(
    dy,  # [rows, P, Q]
    dsteps,  # [rows, P, S-1, H], or any pointer
    w_hh,  # [P, GV*H, Q]
    parameters,
    noise,
    begins,
    s0,  # [S, P, B, W], W = max(H, Q)
    dbegins,
    ds,  # shaped as s0
    y,  # [rows, P, Q]
    tape,
    du,
    dv,
    h_prev,  # [P, chunk_rows, Q]
    dp,
    w_hr,  # [P, Q, H], or any pointer
    dh,  # [P, chunk_rows, Q] gradient of state 0 after each step, or any pointer
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
    H: tl.constexpr,
    Q: tl.constexpr,
    PROJECTED: tl.constexpr,
    GU: tl.constexpr,  # gates with rows in w_ih
    GV: tl.constexpr,  # gates with rows in w_hh
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
    BN: tl.constexpr,  # units whose derivative is computed, or numbers summed, at a time
    BK: tl.constexpr,  # units, or numbers of state 0, multiplied at a time
):
    p, recurrences, backward, b, stop, low, high, into = program(
        length, steps, batch, begin, end, base, base_reverse, chunk_rows, reverse, RAGGED, BB
    )
    dtype = ds.dtype.element_ty
    W: tl.constexpr = H if H > Q else Q
    state = recurrences * batch * W
    rows_of_states = (p * batch + b[:, None]) * W
    start, recurrence = s0 + rows_of_states, ds + rows_of_states
    sequence = sequences(noise, b, batch, D, ORDERED)
    all_summed: tl.constexpr = GU == GV and SUMMED == (1 << GV) - 1

    for back in tl.range(0, high - low, num_stages=1):
        step = high - 1 - back
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = (t < stop)[:, None]
        rows_before, from_row, from_start, cut = before_step(
            first, resets, t, b, stop, steps, batch, backward, PACKED, RESETS
        )
        if PROJECTED:
            gather(
                dy, y, start, begins, rows_of_states, recurrence, h_prev, dh, rows, rows_before,
                from_row, from_start, cut, alive, (into + rows)[:, None], p, recurrences, Q, DY,
                LIMIT, GIVEN, BN,
            )  # fmt: skip
        for n0 in tl.range(0, H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            here = alive & (n < H)[None, :]
            if PROJECTED:
                dm = gradient_of_m(
                    recurrence, w_hr, p, n, alive, width, H, Q, DOT, PRECISION, BB, BN, BK
                )
                carried = (dm,)
            else:
                carried = (tl.load(recurrence + n[None, :], mask=here, other=0.0),)
            for j in tl.static_range(1, S):
                carried = carried + (
                    tl.load(recurrence + j * state + n[None, :], mask=here, other=0.0),
                )
            saved, before, after, dafter = reads(
                dy, dsteps, y, tape, start, begins, rows_of_states, state, carried, rows,
                rows_before, from_row, from_start, cut, alive, n, p, recurrences, H, S, K, DY,
                DSTEPS, LIMIT, GIVEN, PROJECTED, TAPE_WIDTH,
            )  # fmt: skip
            own_params = learned(parameters, p, n, dtype, H, L)
            once = drawn_once(noise, p, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
            z = drawn(once, noise, p, t, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
            out = CELL(saved, before, own_params + z, after, dafter)
            store_rows(dp, out[GU + GV + S :], into + rows, n, here, BB, BN, H, L)
            at = (into + rows)[:, None] * (GV * H) + n[None, :]
            for g in tl.static_range(GV):
                d = tl.broadcast_to(out[GU + g], (BB, BN))
                tl.store(dv + at + g * H, d.to(dv.dtype.element_ty), mask=here)
            if not all_summed:
                at = (into + rows)[:, None] * (GU * H) + n[None, :]
                for g in tl.static_range(GU):
                    d = tl.broadcast_to(out[g], (BB, BN))
                    tl.store(du + at + g * H, d.to(du.dtype.element_ty), mask=here)
            if not PROJECTED:
                h_at = (into + rows)[:, None] * H + n[None, :]
                tl.store(h_prev + h_at, before[0].to(h_prev.dtype.element_ty), mask=here)
            tl.debug_barrier()  # all threads have read the gradients before any writes them
            for j in tl.static_range(S):
                if j > 0 or not PROJECTED:
                    d = tl.broadcast_to(out[GU + GV + j], (BB, BN))
                    if not GIVEN:
                        d = tl.where(cut, 0.0, d)
                    tl.store(recurrence + j * state + n[None, :], d, mask=here)
        tl.debug_barrier()  # dv is complete
        for k0 in tl.range(0, Q, BN, num_stages=1):
            k = k0 + tl.arange(0, BN)
            here = alive & (k < Q)[None, :]
            total = tl.zeros((BB, BN), dtype)
            for n0 in tl.range(0, hidden if GV > 0 else 0, BK):
                n = n0 + tl.arange(0, BK)
                inside = alive & (n < H)[None, :]
                at = (into + rows)[:, None] * (GV * H) + n[None, :]
                for g in tl.static_range(GV):
                    d = tl.load(dv + at + g * H, mask=inside, other=0.0)
                    at_w = w_hh + ((p * GV + g) * H + n[:, None]) * Q + k[None, :]
                    w = tl.load(at_w, mask=(n < H)[:, None] & (k < Q)[None, :], other=0.0)
                    total += times(d.to(dtype), w, DOT, PRECISION)
            if not PROJECTED:
                total += tl.load(recurrence + k[None, :], mask=here, other=0.0)
                tl.debug_barrier()
            if not GIVEN:
                total = tl.where(cut, 0.0, total)
            tl.store(recurrence + k[None, :], total, mask=here)
        tl.debug_barrier()
        if GIVEN:
            move_to_begins(ds, dbegins, rows_of_states, state, cut, H, Q, S, BN)
