"""Cells made of another cell: with zoneout, recurrent dropout, or clipped gradients."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastrnn.cells.declare import Cell
from fastrnn.cells.noise import bernoulli, dropout

__all__ = ["clip_grad", "clipped", "recurrent_dropout", "unclipped", "zoneout"]

_States = list[Tensor]
_Function = Callable[..., Any]
# Equal cells share the function made of theirs, and so the compiled code. The made cell itself is
# not shared: equal cells may begin with other weights.


def zoneout(cell: Cell, rate: float | Sequence[float]) -> Cell:
    """A cell whose units keep their states of the step before at random (Krueger et al. 2017,
    arXiv:1606.01305).

    In training each unit of a state keeps its old value with a probability, drawn anew at every
    step; in evaluation a state is the mean of old and new value with that weight.

    Args:
        cell: the cell.
        rate: the probability, for all states or one for each.

    Raises:
        ValueError: if a rate is no probability, or if their number is not that of the states.

    Example:
        >>> import torch, fastrnn
        >>> cell = fastrnn.cells.zoneout(fastrnn.cells.lstm, (0.05, 0.5))  # of h and of c
        >>> fastrnn.Recurrent(cell, 4, 8)(torch.randn(5, 3, 4))[0].shape
        torch.Size([5, 3, 8])
    """
    count = len(cell.states)
    single = isinstance(rate, (numbers.Real, Tensor))  # a tensor is refused below
    rates: tuple[Any, ...] = (rate,) * count if single else tuple(cast(Sequence[float], rate))
    if len(rates) != count:
        raise ValueError(
            f"zoneout of cell {cell.name!r} takes one rate, or one for each of the states "
            f"{', '.join(cell.states)}, got {len(rates)}"
        )
    _check("zoneout", rates)
    if not any(rates):
        return cell
    return _zoneout(cell, tuple(map(float, rates)))


def _zoneout(cell: Cell, rates: tuple[float, ...]) -> Cell:
    return _made(cell, "zoneout", _zoneout_function(cell, rates), _zoneout, rates)


@functools.cache
def _zoneout_function(cell: Cell, rates: tuple[float, ...]) -> _Function:
    def function(u: Any, v: Any, *rest: Any) -> _States:
        before = rest[1:] if cell.params else rest
        after = _listed(cell.function(u, v, *rest))
        return [
            new if rate == 0 else _mixed(bernoulli(rate), old, new)
            for rate, old, new in zip(rates, before, after, strict=True)
        ]

    return function


def _mixed(stay: Any, old: Tensor, new: Tensor) -> Tensor:
    return cast(Tensor, stay * old + (1 - stay) * new)


def recurrent_dropout(cell: Cell, p: float, per: str = "sequence") -> Cell:
    """A cell that drops units of what it multiplies by the recurrent weights, in training; see
    `fastrnn.dropout`.

    Args:
        cell: the cell.
        p: the probability that a unit is dropped.
        per: "sequence" to drop the same units at all steps (Gal and Ghahramani 2016,
            arXiv:1512.05287), "step" to draw them anew at every step.

    Raises:
        ValueError: if `p` is no probability, for another `per`, or for a cell without recurrent
            rows, which multiplies nothing.
    """
    _check("recurrent_dropout", (p,))
    if p and not cell.recurrent:
        raise ValueError(
            f"recurrent_dropout drops what the recurrent weights multiply, and cell {cell.name!r} "
            "has none; use zoneout, or dropout between layers"
        )
    if per not in ("step", "sequence"):
        raise ValueError(f"recurrent_dropout draws per='step' or per='sequence', got {per!r}")
    return _recurrent_dropout(cell, float(p), per) if p else cell


def _recurrent_dropout(cell: Cell, p: float, per: str) -> Cell:
    function = _recurrent_dropout_function(cell, p, per)
    return _made(cell, "dropout", function, _recurrent_dropout, p, per)


@functools.cache
def _recurrent_dropout_function(cell: Cell, p: float, per: str) -> _Function:
    def function(u: Any, v: Any, *rest: Any) -> Any:
        h = rest[1] if cell.params else rest[0]
        return cell.function(u, _Dropped(v, h, p, per), *rest)

    return function


class _Dropped:
    """The argument `v` of a cell's function, which multiplies what dropout leaves."""

    # The names of attributes are mangled, so that no gate has them.
    def __init__(self, v: Any, h: Tensor, p: float, per: str) -> None:
        self.__v, self.__h, self.__p, self.__per = v, h, p, per

    def __getattr__(self, gate: str) -> Any:
        if gate.startswith("__") or "_Dropped__h" not in vars(self):
            raise AttributeError(gate)
        if "_Dropped__own" not in vars(self):
            self.__own = self(self.__h)
        return getattr(self.__own, gate)

    def __call__(self, x: Tensor) -> Any:
        return self.__v(dropout(x, self.__p, self.__per))


def clip_grad(cell: Cell, limit: float) -> Cell:
    """A cell whose backward pass clips, at every step, the gradients of the states after the step
    to [-limit, limit] (Graves 2013, arXiv:1308.0850): that of the output and what later steps send
    back, together. So no gradient grows without bound on its way through the steps. If state 0 is
    projected (`proj_size`), that of the projected state is clipped.

    Args:
        cell: the cell.
        limit: the largest absolute value.

    Raises:
        ValueError: if `limit` is not positive.
    """
    if not limit > 0:
        raise ValueError(f"clip_grad takes a positive limit, got {limit!r}")
    return _clip_grad(cell, float(limit))


def _clip_grad(cell: Cell, limit: float) -> Cell:
    return _made(cell, "clip", _clip_grad_function(cell, limit), _clip_grad, limit)


@functools.cache
def _clip_grad_function(cell: Cell, limit: float) -> _Function:
    def function(*arguments: Any) -> _States:
        return [clipped(state, limit) for state in _listed(cell.function(*arguments))]

    return function


def unclipped(cell: Cell) -> tuple[Cell, float | None]:
    """The cell that `clip_grad` made this one of, and its limit; otherwise the cell, and None."""
    limit = None
    while cell.made_by is not None and cell.made_by[0] is _clip_grad:
        inner, own = cell.made_by[1]
        limit = own if limit is None else min(limit, own)
        cell = inner.noisy if cell.noise else inner
    return cell, limit


class _Clip(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.clamp(-ctx.limit, ctx.limit), None


class _ClipWithTangent(_Clip):
    """The same with a forward-mode derivative. torch.compile takes no function that has one."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        return dx.clone()


def clipped(x: Tensor, limit: float) -> Tensor:
    """`x`, whose gradient is clipped to [-limit, limit]."""
    function: Any = _Clip if torch.compiler.is_compiling() else _ClipWithTangent
    return cast(Tensor, function.apply(x, limit))


def _check(name: str, rates: Sequence[Any]) -> None:
    for rate in rates:
        if isinstance(rate, Tensor) or not 0 <= rate <= 1:  # it cannot be learned
            raise ValueError(f"{name} takes a probability from 0 to 1, got {rate!r}")


def _listed(states: Tensor | Sequence[Tensor]) -> _States:
    return [states] if isinstance(states, Tensor) else list(states)


def _made(
    cell: Cell, suffix: str, function: _Function, maker: Callable[..., Cell], *how: Any
) -> Cell:
    return Cell(
        f"{cell.name}_{suffix}",
        cell.gates,
        cell.states,
        function,
        cell.params,
        cell.initialize,
        made_by=(maker, (cell, *how)),
        inputs=cell.inputs,
        recurrent=cell.recurrent,
    )
