"""Runs one scan on a GPU with any kernels: memory, chunks of steps, and products around the sweeps.

This is everything of a call except the sweeps: the projection of the input chunk by chunk, the
states that pass from chunk to chunk, the gradients that follow from those of the gates, and the
recomputed tapes of chunks if none was saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.kernels.gpu.sweeps import (
    BackwardBuffers,
    ForwardBuffers,
    RecomputeBuffers,
    RecomputingSweeps,
    Scan,
    Sweeps,
    Tape,
    stacked,
)
from fastrnn.kernels.operands import Needs

__all__ = ["backward", "forward"]


def forward(sweeps: Sweeps, scan: Scan, tape: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, final states and the tape, as `torch.ops.fastrnn.scan`; the tape has no rows unless
    `tape` is set."""
    operands, x, recurrences, hidden = scan.operands, scan.operands.x, scan.recurrences, scan.hidden
    # Rows past the end of a sequence are zero.
    allocate = torch.empty if operands.lengths is None else torch.zeros
    y = allocate(*x.shape[:-1], recurrences * scan.recurrent, dtype=x.dtype, device=x.device)
    size = scan.rows if tape else 0, recurrences, scan.tape_width(), hidden
    saved = allocate(size, dtype=x.dtype, device=x.device)
    widest = max(hidden, scan.recurrent)
    carry = x.new_zeros(scan.states + 1, recurrences, scan.batch, widest, dtype=scan.compute)
    for j, state in enumerate(operands.s0):
        carry[j, ..., : scan.width(j)] = state
    b_ih, b_hh = _biases(scan)
    u = x.new_empty(recurrences, scan.chunk_rows, scan.gates * hidden)
    buffers = ForwardBuffers(u, b_hh, carry, y, saved if tape else None)
    for begin in range(0, scan.steps if scan.batch else 0, scan.chunk_steps):
        end = min(scan.steps, begin + scan.chunk_steps)
        _project(scan, u, b_ih, begin, end)
        sweeps.forward(scan, begin, end, buffers)
    last = [carry[j, ..., : scan.width(j)] for j in range(scan.states)]
    # The states are copied, so that they neither share `carry` nor keep it alive.
    return y, [state.to(x.dtype, copy=True).contiguous() for state in last], saved


def _biases(scan: Scan) -> tuple[Tensor | None, Tensor | None]:
    """[P, G*H] to add to u, and [P, G*H] to add to v. u takes both biases of a summed gate."""
    operands, summed = scan.operands, scan.derived.summed
    if not operands.b_ih:
        return None, None
    b_ih, b_hh = stacked(operands.b_ih).clone(), stacked(operands.b_hh)
    for g in range(scan.gates):
        if summed[g]:
            part = slice(g * scan.hidden, (g + 1) * scan.hidden)
            b_ih[:, part] += b_hh[:, part]
    return b_ih, None if all(summed) else b_hh


def _project(scan: Scan, u: Tensor, bias: Tensor | None, begin: int, end: int) -> None:
    """Write u = x * w_ih^T + b for the rows of a chunk, of every recurrence in its direction."""
    for p, recurrences in _runs(scan.reversed_recurrences):
        low, high = scan.row_range(begin, end, scan.reversed_recurrences[p])
        x = scan.x_rows((low, high))
        w = scan.w_ih[recurrences].transpose(1, 2)
        out = u[recurrences, : high - low]
        if w.size(0) == 1:
            if bias is None:
                torch.mm(x, w[0], out=out[0])
            else:
                torch.addmm(bias[p], x, w[0], out=out[0])
        elif bias is None:
            torch.bmm(x.expand(w.size(0), *x.shape), w, out=out)
        else:
            torch.baddbmm(bias[recurrences].unsqueeze(1), x.expand(w.size(0), *x.shape), w, out=out)


def backward(
    sweeps: Sweeps,
    scan: Scan,
    grads: Sequence[Tensor | None],
    y: Tensor,
    tape: Tensor,
    needs: Needs,
) -> list[Tensor]:
    """Those gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr, params and s0 that `needs` selects, as
    `torch.ops.fastrnn.scan_backward`. `RecomputingSweeps` recompute a tape without rows, chunk by
    chunk."""
    operands, x = scan.operands, scan.operands.x
    recurrences, hidden, compute = scan.recurrences, scan.hidden, scan.compute
    widest = max(hidden, scan.recurrent)
    s0 = x.new_zeros(scan.states, recurrences, scan.batch, widest, dtype=compute)
    ds = torch.zeros_like(s0)
    for j in range(scan.states):
        if operands.s0:
            s0[j, ..., : scan.width(j)] = operands.s0[j]
        grad = grads[1 + j]
        if grad is not None:
            ds[j, ..., : scan.width(j)] = grad
    depth = scan.gates * hidden

    def empty(width: int, dtype: torch.dtype = x.dtype) -> Tensor:
        size = recurrences, scan.chunk_rows, width
        return torch.empty(size, dtype=dtype, device=x.device)

    dv = empty(depth)
    y, saved = y.contiguous(), Tape(tape.contiguous())
    buffers = BackwardBuffers(
        dy=None if grads[0] is None else grads[0].contiguous(),
        s0=s0,
        ds=ds,
        y=y,
        du=dv if all(scan.derived.summed) else empty(depth),
        dv=dv,
        h_prev=empty(scan.recurrent),
        dh=None if scan.w_hr is None else empty(scan.recurrent),
        dp=None if scan.params is None else empty(scan.params[0].numel(), compute),
    )
    gradients = _Gradients(scan, needs)
    steps = scan.steps if scan.batch else 0
    chunks = [(max(0, end - scan.chunk_steps), end) for end in range(steps, 0, -scan.chunk_steps)]
    recomputed = None
    if chunks and scan.tape_width() and not tape.size(0):
        assert isinstance(sweeps, RecomputingSweeps), "these need a tape"
        recomputed = _RecomputedTape(sweeps, scan, chunks, buffers)
    for begin, end in chunks:
        chunk_tape = saved if recomputed is None else recomputed.tape(begin, end)
        if operands.lengths is not None:  # rows past the end of a sequence have no gradient
            for buffer in (buffers.dv, buffers.du, buffers.h_prev, buffers.dh, buffers.dp):
                if buffer is not None:
                    buffer.zero_()
        sweeps.backward(scan, begin, end, buffers, chunk_tape)
        gradients.add(begin, end, buffers, saved.values)
    out = gradients.all()
    if needs.s0:
        for j in range(len(operands.s0)):
            out.append(ds[j, ..., : scan.width(j)].to(x.dtype, copy=True).contiguous())
    return out


class _RecomputedTape:
    """Tapes of chunks, recomputed from the output.

    The output gives state 0 of all steps, so the projections are matrix products. Only the other
    states pass from step to step: a first run through the chunks finds those at which each begins.

    Args:
        chunks: steps `(begin, end)`, the last chunk first.
        buffers: buffers of the backward pass; before its sweep they hold `u`, `v` and `h_prev`.
    """

    def __init__(
        self,
        sweeps: RecomputingSweeps,
        scan: Scan,
        chunks: Sequence[tuple[int, int]],
        buffers: BackwardBuffers,
    ) -> None:
        self._sweeps, self._scan, self._s0, self._y = sweeps, scan, buffers.s0, buffers.y
        self._u, self._h_prev, y = buffers.dv, buffers.h_prev, buffers.y
        self._v = torch.empty_like(buffers.dv) if buffers.du is buffers.dv else buffers.du
        self._b_ih, self._b_hh = _biases(scan)
        # The step before the chunk needs rows for its states.
        rows = min(scan.rows, scan.chunk_rows + scan.batch)
        self._values = y.new_empty(rows, scan.recurrences, scan.tape_width(), scan.hidden)
        carry = buffers.s0.clone()
        self._before = {0: carry}
        if scan.states > 1:
            for begin, end in reversed(chunks[1:]):
                carry = carry.clone()
                self._recompute(begin, end, carry, None)
                self._before[end] = carry

    def tape(self, begin: int, end: int) -> Tape:
        """The tape of a chunk; the next call overwrites it."""
        scan = self._scan
        start = max(0, begin - 1)
        tape = Tape(
            self._values,
            (scan.row_range(start, end, False)[0], scan.row_range(begin, end, True)[0]),
        )
        before = self._before.pop(begin) if scan.states > 1 else self._before[0]
        self._recompute(begin, end, before, tape)
        return tape

    def _recompute(self, begin: int, end: int, carry: Tensor, tape: Tape | None) -> None:
        scan, u, v, h_prev = self._scan, self._u, self._v, self._h_prev
        _project(scan, u, self._b_ih, begin, end)
        self._sweeps.h_prev(scan, begin, end, self._s0, self._y, h_prev)
        for p, recurrences in _runs(scan.reversed_recurrences):
            low, high = scan.row_range(begin, end, scan.reversed_recurrences[p])
            count = high - low
            w_hh = scan.w_hh[recurrences].transpose(1, 2)
            torch.bmm(h_prev[recurrences, :count], w_hh, out=v[recurrences, :count])
        buffers = RecomputeBuffers(u, v, self._b_hh, h_prev, carry)
        self._sweeps.recompute(scan, begin, end, buffers, tape)


class _Gradients:
    """Gradients of the weights, the biases and x, summed over the chunks."""

    def __init__(self, scan: Scan, needs: Needs) -> None:
        self.scan = scan
        recurrences, depth, x = scan.recurrences, scan.gates * scan.hidden, scan.operands.x
        biased = needs.biases and bool(scan.operands.b_ih)

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return x.new_zeros(shape, dtype=scan.compute) if wanted else None

        self.x = zeros(needs.x, scan.rows, scan.inputs)
        self.w_ih = zeros(needs.w_ih, recurrences, depth, scan.inputs)
        self.w_hh = zeros(needs.w_hh, recurrences, depth, scan.recurrent)
        projected = needs.w_hr and scan.w_hr is not None
        self.w_hr = zeros(projected, recurrences, scan.recurrent, scan.hidden)
        self.b_ih = zeros(biased, recurrences, depth)
        self.b_hh = zeros(biased, recurrences, depth)
        size = () if scan.params is None else scan.params.shape
        self.params = zeros(needs.params and scan.params is not None, *size)

    def add(self, begin: int, end: int, buffers: BackwardBuffers, tape: Tensor) -> None:
        scan, dh, dp = self.scan, buffers.dh, buffers.dp
        for p, recurrences in _runs(scan.reversed_recurrences):
            low, high = scan.row_range(begin, end, scan.reversed_recurrences[p])
            count = high - low
            u, v, h = (
                rows[recurrences, :count] for rows in (buffers.du, buffers.dv, buffers.h_prev)
            )
            if self.w_ih is not None:
                x = scan.x_rows((low, high))
                self.w_ih[recurrences] += torch.bmm(
                    u.transpose(1, 2), x.expand(u.size(0), *x.shape)
                )
            if self.w_hh is not None:
                self.w_hh[recurrences] += torch.bmm(v.transpose(1, 2), h)
            if self.w_hr is not None and dh is not None:
                unprojected = tape[low:high, recurrences, -1].transpose(0, 1)
                self.w_hr[recurrences] += torch.bmm(
                    dh[recurrences, :count].transpose(1, 2), unprojected
                )
            if self.b_ih is not None and self.b_hh is not None:
                self.b_ih[recurrences] += u.sum(1, dtype=scan.compute)
                self.b_hh[recurrences] += v.sum(1, dtype=scan.compute)
            if self.params is not None and dp is not None:
                sums = dp[recurrences, :count].sum(1)
                self.params[recurrences] += sums.view_as(self.params[recurrences])
            if self.x is not None:
                for recurrence, gradient in enumerate(u, p):
                    self.x[low:high] += torch.mm(gradient, scan.w_ih[recurrence])

    def all(self) -> list[Tensor]:
        dtype, shape = self.scan.operands.x.dtype, self.scan.operands.x.shape
        out = [] if self.x is None else [self.x.view(shape).to(dtype)]
        for group in (self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr):
            out += [] if group is None else list(group.to(dtype).unbind(0))
        if self.params is not None:
            derived = self.scan.derived
            for own in self.params:
                for rows in derived.param_groups():
                    one = derived.shared[rows.start]
                    param = own[rows].flatten()
                    out.append((param.sum(0, keepdim=True) if one else param).to(dtype))
        return out


def _runs(backward: Sequence[bool]) -> list[tuple[int, slice]]:
    """Runs of neighbouring recurrences with the same direction: `(first, slice)` each."""
    edges = [p for p in range(len(backward)) if p == 0 or backward[p] != backward[p - 1]]
    ends = [*edges[1:], len(backward)]
    return [(p, slice(p, end)) for p, end in zip(edges, ends, strict=True)]
