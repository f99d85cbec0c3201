"""Cells, operands and results of a scan."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastrnn import cells, ops
from fastrnn.kernels import reference
from fastrnn.kernels.operands import Needs, Operands
from tests.support.names import BUILT_IN
from tests.support.tensors import flatten


@cells.cell(gates="ab", states="hc")
def linear(u, v, h, c):
    """It maps whole numbers to whole numbers, so rounding cannot hide a wrong index."""
    c = c + v.b - 2 * u.b
    return u.a - v.a + c, c - h


@cells.cell(gates="ab", states="hc", params={"each": "unit", "all": "one"})
def linear_projectable(u, v, p, h, c):
    """The same with learned parameters, but it reads the previous output through `v` alone."""
    c = c + v.b - 2 * u.b + p.each * u.a
    return u.a - v.a + c + p.all, c - p.all * v.a


@cells.cell(gates="abde", inputs="abd", recurrent="eba", states="hc", params={"each": "unit"})
def linear_rows(u, v, p, h, c):
    """The same of gates that lack rows of one matrix, some summed."""
    c = c + v.b + u.b - 2 * u.d + p.each * u.d
    return u.a - v.a + c + v.e, c - h


@cells.cell(gates="ab", recurrent="", states="hc")
def linear_apart(u, v, h, c):
    """The same of units that do not see each other."""
    return u.a - h + c, c + u.b - h


@cells.cell(gates="ab", states="hc", params={"each": "unit"})
def linear_staged_projectable(u, v, p, h, c):
    """Sums of gates and of a state, where the previous output is read through `v` alone."""
    total = (u.a + v.a * p.each).sum(-1, keepdim=True)
    c = u.b + v.b - c + total
    return u.a + c.sum(-1, keepdim=True), c


EVERY_GRADIENT = [True] * len(Needs._fields)

# T, B, I, H, P.
Shape: TypeAlias = tuple[int, int, int, int, int]
# A cell, and the width of its projected output.
ROWS = ["linear_rows", "linear_apart"]
PLAIN: list[tuple[str, int | None]] = [(name, None) for name in [*BUILT_IN, "linear", *ROWS]]
PROJECTED: list[tuple[str, int | None]] = [
    (name, 11) for name in ["rnn_tanh", "lstm", "linear_projectable"]
]


def operands(
    cell: cells.Cell,
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    recurrences: int = 1,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    projected: int | None = None,
) -> dict[str, Any]:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    of_u, of_v = len(cell.inputs) * hidden, len(cell.recurrent) * hidden
    scale = max(1, hidden) ** -0.5
    recurrent = hidden if projected is None else projected
    widths = [recurrent, *[hidden] * (len(cell.states) - 1)]
    per_recurrence = range(recurrences)
    return {
        "x": random(steps, batch, inputs),
        "w_ih": [random(of_u, inputs, scale=scale) for _ in per_recurrence],
        "w_hh": [random(of_v, recurrent, scale=scale) for _ in per_recurrence],
        "b_ih": [random(of_u, scale=scale) for _ in per_recurrence if bias],
        "b_hh": [random(of_v, scale=scale) for _ in per_recurrence if bias],
        "w_hr": [
            random(recurrent, hidden, scale=scale) for _ in per_recurrence if projected is not None
        ],
        "params": [
            random(param.size(hidden, len(cell.gates)))
            for _ in per_recurrence
            for param in cell.params.values()
        ],
        "s0": [random(recurrences, batch, width) for width in widths],
        "reverse": 0b10 if recurrences == 2 else 0,
    }


def whole(value: Any) -> Any:
    """`value` with small whole numbers, so sparse that sums stay small."""
    if isinstance(value, list):
        return [whole(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    numbers = torch.randint(-1, 2, value.shape).to(value.dtype)
    if value.dim() == 2 and value.size(1):  # weights: one entry in each row
        keep = torch.zeros_like(value)
        keep[torch.arange(value.size(0)), torch.randint(0, value.size(1), (value.size(0),))] = 1
        return numbers * keep
    return numbers


def run(scan: Any, cell: cells.Cell, given: dict[str, Any]) -> dict[str, Tensor]:
    """Results, and gradients of every operand in `given` that has one."""
    leaves: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, list):
            leaves[name] = [v.detach().clone().requires_grad_() for v in value]
        elif isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = value.detach().clone().requires_grad_()
        else:
            leaves[name] = value
    y, states = scan(cell, **leaves)
    found = {"y": y, **{f"state {s}": value for s, value in enumerate(states)}}
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (value * torch.randint(-2, 3, value.shape, generator=generator).to(value)).sum()
        for value in found.values()
    )
    assert isinstance(total, Tensor)
    total.backward()
    for name, value in leaves.items():
        for k, leaf in enumerate(flatten(value) if isinstance(value, list | Tensor) else []):
            if leaf.requires_grad:
                # Autograd reaches no matrix without rows.
                grad = leaf if leaf.numel() == 0 and leaf.grad is None else leaf.grad
                found[f"gradient of {name} {k}"] = grad
    return found


def positional(key: str | None, given: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the operator."""
    return key, *Operands(**given)


def by_reference(cell: cells.Cell, **given: Any) -> tuple[Tensor, list[Tensor]]:
    """The reference, called as `ops.scan` is."""
    return reference.scan(cell, Operands(**given))


def with_every_step(cell: cells.Cell, **given: Any) -> tuple[Tensor, list[Tensor]]:
    """`ops.scan`, with the states past the first after every step among the results."""
    y, states, steps = ops.run(cell, Operands(**given), steps=True)
    assert steps is not None
    return y, [*states, steps]


def with_every_step_by_reference(cell: cells.Cell, **given: Any) -> tuple[Tensor, list[Tensor]]:
    y, states, steps = reference.scan_with_steps(cell, Operands(**given))
    return y, [*states, steps]


def converted(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def to(value: Any) -> Any:
        if isinstance(value, list):
            return [to(v) for v in value]
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    return {name: to(value) for name, value in given.items()}


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    return converted(given, torch.float64)
