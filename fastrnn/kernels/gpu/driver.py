"""Runs one scan on a GPU with any kernels: memory, chunks of steps, and products around the sweeps.

This is everything of a call except the sweeps: the projection of the input chunk by chunk, the
states that pass from chunk to chunk, the gradients that follow from those of the gates, and the
recomputed tapes of chunks if none was saved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
    rows = scan.rows if tape else 0
    saved = allocate(rows, recurrences, scan.tape_width(), hidden, dtype=x.dtype, device=x.device)
    widest = max(hidden, scan.recurrent)
    size = scan.states + 1, recurrences, scan.batch, widest
    if sweeps.takes_states:
        carry, last = torch.empty(size, dtype=scan.compute, device=x.device), _empty_states(scan)
    else:
        carry, last = torch.zeros(size, dtype=scan.compute, device=x.device), []
        for j, state in enumerate(operands.s0):
            carry[j, ..., : scan.width(j)] = state
    if scan.whole and operands.lengths is None:
        u, b_hh = _projected(scan)
        buffers = ForwardBuffers(u, b_hh, carry, y, saved if tape else None, last=last)
        sweeps.forward(scan, 0, scan.steps, buffers)
    else:
        b_ih, b_hh = _biases(scan)
        u = x.new_empty(recurrences, scan.chunk_rows, scan.input_gates * hidden)
        given = operands.reset_states
        begins = scan.widened(given)[0] if given else None
        buffers = ForwardBuffers(u, b_hh, carry, y, saved if tape else None, begins, last)
        steps = scan.steps if scan.batch else 0
        if not steps:
            _pass_on(operands.s0, last)
        for begin in range(0, steps, scan.chunk_steps):
            end = min(scan.steps, begin + scan.chunk_steps)
            _project(scan, u, b_ih, begin, end)
            sweeps.forward(scan, begin, end, buffers)
    return y, last if sweeps.takes_states else _states(scan, carry), saved


def _empty_states(scan: Scan) -> list[Tensor]:
    """A tensor for each state as the caller has it."""
    x, size = scan.operands.x, (scan.recurrences, scan.batch)
    return [x.new_empty(*size, scan.width(j)) for j in range(scan.states)]


def _pass_on(given: Sequence[Tensor | None], to: Sequence[Tensor]) -> None:
    """Copy states, or their gradients, past no steps; those that are None or missing are zero."""
    for j, state in enumerate(to):
        own = given[j] if j < len(given) else None
        state.zero_() if own is None else state.copy_(own)


def _biases(scan: Scan) -> tuple[Tensor | None, Tensor | None]:
    """[P, GU*H] to add to u, and [P, GV*H] to add to v. u takes both biases of a summed gate."""
    operands = scan.operands
    if not operands.b_ih:
        return None, None
    b_ih, b_hh = stacked(operands.b_ih), stacked(operands.b_hh)
    if scan.all_summed:
        return b_ih + b_hh, None
    if any(scan.summed):
        b_ih = b_ih.clone()
    for gates in _runs(scan.summed):
        if scan.summed[gates.start]:
            for to, part in _places(scan, gates):
                b_ih[:, to] += b_hh[:, part]
    return b_ih, b_hh


def _places(scan: Scan, gates: slice) -> list[tuple[slice, slice]]:
    """For summed gates of v: their columns in u, and in v."""
    if scan.derived.has_all_rows:
        part = slice(gates.start * scan.hidden, gates.stop * scan.hidden)
        return [(part, part)]
    names = scan.derived.inputs, scan.derived.recurrent
    pairs = [(names[0].index(name), names[1].index(name)) for name in names[1][gates]]
    return [
        (
            slice(u * scan.hidden, (u + 1) * scan.hidden),
            slice(v * scan.hidden, (v + 1) * scan.hidden),
        )
        for u, v in pairs
    ]


def _projected(scan: Scan) -> tuple[Tensor, Tensor | None]:
    """u of all steps, and the biases to add to v."""
    operands = scan.operands
    if scan.recurrences > 1:
        b_ih, b_hh = _biases(scan)
        u = operands.x.new_empty(scan.recurrences, scan.rows, scan.input_gates * scan.hidden)
        _project(scan, u, b_ih, 0, scan.steps)
        return u, b_hh
    b: Tensor | None = None
    b_hh = None
    if scan.all_summed and operands.b_ih:
        b = operands.b_ih[0] + operands.b_hh[0]
    elif operands.b_ih:
        b_ih, b_hh = _biases(scan)
        b = None if b_ih is None else b_ih[0]
    return F.linear(operands.x, operands.w_ih[0], b).contiguous(), b_hh


def _project(scan: Scan, u: Tensor, bias: Tensor | None, begin: int, end: int) -> None:
    """Write u = x * w_ih^T + b for the rows of a chunk, of every recurrence in its direction."""
    for recurrences in _runs(scan.reversed_recurrences):
        p = recurrences.start
        low, high = scan.row_range(begin, end, scan.reversed_recurrences[p])
        x, out = scan.x_rows((low, high)), u[recurrences, : high - low]
        if out.size(0) == 1:
            own = scan.operands.w_ih[p].t()
            if bias is None:
                torch.mm(x, own, out=out[0])
            else:
                torch.addmm(bias[p], x, own, out=out[0])
            continue
        w = scan.w_ih[recurrences].transpose(1, 2)
        if bias is None:
            torch.bmm(x.expand(w.size(0), *x.shape), w, out=out)
        else:
            torch.baddbmm(bias[recurrences].unsqueeze(1), x.expand(w.size(0), *x.shape), w, out=out)


def backward(
    sweeps: Sweeps,
    scan: Scan,
    grads: Sequence[Tensor | None],
    dsteps: Tensor | None,
    y: Tensor,
    tape: Tensor,
    needs: Needs,
) -> list[Tensor]:
    """Those gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr, params, s0 and reset_states that `needs`
    selects, as `torch.ops.fastrnn.scan_backward`, from those of the output and of the final states
    (`grads`) and of the states after every step. `RecomputingSweeps` recompute a tape without rows,
    chunk by chunk."""
    operands, x = scan.operands, scan.operands.x
    recurrences, hidden, compute = scan.recurrences, scan.hidden, scan.compute
    s0: Tensor | None
    ds0: list[Tensor] = []
    if sweeps.takes_states:
        size = scan.states, recurrences, scan.batch, hidden
        s0, ds, dlast = None, torch.empty(size, dtype=compute, device=x.device), grads[1:]
        if needs.s0 and operands.s0:
            ds0 = _empty_states(scan)
    else:
        s0, ds = scan.widened(operands.s0, grads[1:])
        dlast = ()
    dsteps = None if dsteps is None else dsteps.contiguous()
    if scan.whole and operands.lengths is None and (tape.size(0) or not scan.tape_width()):
        states = {"s0": s0, "ds": ds, "dlast": dlast, "ds0": ds0}
        return _backward_of_whole(sweeps, scan, grads[0], dsteps, y, tape, needs, states)
    y, saved = y.contiguous(), Tape(tape.contiguous())
    steps = scan.steps if scan.batch else 0
    chunks = [(max(0, end - scan.chunk_steps), end) for end in range(steps, 0, -scan.chunk_steps)]
    recomputes = bool(chunks and scan.tape_width() and not tape.size(0))
    of_u, of_v = scan.input_gates * hidden, scan.recurrent_gates * hidden
    sites = 1 + max(scan.site_of, default=-1)

    def empty(width: int, dtype: torch.dtype = x.dtype) -> Tensor:
        size = recurrences, scan.chunk_rows, width
        return torch.empty(size, dtype=dtype, device=x.device)

    dv = empty(of_v)
    given = operands.reset_states
    begins, dbegins = scan.widened(given, ()) if given else (None, None)
    buffers = BackwardBuffers(
        dy=None if grads[0] is None else grads[0].contiguous(),
        dsteps=dsteps,
        s0=s0,
        ds=ds,
        y=y,
        du=dv if scan.all_summed else empty(of_u),
        dv=dv,
        h_prev=empty(scan.recurrent),
        dh=None if scan.w_hr is None else empty(scan.recurrent),
        dp=None if scan.params is None else empty(scan.params[0].numel(), compute),
        operands=empty(sites * hidden) if sites else None,
        begins=begins,
        dbegins=dbegins,
        dlast=dlast,
        ds0=ds0,
    )
    recomputed = None
    if recomputes:
        assert isinstance(sweeps, RecomputingSweeps), "these need a tape"
        recomputed = _RecomputedTape(sweeps, scan, chunks, buffers)
    gradients = _Gradients(scan, needs, len(chunks))
    for begin, end in chunks:
        chunk_tape = saved if recomputed is None else recomputed.tape(begin, end)
        if operands.lengths is not None:  # rows past the end of a sequence have no gradient
            written = buffers.dv, buffers.du, buffers.h_prev, buffers.dh, buffers.dp
            for buffer in (*written, buffers.operands):
                if buffer is not None:
                    buffer.zero_()
        sweeps.backward(scan, begin, end, buffers, chunk_tape)
        gradients.add(begin, end, buffers, saved.values)
    if not chunks:
        _pass_on(dlast, ds0)
    out = gradients.all()
    if needs.s0 and operands.s0:
        out += ds0 if sweeps.takes_states else _states(scan, ds)
    if needs.reset_states and dbegins is not None:
        out += _states(scan, dbegins)
    return out


def _states(scan: Scan, widened: Tensor) -> list[Tensor]:
    """The states in `widened`, in the dtype of the operands. They are copied, so that they neither
    share memory nor keep it alive."""
    own = list(widened[: scan.states].unbind(0))
    if scan.hidden != scan.recurrent:
        own = [state[..., : scan.width(j)] for j, state in enumerate(own)]
    return [state.to(scan.dtype, copy=True).contiguous() for state in own]


def _backward_of_whole(
    sweeps: Sweeps,
    scan: Scan,
    dy: Tensor | None,
    dsteps: Tensor | None,
    y: Tensor,
    tape: Tensor,
    needs: Needs,
    states: dict[str, Any],
) -> list[Tensor]:
    """What `backward` does for a call that is `whole`, in fewer operations. `states` are fields of
    `BackwardBuffers`."""
    operands, rows = scan.operands, scan.rows

    def empty(width: int) -> Tensor:
        size = (rows, width) if scan.recurrences == 1 else (scan.recurrences, rows, width)
        return torch.empty(size, dtype=scan.dtype, device=scan.device)

    du = dv = empty(scan.recurrent_gates * scan.hidden)
    if not scan.all_summed:
        du = empty(scan.input_gates * scan.hidden)
    h_prev = empty(scan.hidden)
    dy = None if dy is None else dy.contiguous()
    buffers = BackwardBuffers(
        dy=dy,
        dsteps=dsteps,
        y=y.contiguous(),
        du=du,
        dv=dv,
        h_prev=h_prev,
        dh=None,
        dp=None,
        **states,
    )
    sweeps.backward(scan, 0, scan.steps, buffers, Tape(tape.contiguous()))
    out = []
    if needs.x:
        # Each product begins from the sum of those before.
        own = _of_each(scan, du)
        dx = torch.mm(own[0], operands.w_ih[0])
        for of_u, w_ih in zip(own[1:], operands.w_ih[1:], strict=True):
            dx.addmm_(of_u, w_ih)
        out.append(dx.view(operands.x.shape))
    if needs.w_ih:
        out += _products_of_all(scan, du, operands.x.reshape(rows, scan.inputs))
    if needs.w_hh:
        out += _products_of_all(scan, dv, h_prev)
    if needs.biases and operands.b_ih:
        b_ih = _sums_of_all(scan, du)
        out += b_ih
        out += [b.clone() for b in b_ih] if dv is du else _sums_of_all(scan, dv)
    if needs.s0 and operands.s0:
        out += states["ds0"] if sweeps.takes_states else _states(scan, buffers.ds)
    return out


def _of_each(scan: Scan, rows: Tensor) -> Sequence[Tensor]:
    """The rows of every recurrence, of which one alone has no dimension of recurrences."""
    return [rows] if scan.recurrences == 1 else rows.unbind(0)


def _products_of_all(scan: Scan, a: Tensor, b: Tensor) -> list[Tensor]:
    """[I, J] for each recurrence, from its rows of `a` and those of `b`, which may be the same for
    all."""
    if scan.recurrences == 1:
        return [torch.mm(a.t(), b)]
    out: list[Tensor] = []
    for run in _runs(scan.reversed_recurrences):
        own, count = a[run], run.stop - run.start
        other = b[run] if b.dim() == 3 else b.expand(count, *b.shape)
        out += _products(own, other).unbind(0)
    return out


def _sums_of_all(scan: Scan, rows: Tensor) -> list[Tensor]:
    """The sum of the rows of each recurrence."""
    if scan.recurrences == 1:
        return [rows.sum(0)]
    out: list[Tensor] = []
    for run in _runs(scan.reversed_recurrences):
        own = rows[run]
        out += [own[0].sum(0)] if own.size(0) == 1 else own.sum(1).unbind(0)
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
        self._sweeps, self._scan, self._y = sweeps, scan, buffers.y
        self._u, self._h_prev, y = buffers.dv, buffers.h_prev, buffers.y
        self._v = torch.empty_like(buffers.dv) if buffers.du is buffers.dv else buffers.du
        self._b_ih, self._b_hh = _biases(scan)
        # The step before the chunk needs rows for its states.
        rows = min(scan.rows, scan.chunk_rows + scan.batch)
        self._values = y.new_empty(rows, scan.recurrences, scan.tape_width(), scan.hidden)
        (carry,) = scan.widened(scan.operands.s0)
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
        self._sweeps.h_prev(scan, begin, end, self._y, h_prev)
        for recurrences in _runs(scan.reversed_recurrences):
            low, high = scan.row_range(begin, end, scan.reversed_recurrences[recurrences.start])
            count = high - low
            w_hh = scan.w_hh[recurrences].transpose(1, 2)
            torch.bmm(h_prev[recurrences, :count], w_hh, out=v[recurrences, :count])
        buffers = RecomputeBuffers(u, v, self._b_hh, h_prev, carry)
        self._sweeps.recompute(scan, begin, end, buffers, tape)


class _Gradients:
    """Gradients of the weights, the biases and x, summed over the chunks.

    A sum of several terms is in the dtype of sums. Of one term, the product is the gradient.
    """

    def __init__(self, scan: Scan, needs: Needs, chunks: int) -> None:
        self.scan, self.needs, self.chunks = scan, needs, chunks
        self.runs = _runs(scan.reversed_recurrences)
        self.sums: dict[tuple[str, int], Tensor] = {}  # by name and number of the run
        self.own_x: Tensor | None = None
        self.summed_x: Tensor | None = None
        self.biased = needs.biases and bool(scan.operands.b_ih)
        if needs.x and not (chunks and scan.recurrences == 1):
            size = scan.rows, scan.inputs
            self.summed_x = torch.zeros(size, dtype=scan.compute, device=scan.device)

    def add(self, begin: int, end: int, buffers: BackwardBuffers, tape: Tensor) -> None:
        scan, needs, dh, dp = self.scan, self.needs, buffers.dh, buffers.dp
        for run, recurrences in enumerate(self.runs):
            low, high = scan.row_range(begin, end, scan.reversed_recurrences[recurrences.start])
            count = high - low
            u, v, h = (
                rows[recurrences, :count] for rows in (buffers.du, buffers.dv, buffers.h_prev)
            )
            if needs.w_ih:
                x = scan.x_rows((low, high))
                self._add("w_ih", run, _products(u, x.expand(u.size(0), *x.shape)))
            if needs.w_hh:
                if buffers.operands is None:
                    product = _products(v, h)
                else:
                    own = buffers.operands[recurrences, :count]
                    product = self._products_by_site(v, h, own)
                self._add("w_hh", run, product)
            if needs.w_hr and dh is not None:
                place = scan.states - 1 + len(scan.derived.saved)
                unprojected = tape[low:high, recurrences, place].transpose(0, 1)
                self._add("w_hr", run, _products(dh[recurrences, :count], unprojected))
            if self.biased:
                dtype = scan.dtype if self.chunks == 1 else scan.compute
                self._add("b_ih", run, u.sum(1, dtype=dtype))
                if not scan.all_summed:
                    self._add("b_hh", run, v.sum(1, dtype=dtype))
            if needs.params and dp is not None:
                self._add("params", run, dp[recurrences, :count].sum(1))
            if needs.x:
                self._add_to_x(low, high, u, recurrences.start)

    def _products_by_site(self, v: Tensor, h: Tensor, operands: Tensor) -> Tensor:
        """The gradient of w_hh, whose blocks multiply state 0 or another value each."""
        hidden, parts = self.scan.hidden, []
        for gates in _runs(self.scan.site_of):
            site = self.scan.site_of[gates.start]
            own = h if site < 0 else operands[..., site * hidden : (site + 1) * hidden]
            parts.append(_products(v[..., gates.start * hidden : gates.stop * hidden], own))
        return torch.cat(parts, 1)

    def _add(self, name: str, run: int, term: Tensor) -> None:
        before = self.sums.get((name, run))
        if before is not None:
            before += term
        else:
            self.sums[name, run] = term if self.chunks == 1 else term.to(self.scan.compute)

    def _add_to_x(self, low: int, high: int, u: Tensor, first: int) -> None:
        scan = self.scan
        if self.summed_x is not None:
            for recurrence, gradient in enumerate(u, first):
                self.summed_x[low:high] += torch.mm(gradient, scan.w_ih[recurrence])
            return
        # One recurrence and direction: each row belongs to one chunk.
        if self.own_x is None:
            self.own_x = u.new_empty(scan.rows, scan.inputs)
        torch.mm(u[0], scan.operands.w_ih[0], out=self.own_x[low:high])

    def all(self) -> list[Tensor]:
        scan, needs = self.scan, self.needs
        x = self.own_x if self.summed_x is None else self.summed_x
        out = [] if x is None else [x.view(scan.operands.x.shape).to(scan.dtype)]
        of_u, of_v = scan.input_gates * scan.hidden, scan.recurrent_gates * scan.hidden
        if needs.w_ih:
            out += self._of_all("w_ih", of_u, scan.inputs)
        if needs.w_hh:
            out += self._of_all("w_hh", of_v, scan.recurrent)
        if self.biased:
            b_ih = self._of_all("b_ih", of_u)
            out += b_ih
            out += [b.clone() for b in b_ih] if scan.all_summed else self._of_all("b_hh", of_v)
        if needs.w_hr and scan.operands.w_hr:
            out += self._of_all("w_hr", scan.recurrent, scan.hidden)
        if needs.params and scan.params is not None:
            out += self._params(scan.params)
        return out

    def _of_all(self, name: str, *shape: int) -> list[Tensor]:
        """The gradients of each recurrence."""
        scan = self.scan
        if not self.chunks:
            zeros = torch.zeros(scan.recurrences, *shape, dtype=scan.dtype, device=scan.device)
            return list(zeros.unbind(0))
        parts = [self.sums[name, run].to(scan.dtype) for run in range(len(self.runs))]
        return [own for part in parts for own in part.unbind(0)]

    def _params(self, params: Tensor) -> list[Tensor]:
        scan, out = self.scan, []
        own = self._sums_of_params(params)
        for recurrence in own:
            for rows in scan.derived.param_groups():
                one = scan.derived.shared[rows.start]
                param = recurrence[rows].flatten()
                out.append((param.sum(0, keepdim=True) if one else param).to(scan.dtype))
        return out

    def _sums_of_params(self, params: Tensor) -> Tensor:
        if not self.chunks:
            return torch.zeros_like(params, dtype=self.scan.compute)
        parts = [self.sums["params", run] for run in range(len(self.runs))]
        return torch.cat(parts).view_as(params)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """[P, I, J] from a [P, rows, I] and b [P, rows, J]."""
    if a.size(0) == 1:
        return torch.mm(a[0].t(), b[0]).unsqueeze(0)
    return torch.bmm(a.transpose(1, 2), b)


@functools.cache
def _runs_of(flags: tuple[int, ...]) -> tuple[slice, ...]:
    edges = [p for p in range(len(flags)) if p == 0 or flags[p] != flags[p - 1]]
    return tuple(map(slice, edges, [*edges[1:], len(flags)]))


def _runs(flags: Sequence[int]) -> tuple[slice, ...]:
    """Runs of neighbouring recurrences, or gates, with the same flag."""
    return _runs_of(tuple(flags))
