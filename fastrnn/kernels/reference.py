"""The scan in plain torch operations: the oracle of every kernel and the universal fallback.

Its autograd is the oracle for gradients. Double backward, `vmap`, forward-mode AD and every device
or dtype that no other kernel supports run through it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.cells import Cell
from fastrnn.cells.checks import fault_of_operand, fault_of_states
from fastrnn.cells.noise import numbers as numbers_of
from fastrnn.cells.variants import clipped, unclipped
from fastrnn.kernels.operands import Needs, Operands

__all__ = ["forward", "gradients", "scan", "scan_with_steps", "warn_of_loop"]

_L = list[Tensor]
# Gets recurrence, time, u, v, states before and after the step, and the numbers of the draws.
_Record = Callable[[int, int, Tensor, Tensor, _L, _L, _L], None]


def scan(
    cell: Cell,
    operands: Operands,
    record: _Record | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run `P` independent scans of one cell over the same input.

    Args:
        cell: the cell, with `G` gates and `S` states.
        operands: its arguments.
        record: called as `record(p, t, u, v, before, after)` after every step of every recurrence,
            before the projection.

    Returns:
        `y`, in `x`'s shape with `P*Q` in place of `I`, and the `S` final states, shaped as `s0`.
    """
    x, w_ih, w_hh, b_ih, b_hh, w_hr, _, s0, begins = operands[:9]
    batch_sizes, lengths, resets, _, reverse = operands[9:]
    packed = batch_sizes is not None
    one_step = x.dim() == 2 and not packed
    if one_step:
        s0, begins = ([s.unsqueeze(0) for s in states] for states in (s0, begins))
    steps = _steps(x, batch_sizes)
    sizes = [s.size(-2) for s in steps]
    batch = sizes[0] if sizes else (s0[0].size(1) if s0 else 0)
    flags = None if resets is None else _steps(resets.unsqueeze(-1), batch_sizes)
    alive = None if lengths is None else lengths.to(x.device)
    # What is clipped is the gradient of a state, and state 0 may yet be projected.
    own, limit = unclipped(cell)
    outputs: list[Tensor] = []
    finals: list[list[Tensor]] = []
    for p in range(len(w_hh)):
        hidden = cell.hidden_size(w_ih[p])
        recurrent = w_hh[p].size(1)
        params = operands.params_of(p)
        drawn = _drawn(cell, operands, p, (len(steps), batch, hidden))
        if s0:
            states = [s[p] for s in s0]
        else:
            zero = x.new_zeros(batch, hidden)
            states = [
                x.new_zeros(batch, recurrent) if k == 0 else zero for k in range(len(cell.states))
            ]
        ys: list[Tensor] = [x.new_zeros(0, recurrent)] * len(steps)
        backward = bool(reverse >> p & 1)
        order = range(len(steps) - 1, -1, -1) if backward else range(len(steps))
        for t in order:
            n = sizes[t]
            before = [s[:n] for s in states] if packed else states
            if flags is not None:
                edge = t + 1 if backward else t
                if edge < len(steps):
                    cut = flags[edge]
                    if alive is not None:
                        cut = cut & (alive > edge).unsqueeze(-1)
                    instead = [s[p] for s in begins] if begins else [None] * len(before)
                    before = [_cut(s, cut, b) for s, b in zip(before, instead, strict=True)]
            u = F.linear(steps[t], w_ih[p], b_ih[p] if b_ih else None)
            v = F.linear(before[0], w_hh[p], b_hh[p] if b_hh else None)
            gates_u, gates_v = _blocks(cell, u, v, hidden)
            apply = _applied(cell, operands, p, gates_u[0].shape)
            z = [numbers[t if len(numbers) > 1 else 0, :n] for numbers in drawn]
            after = own.step(gates_u, gates_v, before, params, apply, z)
            if params:  # a state that follows from these alone may be smaller
                after = [_as_large(a, gates_u[0]) for a in after]
            if fault := fault_of_states(cell, after, gates_u[0].shape):
                raise ValueError(fault)
            if limit is not None:
                after = [after[0], *(clipped(a, limit) for a in after[1:])]
            if record is not None:
                record(p, t, u, v, before, after, z)
            if w_hr:
                after = [F.linear(after[0], w_hr[p]), *after[1:]]
            if limit is not None:
                after = [clipped(after[0], limit), *after[1:]]
            y = after[0]
            if alive is not None:
                valid = (alive > t).unsqueeze(-1)
                y = torch.where(valid, y, 0)
                after = [torch.where(valid, a, s) for a, s in zip(after, states, strict=True)]
            if packed and n < batch:
                after = [torch.cat([a, s[n:]]) for a, s in zip(after, states, strict=True)]
            states, ys[t] = after, y
        outputs.append(
            (torch.cat(ys) if packed else torch.stack(ys))
            if ys
            else x.new_zeros(0, batch, recurrent)
        )
        finals.append(states)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    y = y.reshape(*x.shape[:-1], y.size(-1))
    if one_step:
        return y, finals[0]
    return y, [torch.stack(list(s)) for s in zip(*finals, strict=True)]


def _drawn(
    cell: Cell, operands: Operands, recurrence: int, size: tuple[int, int, int]
) -> list[Tensor]:
    """The random numbers of a recurrence, for each draw of its cell."""
    if not cell.noise:
        return []
    if operands.noise is None:
        raise RuntimeError(f"scan: cell {cell.name!r} draws random numbers, and noise is missing")
    made = numbers_of(cell.draws, operands.noise, recurrence, size)
    return [each.to(operands.x.dtype) for each in made]


def _blocks(
    cell: Cell, u: Tensor, v: Tensor, hidden: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The projections of the gates with input rows, and of those with recurrent rows."""
    return u.split(hidden, -1), v.split(hidden, -1) if cell.recurrent else ()


class _Blocks(Sequence[Tensor]):
    """The recurrent projections of a value, each computed when it is read."""

    def __init__(self, operands: Operands, p: int, x: Tensor) -> None:
        # A copy, in case the cell writes into x before it reads a projection.
        self.w, self.x = operands.w_hh[p], x.clone()
        self.b = operands.b_hh[p] if operands.b_hh else None

    def __len__(self) -> int:
        return self.w.size(0) // self.w.size(1)

    def __getitem__(self, gate: Any) -> Any:
        hidden = self.w.size(1)
        rows = slice(gate * hidden, (gate + 1) * hidden)
        return F.linear(self.x, self.w[rows], None if self.b is None else self.b[rows])


def _as_large(state: Any, like: Tensor) -> Any:
    """A state that has one number for all units or rows, for each of them; others as they are."""
    if isinstance(state, Tensor) and state.dim() <= like.dim():
        sizes = zip(state.shape[::-1], like.shape[::-1], strict=False)
        if all(own in (1, wanted) for own, wanted in sizes):
            return state.expand(like.shape)
    return state


def _applied(
    cell: Cell, operands: Operands, p: int, shape: tuple[int, ...]
) -> Callable[[Tensor], Sequence[Tensor]]:
    def apply(x: Tensor) -> Sequence[Tensor]:
        if not isinstance(x, Tensor) or x.shape[-1:] != shape[-1:]:
            raise ValueError(fault_of_operand(cell, x, shape))
        return _Blocks(operands, p, x)

    return apply


def scan_with_steps(cell: Cell, operands: Operands) -> tuple[Tensor, list[Tensor], Tensor]:
    """`scan`, and the states past the first after every step, [R, P, S-1, H], with zeros past the
    end of a sequence."""
    x, lengths = operands.x, operands.lengths
    alive = None if lengths is None else lengths.to(x.device)
    made: list[dict[int, Tensor]] = [{} for _ in operands.w_hh]

    def record(p: int, t: int, u: Tensor, v: Tensor, before: _L, after: _L, z: _L) -> None:
        hidden = cell.hidden_size(operands.w_ih[p])
        states = torch.cat(after[1:], -1) if len(after) > 1 else u[:, :0]
        if alive is not None:
            states = torch.where((alive > t).unsqueeze(-1), states, 0)
        made[p][t] = states.unflatten(-1, (len(after) - 1, hidden))

    y, last = scan(cell, operands, record)
    if not made[0]:
        hidden = cell.hidden_size(operands.w_ih[0])
        return y, last, x.new_zeros(0, len(made), len(cell.states) - 1, hidden)
    each = [torch.cat([steps[t] for t in sorted(steps)]) for steps in made]
    return y, last, torch.stack(each, 1)


def forward(cell: Cell, operands: Operands, tape: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, final states and the tape, as `torch.ops.fastrnn.scan`; the tape has no rows unless
    `tape` is set."""
    from fastrnn.compiler.derive import derive

    x = operands.x
    derived = derive(cell)
    hidden = cell.hidden_size(operands.w_ih[0])
    ratio = 2 if x.element_size() == 2 else 1
    width = derived.tape_width(bool(operands.w_hr), hidden, ratio)
    rows = x.shape[:-1].numel() if tape else 0
    saved = x.new_zeros(rows, len(operands.w_hh), width, hidden)
    first = _first_rows(operands)

    def record(p: int, t: int, u: Tensor, v: Tensor, before: _L, after: _L, z: _L) -> None:
        values = after[1:]
        results: list[Tensor] = []
        if derived.saved or derived.rows:
            gates = _blocks(cell, u, v, hidden)
            params = [row for param in operands.params_of(p) for row in param.split(hidden)]
            apply = _applied(cell, operands, p, gates[0][0].shape)
            made = derived.forward(*gates, before, params, apply, z)[1]
            values += made[: len(derived.saved)]
            results = made[len(derived.saved) :]
        if operands.w_hr:
            values.append(after[0])
        if results:
            joined = torch.cat(results, -1)
            numbers = joined.to(torch.promote_types(x.dtype, torch.float32)).view(x.dtype)
            rest = saved[first[t] : first[t] + numbers.size(0), p, len(values) :].flatten(1)
            if operands.lengths is not None:
                numbers = torch.where((operands.lengths > t).unsqueeze(-1), numbers, 0)
            rest[:, : numbers.size(1)] = numbers
        for k, value in enumerate(values):
            if operands.lengths is not None:
                value = torch.where((operands.lengths > t).unsqueeze(-1), value, 0)
            saved[first[t] : first[t] + value.size(0), p, k] = value

    y, last = scan(cell, operands, record if tape else None)
    return y, last, saved


def _first_rows(operands: Operands) -> list[int]:
    """The first row of every time step."""
    if operands.batch_sizes is not None:
        return [0, *operands.batch_sizes.cumsum(0).tolist()]
    x = operands.x
    return [t * x.size(1) for t in range(x.size(0))] if x.dim() == 3 else [0]


def gradients(
    cell: Cell,
    operands: Operands,
    grads: list[Tensor | None],
    needs: Needs,
    create_graph: bool,
) -> list[Tensor]:
    """Gradients of the operands that `needs` selects, as `torch.ops.fastrnn.scan_backward`, by
    autograd and without a tape. `grads` are those of y, of the states, and of the states after
    every step."""

    def alias(tensor: Tensor) -> Tensor:
        # One tensor may be several operands (tied weights), which have a gradient each.
        attached = create_graph and tensor.requires_grad
        return tensor.view_as(tensor) if attached else tensor.detach().requires_grad_()

    need_x, *need_lists = needs.groups()
    with torch.enable_grad():
        x = alias(operands.x) if need_x else operands.x
        lists: list[Any] = [
            [alias(t) if need else t for t in tensors]
            for tensors, need in zip(operands.lists(), need_lists, strict=True)
        ]
        aliases = Operands(x, *lists, *operands[1 + len(lists) :])
        if grads[-1] is None:
            y, states = scan(cell, aliases)
        else:
            y, states, steps = scan_with_steps(cell, aliases)
            states = [*states, steps]
        wanted = [x] if need_x else []
        for tensors, need in zip(lists, need_lists, strict=True):
            wanted += tensors if need else []
        reached = [
            (output, grad)
            for output, grad in zip([y, *states], grads, strict=False)
            if grad is not None and output.requires_grad
        ]
        if not reached:
            return [torch.zeros_like(t) for t in wanted]
        out = torch.autograd.grad(
            [output for output, _ in reached],
            wanted,
            [grad for _, grad in reached],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return list(out)


def warn_of_loop(cell: str, why: str) -> None:
    """Warn that calls of a cell come here, and why."""
    warnings.warn(
        f"cell {cell!r} runs as a loop of torch operations, many times slower than compiled: {why}",
        UserWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """The `stacklevel` of the first frame that belongs neither to this package nor to torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "fastrnn",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level


def _steps(rows: Tensor, batch_sizes: Tensor | None) -> list[Tensor]:
    """The rows of each time step: [T, B, I] or packed [R, I] split by time, [B, I] as one step."""
    if batch_sizes is not None:
        return list(rows.split(batch_sizes.tolist()))
    return list(rows.unbind(0)) if rows.dim() == 3 else [rows]


def _cut(state: Tensor, flags: Tensor, begin: Tensor | None) -> Tensor:
    """`state` with the rows of `begin`, or zeros, where `flags` [n, 1] is set; rows from n on
    stay."""
    n = flags.size(0)
    head = torch.where(flags, 0 if begin is None else begin[:n], state[:n])
    return head if n == state.size(0) else torch.cat([head, state[n:]])
