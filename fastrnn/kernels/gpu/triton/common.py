# mypy: ignore-errors
# Triton's functions have no types: they are compiled, not run.
"""What the sweeps in Triton share, `forward.py` and `backward.py`, for any cell.

A program runs one scan `p` and one tile of `BB` rows of the batch from the first step of a chunk to
its last, so a chunk is one launch and no program waits for another. Two ways:

- *resident*: the recurrent weights are loaded once and stay in the program, in registers or shared
  memory as the compiler has it, and so do the states. For small H and for heads.
- *streamed*: a step walks over tiles of the weights, which come from the cache every time. The
  states lie in global memory, where the steps of a program hand them on to one another. A projected
  state 0 is always streamed: the cell gives `m`, and then state 0 is `m * w_hr^T`.

The cell's functions come in as `CELL`. Everything with one item per gate or state is a tuple. `T`,
`B` and everything else that a batch decides are run-time values; a kernel is compiled once for a
cell, an H and the tile that `plan/triton.py` chose. Offsets are 64 bits wide.

Names: `G` gates, `S` states, `K` saved values, `Q` numbers of state 0, which are H unless it is
projected, `n` a unit, `b` a row of the batch, `t` the position in time, `step` the position in the
scan's own direction. Row `r` of the batch's rows begins at `first[t]` for packed input and at
`t * B` for dense; row `b` lives while `t < stop[b]`.

What a program wrote to global memory before a `tl.debug_barrier` all of its threads read after it:
the barrier orders all kinds of memory among the threads of a block, on AMD's GPUs by fences for the
workgroup. No other program touches its rows of the states. Where a tile is read and
written in one place a barrier comes between: several threads may hold the same number, and one that
is late must not read what another has written.

The kernels repeat their lists of parameters: Triton takes the arguments of a kernel one by one, and
has no way to share a list of them. They also repeat how a tuple grows in a loop: a jitted function
cannot take an expression to evaluate for each gate or state.
"""

import triton
import triton.language as tl

# Arguments that change with every batch: a kernel must not be compiled for their values.
RUN_TIME = (
    *("steps", "batch", "begin", "end", "base", "base_reverse", "chunk_rows", "reverse"),
    # H and Q once more, where weights are streamed: the compiler unrolls a loop of a known number
    # of tiles until registers spill.
    *("hidden", "width"),
)


@triton.jit
def stops(length, b, steps, batch, RAGGED: tl.constexpr):
    """Steps of each row; none for rows past the batch."""
    if RAGGED:
        return tl.load(length + b, mask=b < batch, other=0).to(tl.int32)
    else:
        return tl.where(b < batch, steps, 0)


@triton.jit
def bounds(stop, steps, begin, end, backward, RAGGED: tl.constexpr):
    """The steps of the chunk at which any row of the tile lives."""
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
    """What a program works on: its scan `p` of so many, whether that runs `backward` in time, its
    rows `b` [BB] and their steps `stop` [BB], the steps [low, high) at which any of them lives, and
    where the rows of the scan begin in the arrays of a chunk, less the chunk's first row."""
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
    """[BB, 1] whether an episode begins between the step before and this one."""
    edge = t + tl.where(backward, 1, 0)
    inside = edge < stop
    rows = row_numbers(first, tl.minimum(edge, steps - 1), b, batch, PACKED)
    return (tl.load(resets + rows, mask=inside, other=0) != 0)[:, None]


@triton.jit
def times(a, w, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """[M, K] times [K, N]: on tensor cores for 16 rows or more, by multiplying and adding else."""
    if DOT:
        return tl.dot(a.to(w.dtype), w, input_precision=PRECISION)
    else:
        return tl.sum(a[:, :, None] * w.to(a.dtype)[None, :, :], axis=1)
