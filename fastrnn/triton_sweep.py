# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108
# Triton's functions have no types: they are compiled, not run. It has no unpacking of tuples, and
# what depends on a constant reads best as `if`.
"""The sweep in Triton, forward and backward, for any cell.

A program runs one scan `p` and one tile of `BB` rows of the batch from the first step of a chunk to
its last, so a chunk is one launch and no program waits for another. Two ways:

- *resident*: the recurrent weights are loaded once and stay in the program, in registers or shared
  memory as the compiler has it, and so do the states. For small H and for heads.
- *streamed*: a step walks over tiles of the weights, which come from the cache every time. The
  states lie in global memory, where the steps of a program hand them on to one another.

The cell's functions come in as `CELL`. Everything with one item per gate or state is a tuple. `T`,
`B` and everything else that a batch decides are run-time values; a kernel is compiled once for a
cell, an H and the tile that `plan.py` chose. Offsets are 64 bits wide.

Names: `G` gates, `S` states, `K` kept values, `n` a unit, `b` a row of the batch, `t` the position
in time, `step` the position in the scan's own direction. Row `r` of the batch's rows begins at
`first[t]` for packed input and at `t * B` for dense; row `b` lives while `t < stop[b]`.
"""

import triton
import triton.language as tl

# Arguments that change with every batch: a kernel must not be compiled for their values.
_RUN_TIME = ("steps", "batch", "begin", "end", "base", "base_reverse", "chunk_rows", "reverse")


@triton.jit
def _stop(length, b, steps, batch, RAGGED: tl.constexpr):
    """Steps of each row; none for rows past the batch."""
    if RAGGED:
        return tl.load(length + b, mask=b < batch, other=0).to(tl.int32)
    else:
        return tl.where(b < batch, steps, 0)


@triton.jit
def _bounds(stop, steps, begin, end, backward, RAGGED: tl.constexpr):
    """The steps of the chunk at which any row of the tile lives."""
    low = begin
    high = end
    if RAGGED:
        longest = tl.max(stop, axis=0)
        low = tl.where(backward, tl.maximum(begin, steps - longest), begin)
        high = tl.where(backward, end, tl.minimum(end, longest))
    return low, high


@triton.jit
def _rows(first, t, b, batch, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(first + t) + b
    else:
        return t.to(tl.int64) * batch + b


@triton.jit
def _cut(resets, first, t, b, stop, steps, batch, backward, PACKED: tl.constexpr):
    """[BB, 1] whether an episode begins between the step before and this one."""
    edge = t + tl.where(backward, 1, 0)
    inside = edge < stop
    rows = _rows(first, tl.minimum(edge, steps - 1), b, batch, PACKED)
    return (tl.load(resets + rows, mask=inside, other=0) != 0)[:, None]


@triton.jit
def _times(a, w, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """[M, K] times [K, N]: on tensor cores for 16 rows or more, by multiplying and adding else."""
    if DOT:
        return tl.dot(a.to(w.dtype), w, input_precision=PRECISION)
    else:
        return tl.sum(a[:, :, None] * w.to(a.dtype)[None, :, :], axis=1)


@triton.jit
def _gates(source, rows, n, alive, H: tl.constexpr, G: tl.constexpr):
    """G blocks [BB, N] of rows [G * H]."""
    out = ()
    for g in tl.static_range(G):
        at = source + rows[:, None] * (G * H) + g * H + n[None, :]
        out = out + (tl.load(at, mask=alive[:, None] & (n < H)[None, :], other=0.0),)
    return out


@triton.jit
def _inputs(u, recurrent, bias, dtype, G: tl.constexpr, TIED: tl.constexpr, BIAS: tl.constexpr):
    """`(u, v)` as the cell takes them: for a tied gate, `v` is their sum."""
    us = ()
    vs = ()
    for g in tl.static_range(G):
        own = u[g].to(dtype)
        v = recurrent[g]
        if (TIED >> g) & 1:
            v += own
        elif BIAS:
            v += bias[g][None, :]
        us = us + (own,)
        vs = vs + (v,)
    return us, vs


@triton.jit
def _bias(b_hh, p, n, dtype, H: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr):
    out = ()
    if BIAS:
        for g in tl.static_range(G):
            out = out + (tl.load(b_hh + (p * G + g) * H + n, mask=n < H, other=0.0).to(dtype),)
    return out


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_resident(
    u,  # [P, chunk_rows, G*H], bias in
    w_hh,  # [P, G*H, H]
    b_hh,  # [P, G*H] where a gate keeps u and v apart
    carry,  # [S, P, B, H] in the type of computation: states before and after the chunk
    y,  # [rows, P, H]
    tape,  # [rows, P, S-1+K, H]
    first,  # int64 [T+1]
    length,  # int64 [B]
    resets,  # uint8 [rows]
    steps: tl.int32,  # T
    batch: tl.int64,  # B
    begin: tl.int32,  # of the chunk, in steps
    end: tl.int32,
    base: tl.int64,  # row of the batch at which the chunk begins, for scans forward in time
    base_reverse: tl.int64,  # and for those that run backward
    chunk_rows: tl.int64,
    reverse: tl.int64,  # a bit per scan
    CELL: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TIED: tl.constexpr,
    BIAS: tl.constexpr,
    TAPE: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BB: tl.constexpr,  # rows of the batch in a tile
    BN: tl.constexpr,  # units, H and up to the next power of two
    BK: tl.constexpr,
):
    p = tl.program_id(1).to(tl.int64)
    lanes = tl.num_programs(1)
    backward = ((reverse >> p) & 1) != 0
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    n = tl.arange(0, BN)
    k = tl.arange(0, BN)
    dtype = carry.dtype.element_ty
    stop = _stop(length, b, steps, batch, RAGGED)
    low, high = _bounds(stop, steps, begin, end, backward, RAGGED)
    u += (p * chunk_rows - tl.where(backward, base_reverse, base)) * (G * H)
    in_batch = (b < batch)[:, None] & (n < H)[None, :]

    w = ()
    inside = (k < H)[:, None] & (n < H)[None, :]
    for g in tl.static_range(G):
        w_at = w_hh + ((p * G + g) * H + n[None, :]) * H + k[:, None]
        w = w + (tl.load(w_at, mask=inside, other=0.0),)
    bias = _bias(b_hh, p, n, dtype, H, G, BIAS)
    s = ()
    state = carry + (p * batch + b[:, None]) * H + n[None, :]
    for j in tl.static_range(S):
        s = s + (tl.load(state + j * lanes * batch * H, mask=in_batch, other=0.0),)

    # u of the next step is under way while this one computes.
    t0 = tl.where(backward, steps - 1 - low, low)
    rows0 = _rows(first, tl.minimum(tl.maximum(t0, 0), steps - 1), b, batch, PACKED)
    ahead = _gates(u, rows0, n, t0 < tl.where(low < high, stop, 0), H, G)
    for step in tl.range(low, high):
        t = tl.where(backward, steps - 1 - step, step)
        rows = _rows(first, t, b, batch, PACKED)
        alive = t < stop
        if RESETS:
            cut = _cut(resets, first, t, b, stop, steps, batch, backward, PACKED)
            before = ()
            for j in tl.static_range(S):
                before = before + (tl.where(cut, 0.0, s[j]),)
        else:
            before = s
        own = ahead
        later = tl.minimum(step + 1, high - 1)
        t_later = tl.where(backward, steps - 1 - later, later)
        ahead = _gates(u, _rows(first, t_later, b, batch, PACKED), n, t_later < stop, H, G)
        recurrent = ()
        for g in tl.static_range(G):
            recurrent = recurrent + (_times(before[0], w[g], DOT, PRECISION),)
        us, vs = _inputs(own, recurrent, bias, dtype, G, TIED, BIAS)
        out = CELL(us, vs, before)
        here = alive[:, None] & (n < H)[None, :]
        after = ()
        for j in tl.static_range(S):
            new = tl.broadcast_to(out[j], (BB, BN))
            # Past H there may be anything, which times a weight of zero need not be zero.
            after = after + (tl.where(here, new, s[j]),)
        s = after
        y_at = y + (rows[:, None] * lanes + p) * H + n[None, :]
        tl.store(y_at, after[0].to(y.dtype.element_ty), mask=here)
        if TAPE:
            for j in tl.static_range(S - 1 + K):
                value = tl.broadcast_to(out[1 + j], (BB, BN)).to(tape.dtype.element_ty)
                tape_at = tape + ((rows[:, None] * lanes + p) * (S - 1 + K) + j) * H + n[None, :]
                tl.store(tape_at, value, mask=here)
    for j in tl.static_range(S):
        tl.store(state + j * lanes * batch * H, s[j], mask=in_batch)


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_streamed(
    u,
    w_hh,
    b_hh,
    carry,  # [S+1, P, B, H]: the last is state 0 again, which the steps read and write in turn
    y,
    tape,
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
    G: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TIED: tl.constexpr,
    BIAS: tl.constexpr,
    TAPE: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,  # units computed at a time
    BK: tl.constexpr,  # units of the step before multiplied at a time
):
    p = tl.program_id(1).to(tl.int64)
    lanes = tl.num_programs(1)
    backward = ((reverse >> p) & 1) != 0
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    dtype = carry.dtype.element_ty
    stop = _stop(length, b, steps, batch, RAGGED)
    low, high = _bounds(stop, steps, begin, end, backward, RAGGED)
    u += (p * chunk_rows - tl.where(backward, base_reverse, base)) * (G * H)
    state = lanes * batch * H  # from one state to the next in `carry`
    lane = carry + (p * batch + b[:, None]) * H

    for step in tl.range(low, high, num_stages=1):
        t = tl.where(backward, steps - 1 - step, step)
        rows = _rows(first, t, b, batch, PACKED)
        alive = t < stop
        odd = ((step - low) & 1).to(tl.int64)
        h_before = lane + odd * S * state
        h_after = lane + (1 - odd) * S * state
        if RESETS:
            cut = _cut(resets, first, t, b, stop, steps, batch, backward, PACKED)
        for n0 in tl.range(0, H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            recurrent = ()
            for _g in tl.static_range(G):
                recurrent = recurrent + (tl.zeros((BB, BN), dtype),)
            for k0 in tl.range(0, H, BK):
                k = k0 + tl.arange(0, BK)
                row_inside = (b < batch)[:, None] & (k < H)[None, :]
                h = tl.load(h_before + k[None, :], mask=row_inside, other=0.0)
                if RESETS:
                    h = tl.where(cut, 0.0, h)
                inside = (k < H)[:, None] & (n < H)[None, :]
                sums = ()
                for g in tl.static_range(G):
                    w_at = w_hh + ((p * G + g) * H + n[None, :]) * H + k[:, None]
                    w = tl.load(w_at, mask=inside, other=0.0)
                    sums = sums + (recurrent[g] + _times(h, w, DOT, PRECISION),)
                recurrent = sums
            own = _gates(u, rows, n, alive, H, G)
            bias = _bias(b_hh, p, n, dtype, H, G, BIAS)
            in_batch = (b < batch)[:, None] & (n < H)[None, :]
            s = ()
            before = ()
            for j in tl.static_range(S):
                source = h_before if j == 0 else lane + j * state
                s = s + (tl.load(source + n[None, :], mask=in_batch, other=0.0),)
                if RESETS:
                    before = before + (tl.where(cut, 0.0, s[j]),)
                else:
                    before = before + (s[j],)
            us, vs = _inputs(own, recurrent, bias, dtype, G, TIED, BIAS)
            out = CELL(us, vs, before)
            here = alive[:, None] & (n < H)[None, :]
            for j in tl.static_range(S):
                new = tl.where(here, tl.broadcast_to(out[j], (BB, BN)), s[j])
                to = h_after if j == 0 else lane + j * state
                tl.store(to + n[None, :], new, mask=in_batch)
                if j == 0:
                    y_at = y + (rows[:, None] * lanes + p) * H + n[None, :]
                    tl.store(y_at, new.to(y.dtype.element_ty), mask=here)
            if TAPE:
                for j in tl.static_range(S - 1 + K):
                    value = tl.broadcast_to(out[1 + j], (BB, BN)).to(tape.dtype.element_ty)
                    place = (rows[:, None] * lanes + p) * (S - 1 + K) + j
                    tl.store(tape + place * H + n[None, :], value, mask=here)
        # What a program wrote before a barrier all of its threads read after it: the barrier
        # orders memory among the threads of a block, and no other block touches these rows. Two
        # places for state 0 keep this step's reads from its own writes.
        tl.debug_barrier()
    if (high - low) % 2 == 1:  # the last step left state 0 in the second place
        for n0 in tl.range(0, H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            in_batch = (b < batch)[:, None] & (n < H)[None, :]
            last = tl.load(lane + S * state + n[None, :], mask=in_batch, other=0.0)
            tl.store(lane + n[None, :], last, mask=in_batch)


@triton.jit
def _step_backward(
    dy, y, tape, s0, ds, first, resets, rows, t, b, n, p, lanes, stop, steps, batch, backward,
    H: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    DY: tl.constexpr, PACKED: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """What the derivative of a step reads: kept values, states before and after, gradients of the
    latter, and whether an episode begins at the step; and state 0 before it as it is stored."""
    dtype = s0.dtype.element_ty
    units = (n < H)[None, :]
    here = (t < stop)[:, None] & units
    W: tl.constexpr = S - 1 + K
    at = (rows[:, None] * lanes + p) * W * H + n[None, :]
    kept = ()
    for j in tl.static_range(K):
        kept = kept + (tl.load(tape + at + (S - 1 + j) * H, mask=here, other=0.0).to(dtype),)
    at_y = (rows[:, None] * lanes + p) * H + n[None, :]
    after = (tl.load(y + at_y, mask=here, other=0.0).to(dtype),)
    for j in tl.static_range(S - 1):
        after = after + (tl.load(tape + at + j * H, mask=here, other=0.0).to(dtype),)
    if DY:
        dafter = (ds[0] + tl.load(dy + at_y, mask=here, other=0.0).to(dtype),)
    else:
        dafter = (ds[0],)
    for j in tl.static_range(S - 1):
        dafter = dafter + (ds[j + 1],)

    # The step before: another row, or the initial state.
    # Per row: the interpreter has no `|` of a number and a block.
    earlier = tl.where(backward, t + 1, t - 1) + tl.zeros_like(stop)
    first_step = (earlier < 0) | (earlier >= stop)
    if RESETS:
        cut = _cut(resets, first, t, b, stop, steps, batch, backward, PACKED)
    else:
        cut = (b < 0)[:, None]
    from_row = here & (first_step == 0)[:, None] & (cut == 0)
    from_start = here & first_step[:, None] & (cut == 0)
    in_time = tl.where(backward, tl.minimum(t + 1, steps - 1), tl.maximum(t - 1, 0))
    rows = _rows(first, in_time, b, batch, PACKED)
    at = (rows[:, None] * lanes + p) * W * H + n[None, :]
    at_y = (rows[:, None] * lanes + p) * H + n[None, :]
    start = s0 + (p * batch + b[:, None]) * H + n[None, :]
    before = ()
    for j in tl.static_range(S):
        if j == 0:
            value = tl.load(y + at_y, mask=from_row, other=0.0)
        else:
            value = tl.load(tape + at + (j - 1) * H, mask=from_row, other=0.0)
        initial = tl.load(start + j * lanes * batch * H, mask=from_start, other=0.0)
        before = before + (value.to(dtype) + initial,)
    return kept, before, after, dafter, cut


@triton.jit(do_not_specialize=_RUN_TIME)
def backward_resident(
    dy,  # [rows, P, H]
    w_hh,
    s0,  # [S, P, B, H] in the type of computation
    ds,  # [S, P, B, H] gradients of the states, after the stretch and then before it
    y,
    tape,
    du,  # [P, chunk_rows, G*H]
    dv,  # the same, or du where all gates are tied
    previous,  # [P, chunk_rows, H] state 0 before each step
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
    G: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TIED: tl.constexpr,
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
    p = tl.program_id(1).to(tl.int64)
    lanes = tl.num_programs(1)
    backward = ((reverse >> p) & 1) != 0
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    n = tl.arange(0, BN)
    k = tl.arange(0, BN)
    stop = _stop(length, b, steps, batch, RAGGED)
    low, high = _bounds(stop, steps, begin, end, backward, RAGGED)
    into = p * chunk_rows - tl.where(backward, base_reverse, base)
    in_batch = (b < batch)[:, None] & (n < H)[None, :]
    all_tied: tl.constexpr = TIED == (1 << G) - 1

    w = ()
    inside = (n < H)[:, None] & (k < H)[None, :]
    for g in tl.static_range(G):
        w_at = w_hh + ((p * G + g) * H + n[:, None]) * H + k[None, :]
        w = w + (tl.load(w_at, mask=inside, other=0.0),)
    carried = ()
    state = ds + (p * batch + b[:, None]) * H + n[None, :]
    for j in tl.static_range(S):
        carried = carried + (tl.load(state + j * lanes * batch * H, mask=in_batch, other=0.0),)

    for back in tl.range(0, high - low):
        step = high - 1 - back
        t = tl.where(backward, steps - 1 - step, step)
        rows = _rows(first, t, b, batch, PACKED)
        here = (t < stop)[:, None] & (n < H)[None, :]
        kept, before, after, dafter, cut = _step_backward(
            dy, y, tape, s0, carried, first, resets, rows, t, b, n, p, lanes, stop, steps, batch,
            backward, H, S, K, DY, PACKED, RESETS,
        )  # fmt: skip
        out = CELL(kept, before, after, dafter)
        recurrent = tl.broadcast_to(out[2 * G], (BB, BN))
        at = (into + rows)[:, None] * (G * H) + n[None, :]
        for g in tl.static_range(G):
            d = tl.where(here, tl.broadcast_to(out[G + g], (BB, BN)), 0.0)
            recurrent += _times(d, w[g], DOT, PRECISION)
            tl.store(dv + at + g * H, d.to(dv.dtype.element_ty), mask=here)
            if not all_tied:
                d = tl.broadcast_to(out[g], (BB, BN))
                tl.store(du + at + g * H, d.to(du.dtype.element_ty), mask=here)
        h_at = (into + rows)[:, None] * H + n[None, :]
        tl.store(previous + h_at, before[0].to(previous.dtype.element_ty), mask=here)
        passed = ()
        for j in tl.static_range(S):
            if j == 0:
                d = recurrent
            else:
                d = tl.broadcast_to(out[2 * G + j], (BB, BN))
            if RESETS:
                d = tl.where(cut, 0.0, d)
            passed = passed + (tl.where(here, d, carried[j]),)
        carried = passed
    for j in tl.static_range(S):
        tl.store(state + j * lanes * batch * H, carried[j], mask=in_batch)


@triton.jit(do_not_specialize=_RUN_TIME)
def backward_streamed(
    dy,
    w_hh,
    s0,
    ds,
    y,
    tape,
    du,
    dv,
    previous,
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
    G: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TIED: tl.constexpr,
    DY: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,  # units whose derivative is computed, or summed up, at a time
    BK: tl.constexpr,  # units multiplied at a time
):
    p = tl.program_id(1).to(tl.int64)
    lanes = tl.num_programs(1)
    backward = ((reverse >> p) & 1) != 0
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    dtype = ds.dtype.element_ty
    stop = _stop(length, b, steps, batch, RAGGED)
    low, high = _bounds(stop, steps, begin, end, backward, RAGGED)
    into = p * chunk_rows - tl.where(backward, base_reverse, base)
    state = lanes * batch * H
    lane = ds + (p * batch + b[:, None]) * H
    all_tied: tl.constexpr = TIED == (1 << G) - 1

    for back in tl.range(0, high - low, num_stages=1):
        step = high - 1 - back
        t = tl.where(backward, steps - 1 - step, step)
        rows = _rows(first, t, b, batch, PACKED)
        alive = (t < stop)[:, None]
        if RESETS:
            uncut = _cut(resets, first, t, b, stop, steps, batch, backward, PACKED) == 0
        else:
            uncut = (b >= 0)[:, None]
        for n0 in tl.range(0, H, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            here = alive & (n < H)[None, :]
            carried = ()
            for j in tl.static_range(S):
                carried = carried + (tl.load(lane + j * state + n[None, :], mask=here, other=0.0),)
            kept, before, after, dafter, _cut_here = _step_backward(
                dy, y, tape, s0, carried, first, resets, rows, t, b, n, p, lanes, stop, steps,
                batch, backward, H, S, K, DY, PACKED, RESETS,
            )  # fmt: skip
            out = CELL(kept, before, after, dafter)
            at = (into + rows)[:, None] * (G * H) + n[None, :]
            for g in tl.static_range(G):
                d = tl.broadcast_to(out[G + g], (BB, BN))
                tl.store(dv + at + g * H, d.to(dv.dtype.element_ty), mask=here)
                if not all_tied:
                    d = tl.broadcast_to(out[g], (BB, BN))
                    tl.store(du + at + g * H, d.to(du.dtype.element_ty), mask=here)
            h_at = (into + rows)[:, None] * H + n[None, :]
            tl.store(previous + h_at, before[0].to(previous.dtype.element_ty), mask=here)
            for j in tl.static_range(S):
                d = tl.where(uncut, tl.broadcast_to(out[2 * G + j], (BB, BN)), 0.0)
                tl.store(lane + j * state + n[None, :], d, mask=here)
        tl.debug_barrier()  # dv is complete; as in forward_streamed
        for k0 in tl.range(0, H, BN, num_stages=1):
            k = k0 + tl.arange(0, BN)
            here = alive & (k < H)[None, :]
            total = tl.zeros((BB, BN), dtype)
            for n0 in tl.range(0, H, BK):
                n = n0 + tl.arange(0, BK)
                inside = alive & (n < H)[None, :]
                at = (into + rows)[:, None] * (G * H) + n[None, :]
                for g in tl.static_range(G):
                    d = tl.load(dv + at + g * H, mask=inside, other=0.0)
                    at_w = w_hh + ((p * G + g) * H + n[:, None]) * H + k[None, :]
                    w = tl.load(at_w, mask=(n < H)[:, None] & (k < H)[None, :], other=0.0)
                    total += _times(d.to(dtype), w, DOT, PRECISION)
            passed = tl.load(lane + k[None, :], mask=here, other=0.0)
            total = tl.where(uncut, passed + total, 0.0)
            tl.store(lane + k[None, :], total, mask=here)
        tl.debug_barrier()
