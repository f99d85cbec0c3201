# mypy: ignore-errors
# Triton's functions have no types: they are compiled, not run.
"""Code that the sweeps in Triton share, for any cell.

A program runs one recurrence `p` and one tile of `BB` rows of the batch from the first step of a
chunk to its last, so a chunk is one launch and no program waits for another. There are two ways:

- *resident*: the recurrent weights are loaded once and stay in the program, in registers or shared
  memory as the compiler decides, and so do the states. This is for small H and for heads.
- *streamed*: every step loads the weights from the cache in tiles. The states lie in global memory,
  through which a step passes them to the next. A projected state 0 is always streamed
  (`projection.py`).

The parameter `CELL` is the cell's function. A tuple holds one item per gate or state. `T`, `B` and
everything else that depends on a batch are run-time values; a kernel is compiled once for a cell,
an H and the tiles that `plan/triton.py` chose. Offsets are 64 bits wide.

Names: `GU` and `GV` gates with rows in w_ih and w_hh, `S` states, `K` saved values, `L` learned
parameters, `D` draws of random numbers, `Q` width of state 0 (H unless it is projected), `n` a
unit, `b` a row of the batch, `t` the position in time, `step` the position in the recurrence's own
direction. The rows of time `t` begin at `first[t]` in packed input and at `t * B` in dense input;
row `b` is alive while `t < stop[b]`.

All threads of a program read after a `tl.debug_barrier` what any of them wrote to global memory
before it: the barrier orders all kinds of memory among the threads of a block, on AMD's GPUs by
fences for the workgroup. No other program touches its rows of the states. A barrier separates the
read and the write of a tile in the same place: several threads may hold the same number, and a late
one must not read what another has written.

The kernels repeat their lists of parameters, because Triton takes the arguments of a kernel one by
one and cannot share a list of them. They also repeat how a tuple grows in a loop, because a jitted
function cannot take an expression to evaluate for each gate or state.
"""

import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.math import constant, maximum, minimum

# These arguments change with every batch, so a kernel must not be compiled for their values.
RUN_TIME = (
    *("steps", "batch", "begin", "end", "base", "base_reverse", "chunk_rows", "reverse"),
    # H and Q once more, for streamed weights: if the number of tiles were a constant, the compiler
    # would unroll the loop over them until registers spill.
    *("hidden", "width"),
)


@triton.jit
def stops(length, b, steps, batch, RAGGED: tl.constexpr):
    """Steps of each row; 0 for rows past the batch."""
    if RAGGED:
        return tl.load(length + b, mask=b < batch, other=0).to(tl.int32)
    else:
        return tl.where(b < batch, steps, 0)


@triton.jit
def bounds(stop, steps, begin, end, backward, RAGGED: tl.constexpr):
    """The steps of the chunk at which any row of the tile is alive."""
    low = begin
    high = end
    if RAGGED:
        longest = tl.max(stop, axis=0)
        low = tl.where(backward, tl.maximum(begin, steps - longest), begin)
        high = tl.where(backward, end, tl.minimum(end, longest))
    return low, high


@triton.jit
def program(
    length, steps, batch, begin, end, base, base_reverse, chunk_rows, reverse,
    RAGGED: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The work of a program: its recurrence `p` and their number, whether that runs `backward` in
    time, its rows `b` [BB] and their steps `stop` [BB], the steps [low, high) at which any of them
    is alive, and the offset `into` from a row of the input to its row in the arrays of a chunk."""
    p = tl.program_id(1).to(tl.int64)
    recurrences = tl.num_programs(1)
    backward = ((reverse >> p) & 1) != 0
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    stop = stops(length, b, steps, batch, RAGGED)
    low, high = bounds(stop, steps, begin, end, backward, RAGGED)
    into = p * chunk_rows - tl.where(backward, base_reverse, base)
    return p, recurrences, backward, b, stop, low, high, into


@triton.jit
def row_numbers(first, t, b, batch, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(first + t) + b
    else:
        return t.to(tl.int64) * batch + b


@triton.jit
def cuts(resets, first, t, b, stop, steps, batch, backward, PACKED: tl.constexpr):
    """[BB, 1], whether an episode begins between the previous step and this one."""
    edge = t + tl.where(backward, 1, 0)
    inside = edge < stop
    rows = row_numbers(first, tl.minimum(edge, steps - 1), b, batch, PACKED)
    return (tl.load(resets + rows, mask=inside, other=0) != 0)[:, None]


@triton.jit
def begun(begins, at, cut, inside, GIVEN: tl.constexpr):
    """A state in which episodes begin, where `cut`: given at `begins + at`, or zero."""
    if GIVEN:
        return tl.load(begins + at, mask=cut & inside, other=0.0)
    else:
        return 0.0


@triton.jit
def state_0_before(
    y, start, begins, own, rows, from_row, from_start, cut, n, p, recurrences, dtype,
    Q: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """State 0 before a step, [BB, N]."""
    inside = (n < Q)[None, :]
    at = y + (rows[:, None] * recurrences + p) * Q + n[None, :]
    value = tl.load(at, mask=from_row & inside, other=0.0).to(dtype)
    value += tl.load(start + n[None, :], mask=from_start & inside, other=0.0)
    return value + begun(begins, own + n[None, :], cut, inside, GIVEN)


@triton.jit
def learned(params, p, n, dtype, H: tl.constexpr, L: tl.constexpr):
    """The cell's learned parameters for units n, L blocks [1, N]."""
    out = ()
    for j in tl.static_range(L):
        value = tl.load(params + (p * L + j) * H + n, mask=n < H, other=0.0)
        out = out + (value.to(dtype)[None, :],)  # noqa: RUF005
    return out


@triton.jit
def joined(
    v, g: tl.constexpr, u, bias, INPUT_OF: tl.constexpr, SUMMED: tl.constexpr, BIAS: tl.constexpr
):
    """The cell's argument `v[g]` from a product: of a summed gate, the sum of both projections."""
    if (SUMMED >> g) & 1:
        return v + u[(INPUT_OF >> (4 * g)) & 15]
    elif BIAS:
        return v + bias[g][None, :]
    else:
        return v


@triton.jit
def clipped(d, LIMIT: tl.constexpr):
    """The gradient of a state after a step as the cell wants it: within its limit, 0 for none."""
    if LIMIT > 0:
        return maximum(minimum(d, constant(LIMIT, d.dtype)), constant(-LIMIT, d.dtype))
    else:
        return d


@triton.jit
def times(a, w, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """[M, K] times [K, N]: on tensor cores for 16 rows or more, else by multiplying and adding."""
    if DOT:
        return tl.dot(a.to(w.dtype), w, input_precision=PRECISION)
    else:
        return tl.sum(a[:, :, None] * w.to(a.dtype)[None, :, :], axis=1)
