"""The interface of the kernels for GPUs: `Sweeps`, two functions that take every recurrence through
some steps, and the values that describe a call to them.

`cuda.py` and `triton/` implement it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastrnn.compiler.layout import site_of
from fastrnn.kernels.gpu import packed
from fastrnn.kernels.operands import Operands
from fastrnn.plan import Plan

if TYPE_CHECKING:
    from fastrnn.compiler.derive import Derived

__all__ = [
    "BackwardBuffers",
    "ForwardBuffers",
    "RecomputeBuffers",
    "RecomputingSweeps",
    "Scan",
    "Shape",
    "Sweeps",
    "Tape",
    "stacked",
    "tf32_allowed",
]


def tf32_allowed() -> bool:
    """Whether float32 is multiplied by recurrent weights as TF32. torch's switches for `nn.LSTM`
    decide: `torch.backends.cudnn.rnn.fp32_precision` and `torch.backends.cudnn.allow_tf32`."""
    # The switch itself is a property that takes as long as an operation of torch.
    return bool(torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


class Shape:
    """What calls have in common that have the same plan, cell and sizes; `Scan` has the attributes.

    `remembered` is for what the kernels compute once for all these calls.
    """

    def __init__(self, cell: str, derived: Derived, plan: Plan, operands: Operands) -> None:
        self.cell, self.derived, self.plan = cell, derived, plan
        x = operands.x
        self.gates, self.states = len(derived.gates), len(derived.states)
        self.input_gates, self.recurrent_gates = len(derived.inputs), len(derived.recurrent)
        self.recurrences = len(operands.w_hh)
        self.hidden = operands.w_ih[0].size(0) // self.input_gates
        self.recurrent = operands.w_hh[0].size(1)
        self.inputs = x.size(-1)
        self.dtype, self.device = x.dtype, x.device
        self.compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.rows = x.shape[:-1].numel()
        if operands.batch_sizes is not None:
            self.steps, self.batch = operands.batch_sizes.numel(), operands.s0[0].size(-2)
        else:
            self.steps, self.batch = (x.size(0), x.size(1)) if x.dim() == 3 else (1, x.size(0))
        self.reverse = operands.reverse
        self.reversed_recurrences = [
            bool(operands.reverse >> p & 1) for p in range(self.recurrences)
        ]
        self.chunk_steps = plan.chunk_steps(self.steps, self.batch)
        self.chunk_rows = min(self.rows, self.chunk_steps * self.batch)
        # Whether the call is one chunk, and state 0 is the output.
        self.whole = self.chunk_steps >= self.steps > 0
        others = bool(operands.w_hr or operands.params or operands.reset_states)
        self.site_of = site_of(derived) if derived.sites else []
        others = others or max(self.site_of, default=-1) >= 0
        self.whole = self.whole and self.batch > 0 and not others
        self.summed = derived.summed
        self.all_summed = derived.all_summed
        self.remembered: dict[str, Any] = {}


class Scan(Shape):
    """The description of a call, for the forward and the backward pass.

    Attributes:
        cell: the key by which the kernels know the cell.
        derived, plan, operands: the derived cell, the plan, and the operands.
        gates, states, recurrences, hidden, inputs, steps, batch, rows: G, S, P, H, I, T, B and the
            number of rows, including padded ones.
        input_gates, recurrent_gates: GU and GV, the gates with rows in w_ih and in w_hh.
        recurrent: Q, the width of state 0 and of the output: H unless it is projected.
        dtype, compute: the dtypes of tensors, and of sums and states.
        w_ih, w_hh, w_hr: [P, GU*H, I], [P, GV*H, Q] and, if state 0 is projected, [P, Q, H].
        params: [P, N, H], the learned parameters of a cell that has some; a shared one is repeated.
        first, first_on_device: int64 [T+1], the first row of each step, for packed input.
        length: int64 [B], steps of each sequence; None if all have `steps`.
        resets: uint8 [rows], whether an episode begins there.
        reverse: one bit per recurrence.
        summed, all_summed: for each gate of w_hh, whether its two projections are only ever added;
            whether all gates have both, and all are.
        whole: whether the call is one chunk of steps, without parameters of the cell, products of
            other values or given states for resets, and state 0 is the output. There are shorter
            ways for it.
        site_of: for each gate of a cell with stages, see `compiler.layout.site_of`; else empty.
        chunk_steps, chunk_rows: time steps of a launch, and the most rows that they have.
    """

    def __init__(self, shape: Shape, operands: Operands) -> None:
        vars(self).update(vars(shape))
        self.operands = operands
        self.first: list[int] | None = None
        self.first_on_device: Tensor | None = None
        self.length: Tensor | None = None
        if operands.batch_sizes is not None:
            tables = packed.tables(operands.batch_sizes, self.batch, self.device)
            self.first = tables.first
            if self.first[-1] != self.rows:
                raise RuntimeError(
                    f"scan: batch_sizes add up to {self.first[-1]} but x has {self.rows} rows"
                )
            self.first_on_device, self.length = tables.first_on_device(), tables.length()
        elif operands.lengths is not None:
            self.length = operands.lengths.to(self.device).contiguous()
        self.resets = (
            None if operands.resets is None else operands.resets.contiguous().view(torch.uint8)
        )

    @functools.cached_property
    def w_ih(self) -> Tensor:
        return stacked(self.operands.w_ih)

    @functools.cached_property
    def w_hh(self) -> Tensor:
        return stacked(self.operands.w_hh)

    @functools.cached_property
    def w_hr(self) -> Tensor | None:
        return stacked(self.operands.w_hr) if self.operands.w_hr else None

    @functools.cached_property
    def params(self) -> Tensor | None:
        if not self.operands.params:
            return None
        every = [
            param.view(-1, self.hidden)
            if param.size(0) > self.hidden
            else param.expand(1, self.hidden)
            for param in self.operands.params
        ]
        return torch.cat(every).view(self.recurrences, -1, self.hidden)

    def widened(self, *groups: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """For each group of states, or of their gradients, [S, P, B, max(H, Q)] in the type of
        computation; those that are None or missing are zero."""
        size = self.states, self.recurrences, self.batch, max(self.hidden, self.recurrent)
        count = math.prod(size)
        # Kernels take addresses of whole vectors, of 16 bytes, and write some of these tensors.
        spaced = len(groups), -(-count // 4) * 4
        flat = torch.zeros(spaced, dtype=self.compute, device=self.device)
        out = [part[:count].view(size) for part in flat.unbind(0)]
        for made, group in zip(out, groups, strict=True):
            for j, state in enumerate(group):
                if state is not None:
                    made[j, ..., : self.width(j)] = state
        return tuple(out)

    def width(self, state: int) -> int:
        return self.hidden if state else self.recurrent

    def tape_width(self) -> int:
        """W, the number of values [H] in a row of the tape."""
        ratio = 2 if self.dtype.itemsize == 2 else 1
        return self.derived.tape_width(bool(self.operands.w_hr), self.hidden, ratio)

    def row(self, t: int) -> int:
        return t * self.batch if self.first is None else self.first[t]

    def row_range(self, begin: int, end: int, backward: bool) -> tuple[int, int]:
        """First and past-the-last row of the steps [begin, end) in the recurrence's direction."""
        if backward:
            begin, end = self.steps - end, self.steps - begin
        return self.row(begin), self.row(end)

    def x_rows(self, rows: tuple[int, int]) -> Tensor:
        """Rows [n, I] of the input, with zeros past the end of a sequence."""
        x, (low, high) = self.operands.x, rows
        if x.dim() == 2:
            return x[low:high]
        batch = max(1, self.batch)
        times = slice(low // batch, high // batch)
        part = x[times]
        if self.length is not None:
            t = torch.arange(times.start, times.stop, device=x.device).unsqueeze(1)
            part = torch.where((self.length > t).unsqueeze(-1), part, 0)
        return part.reshape(high - low, self.inputs)


class Tape(NamedTuple):
    """The saved values of some rows for the backward pass.

    Attributes:
        values: [rows, P, W, H], see `Derived.tape_width`.
        base: the row of the input that is row 0 here, for recurrences that run forward in time and
            for those that run backward.
    """

    values: Tensor
    base: tuple[int, int] = (0, 0)


# Tensors of the buffers are contiguous. Row r of the input is row
# `r - scan.row_range(begin, end, ..)[0]` of `u`, `v`, `du`, `dv`, `h_prev` and `dh`. Kernels read
# pointers: in a call of one recurrence and one chunk, tensors may lack the first dimension, or have
# steps and batch in the place of rows.


class ForwardBuffers(NamedTuple):
    """The tensors of the forward sweep.

    Attributes:
        u: [P, chunk_rows, GU*H], input projections with their biases.
        b_hh: [P, GV*H] for gates that are not summed, or None.
        carry: [S+1, P, B, max(H, Q)] in `scan.compute`: states before the chunk, then after it.
            The last entry is a second buffer for state 0, which is Q wide; other states are H.
            For kernels that take states it is undefined before the first chunk and after the last.
        y: [rows, P, Q], the output.
        tape: `Tape.values` of all rows, or None.
        begins: [S, P, B, max(H, Q)] in `scan.compute`, the states in which episodes begin; None for
            zeros.
        last: [P, B, H] for each state, receive those after all steps from kernels that take states.
    """

    u: Tensor
    b_hh: Tensor | None
    carry: Tensor
    y: Tensor
    tape: Tensor | None
    begins: Tensor | None = None
    last: Sequence[Tensor] = ()


class BackwardBuffers(NamedTuple):
    """The tensors of the backward sweep, besides the tape.

    Attributes:
        dy: [rows, P, Q], or None for zeros.
        dsteps: [rows, P, S-1, H], gradients of the states past the first after every step, or None
            for zeros.
        s0: [S, P, B, max(H, Q)] in `scan.compute`, initial states; None for kernels that take
            states.
        ds: in the same shape: gradients of the states after the chunk, then before it. For kernels
            that take states they are undefined before the last chunk and after the first.
        y: the output of the forward sweep.
        du, dv: [P, chunk_rows, GU*H] and [P, chunk_rows, GV*H], gradients of the projections; the
            same tensor if all gates are summed.
        h_prev: [P, chunk_rows, Q], receives state 0 before each step.
        dh: [P, chunk_rows, Q], receives the gradient of state 0 after each step; None unless it is
            projected.
        dp: [P, chunk_rows, N*H] in `scan.compute`, receives the gradients of the learned
            parameters at each step; None if the cell has none.
        operands: [P, chunk_rows, J*H], receives what the products of other values than state 0
            multiply (`Derived.sites`); None if the cell has none.
        begins: as in `ForwardBuffers`.
        dbegins: shaped as `begins`: their gradients are added to it; None without them.
        dlast, ds0: of kernels that take states: gradients of the states after all steps, [P, B, H]
            for each or None for zeros, and what receives those of the initial states, if they are
            wanted.
    """

    dy: Tensor | None
    dsteps: Tensor | None
    s0: Tensor | None
    ds: Tensor
    y: Tensor
    du: Tensor
    dv: Tensor
    h_prev: Tensor
    dh: Tensor | None
    dp: Tensor | None
    operands: Tensor | None = None
    begins: Tensor | None = None
    dbegins: Tensor | None = None
    dlast: Sequence[Tensor | None] = ()
    ds0: Sequence[Tensor] = ()


class RecomputeBuffers(NamedTuple):
    """The tensors of a sweep that recomputes the tape, besides the tape.

    Attributes:
        u, b_hh: as in `ForwardBuffers`.
        v: [P, chunk_rows, G*H], the product of `h_prev` with the recurrent weights.
        h_prev: as in `BackwardBuffers`.
        carry: [S, P, B, H] in `scan.compute`: the states after the first, before the chunk and
            then after it.
    """

    u: Tensor
    v: Tensor
    b_hh: Tensor | None
    h_prev: Tensor
    carry: Tensor


class Sweeps(Protocol):
    """The kernels. Each call takes every recurrence through the steps `[begin, end)` of one chunk,
    counted in its own direction. `scan.batch` is not 0.

    Attributes:
        takes_states: whether they read the initial states and the gradients of the last ones as the
            caller has them, and write the others so. Else `carry`, `s0` and `ds` have them all.
    """

    takes_states: bool

    def forward(self, scan: Scan, begin: int, end: int, buffers: ForwardBuffers) -> None:
        """Run the steps in order."""

    def backward(
        self, scan: Scan, begin: int, end: int, buffers: BackwardBuffers, tape: Tape
    ) -> None:
        """Run the steps from the last to the first.

        Args:
            tape: the values that `forward` saved in these steps, and the states that it saved in
                the step before the first.
        """


@runtime_checkable
class RecomputingSweeps(Sweeps, Protocol):
    """Kernels that can also recompute the tape of a chunk."""

    def h_prev(self, scan: Scan, begin: int, end: int, y: Tensor, h_prev: Tensor) -> None:
        """Fill `h_prev`, as `backward` does, from `y` and the initial states."""

    def recompute(
        self, scan: Scan, begin: int, end: int, buffers: RecomputeBuffers, tape: Tape | None
    ) -> None:
        """Run the steps in order, from `h_prev` and its product `v`.

        Args:
            tape: receives the values of the steps, and the states of the step before the first if
                there is one; or None.
        """


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one contiguous [P, ...]; a single contiguous tensor is not copied."""
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0).contiguous()
    return torch.stack(list(tensors))
