"""What a kernel for GPUs is: two functions that take every recurrence through some steps, `Sweeps`,
and what they are told of a call.

`cuda.py` and `triton/` have one pair each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastrnn.compiler.derive import Derived
from fastrnn.kernels.operands import Operands
from fastrnn.plan import Plan

__all__ = [
    "BackwardBuffers",
    "ForwardBuffers",
    "RecomputeBuffers",
    "RecomputingSweeps",
    "Scan",
    "Sweeps",
    "Tape",
    "stacked",
    "tf32_allowed",
]


def tf32_allowed() -> bool:
    """Whether float32 is multiplied by recurrent weights as TF32: where torch lets `nn.LSTM` do it,
    by `torch.backends.cudnn.rnn.fp32_precision` or `torch.backends.cudnn.allow_tf32`."""
    rnn: Any = torch.backends.cudnn.rnn  # its type does not tell of this
    return bool(rnn.fp32_precision == "tf32")


class Scan:
    """What both directions need to know of a call.

    Attributes:
        cell: the name under which the kernels know it.
        derived, plan, given: what is computed, how, and of what.
        gates, states, recurrences, hidden, inputs, steps, batch, rows: G, S, P, H, I, T, B and the
            number of rows, padded ones included.
        recurrent: Q, the width of state 0, which is the output: H unless it is projected.
        compute: the dtype of sums and states.
        w_ih, w_hh, w_hr: [P, G*H, I], [P, G*H, Q] and, where state 0 is projected, [P, Q, H].
        first: of packed input the row at which each step begins [T+1], and the same on the device.
        length: int64 [B], steps of each row of the batch, unless all have `steps`.
        resets: uint8 [rows], whether an episode begins there.
        reverse: a bit per recurrence.
        chunk_steps, chunk_rows: steps that a launch takes, and the most rows that they have.
    """

    def __init__(self, cell: str, derived: Derived, plan: Plan, given: Operands) -> None:
        self.cell, self.derived, self.plan, self.given = cell, derived, plan, given
        x = given.x
        self.gates, self.states = len(derived.gates), len(derived.states)
        self.recurrences = len(given.w_hh)
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
            sequences = torch.arange(self.batch, device="cpu")
            length = (sizes > sequences.unsqueeze(1)).sum(1)
            self.first_on_device = first.to(x.device, non_blocking=True)
            self.length = length.to(x.device, non_blocking=True)
        else:
            self.steps, self.batch = (x.size(0), x.size(1)) if x.dim() == 3 else (1, x.size(0))
            if given.lengths is not None:
                self.length = given.lengths.to(x.device).contiguous()
        self.resets = None if given.resets is None else given.resets.contiguous().view(torch.uint8)
        self.reverse = given.reverse
        self.reversed_recurrences = [bool(given.reverse >> p & 1) for p in range(self.recurrences)]
        self.chunk_steps = plan.chunk_steps(self.steps, self.batch)
        self.chunk_rows = min(self.rows, self.chunk_steps * self.batch)
        self.w_hh = stacked(given.w_hh)
        self.w_ih = stacked(given.w_ih)
        self.w_hr = stacked(given.w_hr) if given.w_hr else None

    def width(self, state: int) -> int:
        return self.hidden if state else self.recurrent

    def tape_width(self) -> int:
        """Values of [H] that a row of the tape holds."""
        return self.derived.tape_width(self.w_hr is not None)

    def row(self, t: int) -> int:
        return t * self.batch if self.first is None else self.first[t]

    def row_range(self, begin: int, end: int, backward: bool) -> tuple[int, int]:
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
    """What the backward pass needs of some rows.

    Attributes:
        values: [rows, P, S-1+K, H], and one more value where state 0 is projected: what the cell
            gave.
        base: the row of the batch's rows that is the first of these, for recurrences forward in
            time and for those backward.
    """

    values: Tensor
    base: tuple[int, int] = (0, 0)


# Tensors of the buffers are contiguous. Row r of the batch's rows is row
# `r - scan.row_range(begin, end, ..)[0]` of `u`, `v`, `du`, `dv`, `h_prev` and `dh`.


class ForwardBuffers(NamedTuple):
    """What the forward sweep reads and writes.

    Attributes:
        u: [P, chunk_rows, G*H] input projections, biases in.
        b_hh: [P, G*H] for gates that are not summed, or None.
        carry: [S+1, P, B, H] in `scan.compute`: states before, and then after, the chunk; the last
            is room for state 0. Where that is projected, Q wide and all others H, rows are as wide
            as the wider.
        y: [rows, P, Q].
        tape: `Tape.values`, of all rows; or None.
    """

    u: Tensor
    b_hh: Tensor | None
    carry: Tensor
    y: Tensor
    tape: Tensor | None


class BackwardBuffers(NamedTuple):
    """What the backward sweep reads and writes, besides the tape.

    Attributes:
        dy: [rows, P, Q], or None for zeros.
        s0: [S, P, B, H] in `scan.compute`, as `ForwardBuffers.carry`.
        ds: the same: gradients of the states after, and then before, the chunk.
        y: as the forward sweep left it.
        du, dv: [P, chunk_rows, G*H] gradients of the projections; one tensor where all gates are
            summed.
        h_prev: [P, chunk_rows, Q], filled with state 0 before each step.
        dh: the same, with the gradient of state 0 after it; None unless it is projected.
    """

    dy: Tensor | None
    s0: Tensor
    ds: Tensor
    y: Tensor
    du: Tensor
    dv: Tensor
    h_prev: Tensor
    dh: Tensor | None


class RecomputeBuffers(NamedTuple):
    """What a sweep that makes the tape again reads and writes, besides the tape.

    Attributes:
        u, b_hh: as `ForwardBuffers` has them.
        v: [P, chunk_rows, G*H], the product of `h_prev` with the recurrent weights.
        h_prev: as `BackwardBuffers` has it.
        carry: [S, P, B, H] in `scan.compute`: of the states past the first those before, and then
            after, the chunk.
    """

    u: Tensor
    v: Tensor
    b_hh: Tensor | None
    h_prev: Tensor
    carry: Tensor


class Sweeps(Protocol):
    """The kernels: each call takes every recurrence through the steps `[begin, end)` of its own
    direction, for rows that are stored from where the chunk begins on. `scan.batch` is not 0."""

    def forward(self, scan: Scan, begin: int, end: int, buffers: ForwardBuffers) -> None:
        """Walk the steps in order."""

    def backward(
        self, scan: Scan, begin: int, end: int, buffers: BackwardBuffers, tape: Tape
    ) -> None:
        """Walk the steps from the end.

        Args:
            tape: as `forward` left it: the rows of the steps and, before the first, the states.
        """


@runtime_checkable
class RecomputingSweeps(Sweeps, Protocol):
    """Kernels that recompute the tape of a chunk."""

    def h_prev(
        self, scan: Scan, begin: int, end: int, s0: Tensor, y: Tensor, h_prev: Tensor
    ) -> None:
        """Fill `h_prev`, as `backward` does, from `y` and the initial state."""

    def recompute(
        self, scan: Scan, begin: int, end: int, buffers: RecomputeBuffers, tape: Tape | None
    ) -> None:
        """Walk the steps in order, from `h_prev` and its product `v`.

        Args:
            tape: filled for the steps and, where they have a step before, with the states there;
                or None.
        """


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[P, ...], contiguous; without a copy for one scan."""
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0).contiguous()
    return torch.stack(list(tensors))
