"""One scan on a GPU, whichever kernels sweep: memory, chunks of steps, and the products around.

A sweep is two functions that launch kernels, `Sweeps`; `triton_scan.py` and `cuda_scan.py` have one
pair each. Everything else of a call is here: the projection of the input a chunk at a time, the
states that pass from chunk to chunk, the gradients that follow from those of the gates, and the
tapes of chunks where none was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastrnn.compiler.derive import Derived
from fastrnn.plan import Plan

__all__ = [
    "Operands",
    "ReplayingSweeps",
    "Scan",
    "Sweeps",
    "Tape",
    "backward",
    "forward",
    "tf32_allowed",
]


@dataclass(frozen=True)
class Operands:
    """One scan, as `reference.scan` documents it."""

    cell: str  # the name under which the kernels know it
    x: Tensor
    w_ih: Sequence[Tensor]
    w_hh: Sequence[Tensor]
    b_ih: Sequence[Tensor]
    b_hh: Sequence[Tensor]
    w_hr: Sequence[Tensor]
    s0: Sequence[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    reverse: int


def tf32_allowed() -> bool:
    """Whether float32 is multiplied by recurrent weights as TF32: where torch lets `nn.LSTM` do it,
    by `torch.backends.cudnn.rnn.fp32_precision` or `torch.backends.cudnn.allow_tf32`."""
    rnn: Any = torch.backends.cudnn.rnn  # its type does not tell of this
    return bool(rnn.fp32_precision == "tf32")


class Scan:
    """What both directions need to know of a call.

    Attributes:
        derived, given, plan: what is computed, of what, and how.
        cell: the name under which the kernels know it.
        gates, states, lanes, hidden, inputs, steps, batch, rows: G, S, P, H, I, T, B and the
            number of rows, padded ones included.
        recurrent: Q, the width of state 0, which is the output: H unless it is projected.
        compute: the dtype of sums and states.
        w_ih, w_hh, w_hr: [P, G*H, I], [P, G*H, Q] and, where state 0 is projected, [P, Q, H].
        first: of packed input the row at which each step begins [T+1], and the same on the device.
        length: int64 [B], steps of each row of the batch, unless all have `steps`.
        resets: uint8 [rows], whether an episode begins there.
        reverse: a bit per lane.
        chunk_steps, chunk_rows: steps that a launch takes, and the most rows that they have.
    """

    def __init__(self, derived: Derived, plan: Plan, given: Operands) -> None:
        self.derived, self.plan, self.given, self.cell = derived, plan, given, given.cell
        x = given.x
        self.gates, self.states = len(derived.gates), len(derived.states)
        self.lanes = len(given.w_hh)
        self.hidden = given.w_hh[0].size(0) // self.gates
        self.recurrent = given.w_hh[0].size(1)
        self.inputs = x.size(-1)
        self.compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.rows = x.shape[:-1].numel()
        self.first: list[int] | None = None
        self.first_on_device = self.length = None
        if given.batch_sizes is not None:
            sizes = given.batch_sizes
            self.steps, self.batch = sizes.numel(), given.s0[0].size(1)
            first = torch.zeros(self.steps + 1, dtype=torch.int64, device="cpu")
            torch.cumsum(sizes, 0, out=first[1:])
            self.first = first.tolist()
            slots = torch.arange(self.batch, device="cpu")
            length = (sizes > slots.unsqueeze(1)).sum(1)
            self.first_on_device = first.to(x.device, non_blocking=True)
            self.length = length.to(x.device, non_blocking=True)
        else:
            self.steps, self.batch = (x.size(0), x.size(1)) if x.dim() == 3 else (1, x.size(0))
            if given.lengths is not None:
                self.length = given.lengths.to(x.device).contiguous()
        self.resets = None if given.resets is None else given.resets.contiguous().view(torch.uint8)
        self.reverse = given.reverse
        self.backward_lanes = [bool(given.reverse >> p & 1) for p in range(self.lanes)]
        self.chunk_steps = max(1, min(self.steps, plan.chunk_rows // max(1, self.batch)))
        self.chunk_rows = min(self.rows, self.chunk_steps * self.batch)
        self.w_hh = _stacked(given.w_hh)
        self.w_ih = _stacked(given.w_ih)
        self.w_hr = _stacked(given.w_hr) if given.w_hr else None

    def width(self, state: int) -> int:
        return self.hidden if state else self.recurrent

    def slots(self) -> int:
        """Values of [H] that a row of the tape holds."""
        return self.states - 1 + len(self.derived.kept) + (self.w_hr is not None)

    def row(self, t: int) -> int:
        return t * self.batch if self.first is None else self.first[t]

    def stretch(self, begin: int, end: int, backward: bool) -> tuple[int, int]:
        """First and past-the-last row of some steps of a scan."""
        if backward:
            begin, end = self.steps - end, self.steps - begin
        return self.row(begin), self.row(end)

    def x_rows(self, rows: tuple[int, int]) -> Tensor:
        """[n, I] of the input, with zeros for what must not be read."""
        x, (low, high) = self.given.x, rows
        if x.dim() == 2:
            return x[low:high]
        batch = max(1, self.batch)
        times = slice(low // batch, high // batch)
        part = x[times]
        if self.length is not None:
            t = torch.arange(times.start, times.stop, device=x.device).unsqueeze(1)
            part = torch.where((self.length > t).unsqueeze(-1), part, 0)
        return part.reshape(high - low, self.inputs)


@dataclass(frozen=True)
class Tape:
    """What the way back needs of some rows.

    Attributes:
        values: [rows, P, S-1+K, H], and one more value where state 0 is projected: what the cell
            gave.
        base: the row of the batch's rows that is the first of these, for lanes forward in time and
            for those backward.
    """

    values: Tensor
    base: tuple[int, int] = (0, 0)


class Sweeps(Protocol):
    """The kernels: each call takes every lane through the steps `[begin, end)` of its own
    direction, for rows that are stored from where the chunk begins on.

    Tensors are contiguous. Row r of the batch's rows is row `r - scan.stretch(begin, end, ..)[0]`
    of `u`, `v`, `du`, `dv` and `previous`. `scan.batch` is not 0.
    """

    def forward(
        self,
        scan: Scan,
        begin: int,
        end: int,
        u: Tensor,
        b_hh: Tensor | None,
        carry: Tensor,
        y: Tensor,
        tape: Tensor | None,
    ) -> None:
        """Walk the steps in order.

        Args:
            u: [P, chunk_rows, G*H] input projections, biases in.
            b_hh: [P, G*H] for gates that are not tied, or None.
            carry: [S+1, P, B, H] in `scan.compute`: states before, and then after, the chunk;
                the last is room for state 0. Where that is projected, Q wide and all others H,
                rows are as wide as the wider.
            y: [rows, P, Q].
            tape: `Tape.values`, of all rows; or None.
        """

    def backward(
        self,
        scan: Scan,
        begin: int,
        end: int,
        dy: Tensor | None,
        s0: Tensor,
        ds: Tensor,
        y: Tensor,
        tape: Tape,
        du: Tensor,
        dv: Tensor,
        previous: Tensor,
        dh: Tensor | None,
    ) -> None:
        """Walk the steps from the end.

        Args:
            dy: [rows, P, Q], or None for zeros.
            s0: [S, P, B, H] in `scan.compute`, as `carry`.
            ds: the same: gradients of the states after, and then before, the chunk.
            y, tape: as forward left them; of the tape the rows of the steps and, before the
                first, the states.
            du, dv: [P, chunk_rows, G*H] gradients of the projections; one tensor where all gates
                are tied.
            previous: [P, chunk_rows, Q], filled with state 0 before each step.
            dh: the same, with the gradient of state 0 after it; None unless it is projected.
        """


@runtime_checkable
class ReplayingSweeps(Sweeps, Protocol):
    """Kernels that make the tape of a chunk again."""

    def previous(
        self, scan: Scan, begin: int, end: int, s0: Tensor, y: Tensor, previous: Tensor
    ) -> None:
        """Fill `previous`, as `backward` does, from `y` and the initial state."""

    def replay(
        self,
        scan: Scan,
        begin: int,
        end: int,
        u: Tensor,
        v: Tensor,
        b_hh: Tensor | None,
        previous: Tensor,
        carry: Tensor,
        tape: Tape | None,
    ) -> None:
        """Walk the steps in order, from `previous` and its product `v` with the recurrent weights.

        Args:
            u, b_hh: as in `forward`; `v` is as `u`.
            previous: as `backward` has it.
            carry: [S, P, B, H] in `scan.compute`: of the states past the first those before, and
                then after, the chunk.
            tape: filled for the steps and, where they have a step before, with the states there;
                or None.
        """


def forward(
    sweeps: Sweeps, derived: Derived, plan: Plan, given: Operands, tape: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, final states and, where asked for, the tape, as `torch.ops.fastrnn.scan`."""
    scan = Scan(derived, plan, given)
    x, lanes, hidden = given.x, scan.lanes, scan.hidden
    make = torch.empty if given.lengths is None else torch.zeros  # zeros past the end of a row
    y = make(*x.shape[:-1], lanes * scan.recurrent, dtype=x.dtype, device=x.device)
    size = scan.rows if tape else 0, lanes, scan.slots(), hidden
    saved = make(size, dtype=x.dtype, device=x.device)
    widest = max(hidden, scan.recurrent)
    carry = x.new_zeros(scan.states + 1, lanes, scan.batch, widest, dtype=scan.compute)
    for j, state in enumerate(given.s0):
        carry[j, ..., : scan.width(j)] = state
    b_ih, b_hh = _biases(scan)
    u = x.new_empty(lanes, scan.chunk_rows, scan.gates * hidden)
    for begin in range(0, scan.steps if scan.batch else 0, scan.chunk_steps):
        end = min(scan.steps, begin + scan.chunk_steps)
        _project(scan, u, b_ih, begin, end)
        sweeps.forward(scan, begin, end, u, b_hh, carry, y, saved if tape else None)
    last = [carry[j, ..., : scan.width(j)] for j in range(scan.states)]
    # A copy in every case: states are not to keep the rest of `carry` alive, nor share it.
    return y, [state.to(x.dtype, copy=True).contiguous() for state in last], saved


def _biases(scan: Scan) -> tuple[Tensor | None, Tensor | None]:
    """[P, G*H] to be added to u, and to v: a gate that the cell knows by the sum of the two takes
    both biases in u."""
    given, tied = scan.given, scan.derived.tied
    if not given.b_ih:
        return None, None
    b_ih, b_hh = _stacked(given.b_ih).clone(), _stacked(given.b_hh)
    for g in range(scan.gates):
        if tied[g]:
            part = slice(g * scan.hidden, (g + 1) * scan.hidden)
            b_ih[:, part] += b_hh[:, part]
    return b_ih, None if all(tied) else b_hh


def _project(scan: Scan, u: Tensor, bias: Tensor | None, begin: int, end: int) -> None:
    """u = x * w_ih^T + b for the rows of a chunk, of every scan in its direction."""
    for p, lanes in _runs(scan.backward_lanes):
        low, high = scan.stretch(begin, end, scan.backward_lanes[p])
        x = scan.x_rows((low, high))
        w = scan.w_ih[lanes].transpose(1, 2)
        out = u[lanes, : high - low]
        if w.size(0) == 1:
            if bias is None:
                torch.mm(x, w[0], out=out[0])
            else:
                torch.addmm(bias[p], x, w[0], out=out[0])
        elif bias is None:
            torch.bmm(x.expand(w.size(0), *x.shape), w, out=out)
        else:
            torch.baddbmm(bias[lanes].unsqueeze(1), x.expand(w.size(0), *x.shape), w, out=out)


def backward(
    sweeps: Sweeps,
    derived: Derived,
    plan: Plan,
    given: Operands,
    grads: Sequence[Tensor | None],
    y: Tensor,
    tape: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr and s0, those that `needs` picks, as
    `torch.ops.fastrnn.scan_backward`. A tape without rows is made again, a chunk at a time, by
    kernels that can."""
    *need_rest, need_s0 = needs
    scan = Scan(derived, plan, given)
    x, lanes, hidden, compute = given.x, scan.lanes, scan.hidden, scan.compute
    dy = None if grads[0] is None else grads[0].contiguous()
    widest = max(hidden, scan.recurrent)
    s0 = x.new_zeros(scan.states, lanes, scan.batch, widest, dtype=compute)
    ds = torch.zeros_like(s0)
    for j in range(scan.states):
        if given.s0:
            s0[j, ..., : scan.width(j)] = given.s0[j]
        grad = grads[1 + j]
        if grad is not None:
            ds[j, ..., : scan.width(j)] = grad
    depth = scan.gates * hidden

    def room(width: int) -> Tensor:
        size = lanes, scan.chunk_rows, width
        return torch.empty(size, dtype=x.dtype, device=x.device)

    dv = room(depth)
    du = dv if all(derived.tied) else room(depth)
    previous = room(scan.recurrent)
    dh = None if scan.w_hr is None else room(scan.recurrent)

    found = _Gradients(scan, *need_rest)
    y, whole = y.contiguous(), Tape(tape.contiguous())
    steps = scan.steps if scan.batch else 0
    chunks = [(max(0, end - scan.chunk_steps), end) for end in range(steps, 0, -scan.chunk_steps)]
    replay = None
    if chunks and scan.slots() and not tape.size(0):
        assert isinstance(sweeps, ReplayingSweeps), "these need a tape"
        v = room(depth) if du is dv else du
        replay = _Replay(sweeps, scan, chunks, s0, y, dv, v, previous)
    for begin, end in chunks:
        found_tape = whole if replay is None else replay.tape(begin, end)
        if given.lengths is not None:  # rows past an end have no gradient
            for each in (dv, du, previous, dh):
                if each is not None:
                    each.zero_()
        sweeps.backward(scan, begin, end, dy, s0, ds, y, found_tape, du, dv, previous, dh)
        found.add(begin, end, du, dv, previous, dh, whole.values)
    out = found.all()
    if need_s0:
        for j in range(len(given.s0)):
            out.append(ds[j, ..., : scan.width(j)].to(x.dtype, copy=True).contiguous())
    return out


class _Replay:
    """Tapes of chunks, made again from the output: given that, the projections of all steps are
    products of matrices, and the cell is left. Only its states past the first pass from step to
    step, so a first walk through the chunks finds those at which each begins.

    Args:
        chunks: steps `(begin, end)`, the last chunk first.
        s0: [S, P, B, H] in `scan.compute`.
        u, v, previous: room for these.
    """

    def __init__(
        self,
        sweeps: ReplayingSweeps,
        scan: Scan,
        chunks: Sequence[tuple[int, int]],
        s0: Tensor,
        y: Tensor,
        u: Tensor,
        v: Tensor,
        previous: Tensor,
    ) -> None:
        self._sweeps, self._scan, self._s0, self._y = sweeps, scan, s0, y
        self._u, self._v, self._previous = u, v, previous
        self._b_ih, self._b_hh = _biases(scan)
        # The step before a chunk's first has its states there, too.
        rows = min(scan.rows, scan.chunk_rows + scan.batch)
        self._values = y.new_empty(rows, scan.lanes, scan.slots(), scan.hidden)
        carry = s0.clone()
        self._before = {0: carry}
        if scan.states > 1:
            for begin, end in reversed(chunks[1:]):
                carry = carry.clone()
                self._walk(begin, end, carry, None)
                self._before[end] = carry

    def tape(self, begin: int, end: int) -> Tape:
        """That of a chunk, until the next is asked for."""
        scan = self._scan
        start = max(0, begin - 1)
        tape = Tape(
            self._values, (scan.stretch(start, end, False)[0], scan.stretch(begin, end, True)[0])
        )
        before = self._before.pop(begin) if scan.states > 1 else self._before[0]
        self._walk(begin, end, before, tape)
        return tape

    def _walk(self, begin: int, end: int, carry: Tensor, tape: Tape | None) -> None:
        scan, u, v, previous = self._scan, self._u, self._v, self._previous
        _project(scan, u, self._b_ih, begin, end)
        self._sweeps.previous(scan, begin, end, self._s0, self._y, previous)
        for p, lanes in _runs(scan.backward_lanes):
            low, high = scan.stretch(begin, end, scan.backward_lanes[p])
            count = high - low
            w_hh = scan.w_hh[lanes].transpose(1, 2)
            torch.bmm(previous[lanes, :count], w_hh, out=v[lanes, :count])
        self._sweeps.replay(scan, begin, end, u, v, self._b_hh, previous, carry, tape)


class _Gradients:
    """Gradients of the weights, the biases and x, summed up over the stretches of the sweep."""

    def __init__(
        self,
        scan: Scan,
        need_x: bool,
        need_ih: bool,
        need_hh: bool,
        need_bias: bool,
        need_hr: bool,
    ) -> None:
        self.scan = scan
        lanes, depth, x = scan.lanes, scan.gates * scan.hidden, scan.given.x
        biased = need_bias and bool(scan.given.b_ih)

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return x.new_zeros(shape, dtype=scan.compute) if wanted else None

        self.x = zeros(need_x, scan.rows, scan.inputs)
        self.w_ih = zeros(need_ih, lanes, depth, scan.inputs)
        self.w_hh = zeros(need_hh, lanes, depth, scan.recurrent)
        projected = need_hr and scan.w_hr is not None
        self.w_hr = zeros(projected, lanes, scan.recurrent, scan.hidden)
        self.b_ih = zeros(biased, lanes, depth)
        self.b_hh = zeros(biased, lanes, depth)

    def add(
        self,
        begin: int,
        end: int,
        du: Tensor,
        dv: Tensor,
        previous: Tensor,
        dh: Tensor | None,
        tape: Tensor,
    ) -> None:
        scan = self.scan
        for p, lanes in _runs(scan.backward_lanes):
            low, high = scan.stretch(begin, end, scan.backward_lanes[p])
            count = high - low
            u, v, h = (each[lanes, :count] for each in (du, dv, previous))
            if self.w_ih is not None:
                x = scan.x_rows((low, high))
                self.w_ih[lanes] += torch.bmm(u.transpose(1, 2), x.expand(u.size(0), *x.shape))
            if self.w_hh is not None:
                self.w_hh[lanes] += torch.bmm(v.transpose(1, 2), h)
            if self.w_hr is not None and dh is not None:
                unprojected = tape[low:high, lanes, -1].transpose(0, 1)
                self.w_hr[lanes] += torch.bmm(dh[lanes, :count].transpose(1, 2), unprojected)
            if self.b_ih is not None and self.b_hh is not None:
                self.b_ih[lanes] += u.sum(1, dtype=scan.compute)
                self.b_hh[lanes] += v.sum(1, dtype=scan.compute)
            if self.x is not None:
                for lane, gradient in enumerate(u, p):
                    self.x[low:high] += torch.mm(gradient, scan.w_ih[lane])

    def all(self) -> list[Tensor]:
        dtype, shape = self.scan.given.x.dtype, self.scan.given.x.shape
        out = [] if self.x is None else [self.x.view(shape).to(dtype)]
        for group in (self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr):
            out += [] if group is None else list(group.to(dtype).unbind(0))
        return out


def _runs(backward: Sequence[bool]) -> list[tuple[int, slice]]:
    """Scans side by side that run in the same direction: `(first, slice)` each."""
    edges = [p for p in range(len(backward)) if p == 0 or backward[p] != backward[p - 1]]
    ends = [*edges[1:], len(backward)]
    return [(p, slice(p, end)) for p, end in zip(edges, ends, strict=True)]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[P, ...], contiguous; without a copy for one scan."""
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0).contiguous()
    return torch.stack(list(tensors))
