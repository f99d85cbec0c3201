"""The initial values of a cell, written into the weights of one recurrence."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastrnn.cells import Cell, Gates, Params
from fastrnn.cells.arguments import Projection
from fastrnn.kernels.operands import Weights

__all__ = ["Rows", "gates_of", "initialize"]


class Rows(NamedTuple):
    """The rows of one gate, as views.

    Attributes:
        weight: [H, I] of `weight_ih`, or [H, H] of `weight_hh`.
        bias: [H] of `bias_ih` or `bias_hh`, or None in a layer without biases.
    """

    weight: Tensor
    bias: Tensor | None


def initialize(cell: Cell, weights: Weights) -> None:
    """Write the values with which the cell's parameters begin, then call its `initialize`; under
    `no_grad`."""
    for param, tensor in zip(cell.params.values(), weights.params, strict=True):
        param.fill(tensor)
    if cell.initialize is not None:
        learned = Params(cell, weights.params)
        cell.initialize(*gates_of(cell, weights), *((learned,) if cell.params else ()))
        for name, tensor in zip(cell.params, weights.params, strict=True):
            if getattr(learned, name) is not tensor:
                raise TypeError(
                    f"initialize of cell {cell.name!r} replaced p.{name}, which has no effect: "
                    f"write into the tensor, as p.{name}.fill_(1) does"
                )


def gates_of(cell: Cell, weights: Weights) -> tuple[Gates, Gates]:
    """The arguments `u` and `v` of a cell's `initialize`: `Rows` of every gate that has rows."""
    u = _rows(len(cell.inputs), weights.w_ih, weights.b_ih)
    v = _rows(len(cell.recurrent), weights.w_hh, weights.b_hh)
    return Gates(cell, u), Projection(cell, v)


def _rows(count: int, weight: Tensor, bias: Tensor | None) -> Any:
    if count == 0:
        return ()
    biases = [None] * count if bias is None else bias.chunk(count)
    return tuple(map(Rows, weight.chunk(count), biases))
