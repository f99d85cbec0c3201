"""What a declaration must be to make a cell, and what its function may give."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastrnn.cells.arguments import KINDS, Param

if TYPE_CHECKING:
    from fastrnn.cells.declare import Cell

__all__ = [
    "MAX_GATES",
    "MAX_PARAMS",
    "MAX_STATES",
    "check",
    "fault_of_operand",
    "fault_of_states",
]

# They equal kMaxGates, kMaxStates and kMaxParams of csrc/cpu/contract.h; kMostStates of
# csrc/cuda/contract.h equals the second.
MAX_GATES = 16
MAX_STATES = 8
MAX_PARAMS = 32

_TAKEN = ("ih", "hh", "hr")  # weight_ih, weight_hh and weight_hr are torch's matrices


def check(cell: Cell) -> None:
    """Refuse a declaration that makes no cell.

    Raises:
        TypeError, ValueError: the message says what to write instead.
    """
    for kind, labels, limit in (
        ("gates", cell.gates, MAX_GATES),
        ("states", cell.states, MAX_STATES),
    ):
        if not labels:
            raise ValueError(f"cell {cell.name!r} needs at least one of {kind}: cell({kind}=...)")
        if len(set(labels)) != len(labels) or not all(n.isidentifier() for n in labels):
            raise ValueError(f"{kind} of cell {cell.name!r} must be distinct identifiers: {labels}")
        if len(labels) > limit:
            raise ValueError(
                f"cell {cell.name!r} has {len(labels)} {kind}, and the kernels are made for at "
                f"most {limit}; split it into several cells"
            )
    _check_rows(cell)
    _check_params(cell)
    signature = inspect.signature(cell.function)
    arguments = ["u", "v", *(["p"] if cell.params else []), *cell.states]
    try:
        bound = signature.bind(*arguments)
        if cell.params and [*bound.arguments, "", "", ""][2] in cell.states:
            raise TypeError("the third argument is `p`, the learned parameters")
    except TypeError as error:
        raise ValueError(
            f"cell {cell.name!r} must be a function of ({', '.join(arguments)}), any "
            f"further parameters with defaults; got {signature}: {error}"
        ) from None
    if cell.initialize is not None:
        _check_initialize(cell.name, cell.initialize, arguments[: -len(cell.states)])


def _check_rows(cell: Cell) -> None:
    for side, kind in (("inputs", "weight_ih"), ("recurrent", "weight_hh")):
        given = getattr(cell, side)
        unknown = [g for g in given if g not in cell.gates]
        if unknown or len(set(given)) != len(given):
            raise ValueError(
                f"{side} of cell {cell.name!r} names the gates with rows in {kind}, each once; its "
                f"gates are {', '.join(cell.gates)}, got {', '.join(map(str, given))}"
            )
    if not cell.inputs:
        raise ValueError(
            f"cell {cell.name!r} has no gate with input rows, so it would not see its input; name "
            "some in inputs="
        )
    neither = [g for g in cell.gates if g not in (*cell.inputs, *cell.recurrent)]
    if neither:
        raise ValueError(
            f"gate {neither[0]!r} of cell {cell.name!r} has neither input rows nor recurrent rows, "
            "so nothing gives it a value; drop it from gates=, or name it in inputs= or recurrent="
        )


def _check_initialize(
    name: str, initialize: Callable[..., object], arguments: Sequence[str]
) -> None:
    what = f"initialize of cell {name!r} must be a function of ({', '.join(arguments)})"
    if not callable(initialize):
        raise TypeError(f"{what}, got {type(initialize).__name__}")
    signature = inspect.signature(initialize)
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"{what}, any further parameters with defaults; got {signature}: {error}"
        ) from None


def _check_params(cell: Cell) -> None:
    for name, param in cell.params.items():
        valid = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        if not valid or name in _TAKEN:
            raise ValueError(
                f"params of cell {cell.name!r} must be identifiers other than {', '.join(_TAKEN)}, "
                f"the names of a layer's matrices: {name!r}"
            )
        if not isinstance(param, Param) or param.kind not in KINDS:
            what = repr(param.kind if isinstance(param, Param) else param)
            raise ValueError(
                f"parameter {name!r} of cell {cell.name!r} must be 'unit' (a number for each "
                "hidden unit), 'one' (one number), 'gates' (a number for each gate and unit) or a "
                f"fastrnn.Param of these kinds, got {what}"
            )
    count = sum(map(len, cell.param_rows().values()))
    if count > MAX_PARAMS:
        raise ValueError(
            f"cell {cell.name!r} has {count} params, and the kernels are made for at "
            f"most {MAX_PARAMS}; split it into several cells"
        )


def fault_of_states(cell: Cell, states: Sequence[Any], shape: tuple[int, ...]) -> str:
    """Why a function whose gates have this shape may not return these states, or nothing."""
    for name, state in zip(cell.states, states, strict=True):
        if not isinstance(state, Tensor) or state.shape != shape:
            what = _what(state).removeprefix("a tensor ")
            return (
                f"cell {cell.name!r} returned state {name!r} {what}, where its inputs are "
                f"of shape {list(shape)}; a state has a number for each unit, as its inputs have"
            )
    return ""


def fault_of_operand(cell: Cell, x: Any, shape: tuple[int, ...]) -> str:
    """Why a function whose gates have this shape may not call `v(x)`, or nothing."""
    if isinstance(x, Tensor) and x.shape == shape:
        return ""
    return (
        f"cell {cell.name!r} calls v with {_what(x)}, where its inputs are "
        f"tensors of shape {list(shape)}; v takes one number for each unit"
    )


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
