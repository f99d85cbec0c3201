# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108
# Triton cannot unpack tuples, and a choice that depends on a constant reads best as `if`.
"""The backward sweep in Triton, resident and streamed; see `common.py`."""

import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.common import RUN_TIME, cuts, learned, program, row_numbers, times


@triton.jit
def _before(
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
def _state_0_before(
    y, start, rows, from_row, from_start, n, p, recurrences, dtype, Q: tl.constexpr
):
    """State 0 before a step, [BB, N]."""
    inside = (n < Q)[None, :]
    at = y + (rows[:, None] * recurrences + p) * Q + n[None, :]
    value = tl.load(at, mask=from_row & inside, other=0.0).to(dtype)
    return value + tl.load(start + n[None, :], mask=from_start & inside, other=0.0)


@triton.jit
def _reads(
    dy, y, tape, start, state, ds, rows, rows_before, from_row, from_start, alive, n, p,
    recurrences, H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, DY: tl.constexpr,
    PROJECTED: tl.constexpr,
):  # fmt: skip
    """The arguments of a step's derivative: saved values, states before and after it, and gradients
    of the states after it. A projected state 0 is here the cell's own output, without projection,
    and is not read before the step."""
    dtype = start.dtype.element_ty
    units = (n < H)[None, :]
    here = alive & units
    tape_width: tl.constexpr = S - 1 + K + PROJECTED
    at = tape + (rows[:, None] * recurrences + p) * tape_width * H + n[None, :]
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
            _state_0_before(
                y, start, rows_before, from_row, from_start, n, p, recurrences, dtype, H
            ),
        )
    if DY and not PROJECTED:
        dafter = (ds[0] + tl.load(dy + at_y, mask=here, other=0.0).to(dtype),)
    else:
        dafter = (ds[0],)
    at_before = tape + (rows_before[:, None] * recurrences + p) * tape_width * H + n[None, :]
    for j in tl.static_range(1, S):
        after = after + (tl.load(at + (j - 1) * H, mask=here, other=0.0).to(dtype),)
        dafter = dafter + (ds[j],)
        value = tl.load(at_before + (j - 1) * H, mask=from_row & units, other=0.0).to(dtype)
        initial = start + j * state + n[None, :]
        value += tl.load(initial, mask=from_start & units, other=0.0)
        before = before + (value,)
    return saved, before, after, dafter


@triton.jit
def _store_params(dp, out, rows, n, here, BB: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
                  FIRST: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Write the gradients of the learned parameters, which are in `out` from FIRST on."""
    at = dp + rows[:, None] * (L * H) + n[None, :]
    for j in tl.static_range(L):
        tl.store(at + j * H, tl.broadcast_to(out[FIRST + j], (BB, BN)), mask=here)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_resident(
    dy,  # [rows, P, H]
    w_hh,
    params,  # [P, L, H], or any pointer
    s0,  # [S, P, B, H] in the type of computation
    ds,  # [S, P, B, H] gradients of the states, first after the chunk, then before it
    y,
    tape,
    du,  # [P, chunk_rows, GU*H]
    dv,  # [P, chunk_rows, GV*H]; the same tensor if all gates are summed
    h_prev,  # [P, chunk_rows, H] state 0 before each step
    dp,  # [P, chunk_rows, L*H] in the type of computation, or any pointer
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
    H: tl.constexpr,
    GU: tl.constexpr,  # gates with rows in w_ih
    GV: tl.constexpr,  # gates with rows in w_hh
    INPUT_OF: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    SUMMED: tl.constexpr,
    DY: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
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
    own_params = learned(params, p, n, ds.dtype.element_ty, H, L)

    for back in tl.range(0, high - low):
        step = high - 1 - back
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = (t < stop)[:, None]
        here = alive & (n < H)[None, :]
        rows_before, from_row, from_start, cut = _before(
            first, resets, t, b, stop, steps, batch, backward, PACKED, RESETS
        )
        saved, before, after, dafter = _reads(
            dy, y, tape, s0 + recurrence, state, carried, rows, rows_before, from_row, from_start,
            alive, n, p, recurrences, H, S, K, DY, False,
        )  # fmt: skip
        out = CELL(saved, before, own_params, after, dafter)
        _store_params(dp, out, into + rows, n, here, BB, BN, H, GU + GV + S, L)
        recurrent = tl.broadcast_to(out[GU + GV], (BB, BN))
        at = (into + rows)[:, None] * (GV * H) + n[None, :]
        for g in tl.static_range(GV):
            d = tl.where(here, tl.broadcast_to(out[GU + g], (BB, BN)), 0.0)
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
    w_hh,  # [P, GV*H, Q]
    params,
    s0,  # [S, P, B, W], W = max(H, Q)
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
    INPUT_OF: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    SUMMED: tl.constexpr,
    DY: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
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
    start = s0 + (p * batch + b[:, None]) * W
    recurrence = ds + (p * batch + b[:, None]) * W
    all_summed: tl.constexpr = GU == GV and SUMMED == (1 << GV) - 1

    for back in tl.range(0, high - low, num_stages=1):
        step = high - 1 - back
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = (t < stop)[:, None]
        rows_before, from_row, from_start, cut = _before(
            first, resets, t, b, stop, steps, batch, backward, PACKED, RESETS
        )
        if PROJECTED:
            for q0 in tl.range(0, Q, BN, num_stages=1):
                q = q0 + tl.arange(0, BN)
                here = alive & (q < Q)[None, :]
                at = (into + rows)[:, None] * Q + q[None, :]
                d = tl.load(recurrence + q[None, :], mask=here, other=0.0)
                if DY:
                    at_y = dy + (rows[:, None] * recurrences + p) * Q + q[None, :]
                    d += tl.load(at_y, mask=here, other=0.0).to(dtype)
                h = _state_0_before(
                    y, start, rows_before, from_row, from_start, q, p, recurrences, dtype, Q
                )
                tl.store(h_prev + at, h.to(h_prev.dtype.element_ty), mask=here)
                tl.store(dh + at, d.to(dh.dtype.element_ty), mask=here)
                tl.debug_barrier()  # all threads have read the tile before any writes it
                tl.store(recurrence + q[None, :], d, mask=here)
            tl.debug_barrier()
        for n0 in tl.range(0, H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            here = alive & (n < H)[None, :]
            if PROJECTED:
                total = tl.zeros((BB, BN), dtype)
                for k0 in tl.range(0, width, BK):
                    k = k0 + tl.arange(0, BK)
                    d = tl.load(recurrence + k[None, :], mask=alive & (k < Q)[None, :], other=0.0)
                    at_w = w_hr + (p * Q + k[:, None]) * H + n[None, :]
                    w = tl.load(at_w, mask=(k < Q)[:, None] & (n < H)[None, :], other=0.0)
                    total += times(d, w, DOT, PRECISION)
                carried = (total,)
            else:
                carried = (tl.load(recurrence + n[None, :], mask=here, other=0.0),)
            for j in tl.static_range(1, S):
                carried = carried + (
                    tl.load(recurrence + j * state + n[None, :], mask=here, other=0.0),
                )
            saved, before, after, dafter = _reads(
                dy, y, tape, start, state, carried, rows, rows_before, from_row, from_start, alive,
                n, p, recurrences, H, S, K, DY, PROJECTED,
            )  # fmt: skip
            own_params = learned(params, p, n, dtype, H, L)
            out = CELL(saved, before, own_params, after, dafter)
            _store_params(dp, out, into + rows, n, here, BB, BN, H, GU + GV + S, L)
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
                    d = tl.where(cut, 0.0, tl.broadcast_to(out[GU + GV + j], (BB, BN)))
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
            tl.store(recurrence + k[None, :], tl.where(cut, 0.0, total), mask=here)
        tl.debug_barrier()
