# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton cannot unpack tuples, and a choice that depends on a constant reads best as `if`.
"""The forward sweep in Triton, resident and streamed; see `common.py`."""

import triton
import triton.language as tl

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
from fastrnn.kernels.gpu.triton.noise import drawn, drawn_once, sequences
from fastrnn.kernels.gpu.triton.projection import project
from fastrnn.kernels.gpu.triton.stages import forward_stages, save_results


@triton.jit
def gates(source, rows, n, alive, H: tl.constexpr, G: tl.constexpr):
    """G blocks [BB, N] from rows of G * H numbers."""
    out = ()
    for g in tl.static_range(G):
        at = source + rows[:, None] * (G * H) + g * H + n[None, :]
        out = out + (tl.load(at, mask=alive[:, None] & (n < H)[None, :], other=0.0),)
    return out


@triton.jit
def _inputs(
    u, recurrent, bias, dtype, GU: tl.constexpr, GV: tl.constexpr, INPUT_OF: tl.constexpr,
    SUMMED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The arguments `(u, v)` of the cell: for a summed gate, `v` is their sum."""
    us = ()
    for g in tl.static_range(GU):
        us = us + (u[g].to(dtype),)
    vs = ()
    for g in tl.static_range(GV):
        vs = vs + (joined(recurrent[g], g, us, bias, INPUT_OF, SUMMED, BIAS),)
    return us, vs


@triton.jit
def biases(b_hh, p, n, dtype, H: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr):
    out = ()
    if BIAS:
        for g in tl.static_range(G):
            out = out + (tl.load(b_hh + (p * G + g) * H + n, mask=n < H, other=0.0).to(dtype),)
    return out


@triton.jit(do_not_specialize=RUN_TIME)
def forward_resident(
    u,  # [P, chunk_rows, GU*H], with bias
    w_hh,  # [P, GV*H, H]
    b_hh,  # [P, GV*H], used for gates that are not summed
    parameters,  # [P, L, H], or any pointer
    noise,  # int64 [1 + D] or [1 + D + B], or any pointer
    begins,  # [S, P, B, H] states in which episodes begin, or any pointer
    carry,  # [S, P, B, H] in the type of computation: states before and after the chunk
    y,  # [rows, P, H]
    tape,  # [rows, P, TAPE_WIDTH, H]
    first,  # int64 [T+1]
    length,  # int64 [B]
    resets,  # uint8 [rows]
    steps: tl.int32,  # T
    batch: tl.int64,  # B
    begin: tl.int32,  # first step of the chunk
    end: tl.int32,
    base: tl.int64,  # first row of the chunk, for recurrences that run forward in time
    base_reverse: tl.int64,  # and for those that run backward
    chunk_rows: tl.int64,
    reverse: tl.int64,  # one bit per recurrence
    CELL: tl.constexpr,
    PROGRAM: tl.constexpr,  # of a cell whose step has stages
    H: tl.constexpr,
    GU: tl.constexpr,  # gates with rows in w_ih
    GV: tl.constexpr,  # gates with rows in w_hh
    INPUT_OF: tl.constexpr,  # four bits for each of these: its place in u
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
    BB: tl.constexpr,  # rows of the batch in a tile
    BN: tl.constexpr,  # units: H rounded up to a power of two
    BK: tl.constexpr,
):
    p, recurrences, backward, b, stop, low, high, into = program(
        length, steps, batch, begin, end, base, base_reverse, chunk_rows, reverse, RAGGED, BB
    )
    n = tl.arange(0, BN)
    k = tl.arange(0, BN)
    dtype = carry.dtype.element_ty
    u += into * (GU * H)
    in_batch = (b < batch)[:, None] & (n < H)[None, :]

    w = ()
    inside = (k < H)[:, None] & (n < H)[None, :]
    for g in tl.static_range(GV):
        w_at = w_hh + ((p * GV + g) * H + n[None, :]) * H + k[:, None]
        w = w + (tl.load(w_at, mask=inside, other=0.0),)
    bias = biases(b_hh, p, n, dtype, H, GV, BIAS)
    own_params = learned(parameters, p, n, dtype, H, L)
    sequence = sequences(noise, b, batch, D, ORDERED)
    once = drawn_once(noise, p, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
    s = ()
    state = (p * batch + b[:, None]) * H + n[None, :]
    of_all = recurrences * batch * H  # stride of a state
    for j in tl.static_range(S):
        s = s + (tl.load(carry + state + j * of_all, mask=in_batch, other=0.0),)

    # u of the next step is loaded while this one computes.
    t0 = tl.where(backward, steps - 1 - low, low)
    rows0 = row_numbers(first, tl.minimum(tl.maximum(t0, 0), steps - 1), b, batch, PACKED)
    ahead = gates(u, rows0, n, t0 < tl.where(low < high, stop, 0), H, GU)
    for step in tl.range(low, high):
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = t < stop
        if RESETS:
            cut = cuts(resets, first, t, b, stop, steps, batch, backward, PACKED)
            before = ()
            for j in tl.static_range(S):
                fresh = begun(begins, state + j * of_all, cut, in_batch, GIVEN)
                before = before + (tl.where(cut, fresh, s[j]),)
        else:
            before = s
        own = ahead
        later = tl.minimum(step + 1, high - 1)
        t_later = tl.where(backward, steps - 1 - later, later)
        ahead = gates(u, row_numbers(first, t_later, b, batch, PACKED), n, t_later < stop, H, GU)
        recurrent = ()
        for g in tl.static_range(GV):
            if PROGRAM.site_of[g] < 0:
                recurrent = recurrent + (times(before[0], w[g], DOT, PRECISION),)
            else:  # a stage multiplies another value
                recurrent = recurrent + (before[0],)
        us, vs = _inputs(own, recurrent, bias, dtype, GU, GV, INPUT_OF, SUMMED, BIAS)
        z = drawn(once, noise, p, t, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
        if len(PROGRAM.written) > 0:
            out = forward_stages(
                CELL, us, vs, before, own_params + z, w, bias, (n < H)[None, :], dtype, PROGRAM, H,
                GV, INPUT_OF, S, K, SUMMED, BIAS, DOT, PRECISION, BB, BN,
            )  # fmt: skip
        else:
            out = CELL(us, vs, before, own_params + z)
        here = alive[:, None] & (n < H)[None, :]
        after = ()
        for j in tl.static_range(S):
            new = tl.broadcast_to(out[j], (BB, BN))
            # Values past H may be NaN or infinite, whose product with a weight of zero is not zero.
            after = after + (tl.where(here, new, s[j]),)
        s = after
        y_at = y + (rows[:, None] * recurrences + p) * H + n[None, :]
        tl.store(y_at, after[0].to(y.dtype.element_ty), mask=here)
        if TAPE:
            tape_at = (rows[:, None] * recurrences + p) * TAPE_WIDTH * H
            for j in tl.static_range(S - 1 + K):
                value = tl.broadcast_to(out[1 + j], (BB, BN)).to(tape.dtype.element_ty)
                tl.store(tape + tape_at + j * H + n[None, :], value, mask=here)
            results = out[S + K :]
            save_results(
                tape, tape_at + (S - 1 + K) * H, results, alive[:, None], PROGRAM.saved_results
            )  # fmt: skip
    tl.debug_barrier()
    for j in tl.static_range(S):
        tl.store(carry + state + j * of_all, s[j], mask=in_batch)


@triton.jit(do_not_specialize=RUN_TIME)
def forward_streamed(
    u,
    w_hh,  # [P, GV*H, Q]
    b_hh,
    parameters,
    noise,
    begins,  # [S, P, B, W]
    carry,  # [S+1, P, B, W], W = max(H, Q); the last is a second buffer for state 0, and steps
    # alternate between the two
    y,  # [rows, P, Q]
    tape,  # [rows, P, TAPE_WIDTH, H]; the last value is m if state 0 is projected
    w_hr,  # [P, Q, H], or any pointer
    unprojected,  # [P, B, H] buffer for m in the type of computation, or any pointer
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
    INPUT_OF: tl.constexpr,  # four bits for each of these: its place in u
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
    BN: tl.constexpr,  # units computed at a time
    BK: tl.constexpr,  # numbers of the previous state 0 multiplied at a time
):
    p, recurrences, backward, b, stop, low, high, into = program(
        length, steps, batch, begin, end, base, base_reverse, chunk_rows, reverse, RAGGED, BB
    )
    dtype = carry.dtype.element_ty
    u += into * (GU * H)
    W: tl.constexpr = H if H > Q else Q
    state = recurrences * batch * W  # stride of a state in `carry`
    rows_of_states = (p * batch + b[:, None]) * W
    recurrence = carry + rows_of_states
    sequence = sequences(noise, b, batch, D, ORDERED)
    own_m = unprojected + (p * batch + b[:, None]) * H

    for step in tl.range(low, high, num_stages=1):
        t = tl.where(backward, steps - 1 - step, step)
        rows = row_numbers(first, t, b, batch, PACKED)
        alive = t < stop
        odd = ((step - low) & 1).to(tl.int64)
        h_before = recurrence + odd * S * state
        h_after = recurrence + (1 - odd) * S * state
        if RESETS:
            cut = cuts(resets, first, t, b, stop, steps, batch, backward, PACKED)
        for n0 in tl.range(0, H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            recurrent = ()
            for _g in tl.static_range(GV):
                recurrent = recurrent + (tl.zeros((BB, BN), dtype),)
            for k0 in tl.range(0, width if GV > 0 else 0, BK):
                k = k0 + tl.arange(0, BK)
                row_inside = (b < batch)[:, None] & (k < Q)[None, :]
                h = tl.load(h_before + k[None, :], mask=row_inside, other=0.0)
                if RESETS:
                    fresh = begun(begins, rows_of_states + k[None, :], cut, row_inside, GIVEN)
                    h = tl.where(cut, fresh, h)
                inside = (k < Q)[:, None] & (n < H)[None, :]
                sums = ()
                for g in tl.static_range(GV):
                    w_at = w_hh + ((p * GV + g) * H + n[None, :]) * Q + k[:, None]
                    w = tl.load(w_at, mask=inside, other=0.0)
                    sums = sums + (recurrent[g] + times(h, w, DOT, PRECISION),)
                recurrent = sums
            own = gates(u, rows, n, alive, H, GU)
            bias = biases(b_hh, p, n, dtype, H, GV, BIAS)
            own_params = learned(parameters, p, n, dtype, H, L)
            in_batch = (b < batch)[:, None] & (n < H)[None, :]
            s = ()
            before = ()
            for j in tl.static_range(S):
                if PROJECTED and j == 0:  # the cell does not read a projected state
                    s = s + (tl.zeros((BB, BN), dtype),)
                else:
                    source = h_before if j == 0 else recurrence + j * state
                    s = s + (tl.load(source + n[None, :], mask=in_batch, other=0.0),)
                if RESETS:
                    at = rows_of_states + j * state + n[None, :]
                    fresh = begun(begins, at, cut, in_batch, GIVEN)
                    before = before + (tl.where(cut, fresh, s[j]),)
                else:
                    before = before + (s[j],)
            us, vs = _inputs(own, recurrent, bias, dtype, GU, GV, INPUT_OF, SUMMED, BIAS)
            once = drawn_once(noise, p, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
            z = drawn(once, noise, p, t, sequence, n, dtype, D, PER_SEQUENCE, SCALED)
            out = CELL(us, vs, before, own_params + z)
            here = alive[:, None] & (n < H)[None, :]
            if S > 1:
                tl.debug_barrier()  # all threads have read the tile before any writes it
            for j in tl.static_range(S):
                new = tl.broadcast_to(out[j], (BB, BN))
                if PROJECTED and j == 0:
                    tl.store(own_m + n[None, :], new, mask=here)
                else:
                    new = tl.where(here, new, s[j])
                    to = h_after if j == 0 else recurrence + j * state
                    tl.store(to + n[None, :], new, mask=in_batch)
                if not PROJECTED and j == 0:
                    y_at = y + (rows[:, None] * recurrences + p) * H + n[None, :]
                    tl.store(y_at, new.to(y.dtype.element_ty), mask=here)
            if TAPE:
                for j in tl.static_range(TAPE_WIDTH):
                    # States after the first, saved values, and m.
                    value = out[1 + j] if j < S - 1 + K else out[0]
                    value = tl.broadcast_to(value, (BB, BN)).to(tape.dtype.element_ty)
                    place = (rows[:, None] * recurrences + p) * TAPE_WIDTH + j
                    tl.store(tape + place * H + n[None, :], value, mask=here)
        # State 0 has two buffers, so that a step does not overwrite what it reads.
        tl.debug_barrier()
        if PROJECTED:
            project(
                own_m, w_hr, h_before, h_after, y, rows, alive[:, None], b, batch, p, recurrences,
                hidden, H, Q, DOT, PRECISION, BB, BN, BK,
            )  # fmt: skip
    if (high - low) % 2 == 1:  # the last step left state 0 in the second buffer
        for n0 in tl.range(0, Q, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            in_batch = (b < batch)[:, None] & (n < Q)[None, :]
            last = tl.load(recurrence + S * state + n[None, :], mask=in_batch, other=0.0)
            tl.store(recurrence + n[None, :], last, mask=in_batch)
