"""Cuts a cell's step where units need each other: at reductions over the units of a row, and at
products of the recurrent weights with a value of the step.

While the cell's function runs, a mode replaces every reduction by an input of what follows, and
remembers its operand. Norms, means and softmax are written in terms of four reductions, and of the
number of units as a tensor, so that no width becomes a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrnn.cells import Cell

__all__ = ["Cut", "Site", "Underivable"]


class Underivable(TypeError):
    """No code can be derived from the cell's function, so only the reference can run it."""


@dataclass(frozen=True)
class Site:
    """A place where a step is cut.

    Attributes:
        kind: "product" (blocks of the recurrent weights times the operand), "sum", "amax", or
            "moments" (mean, and sum of squared deviations from it).
        number: its place among the sites of the step.
        parts: how many values of all units, side by side, its operand has.
        gates: of a product, the gates whose blocks it multiplies.
    """

    kind: str
    number: int
    parts: int = 1
    gates: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[str, ...]:
        """Labels of the results of a reduction; those of a product are `v.i` for its gates."""
        names = {"product": (), "sum": ("sum",), "amax": ("max",), "moments": ("mean", "dev")}
        return tuple(f"{name}.{self.number}" for name in names[self.kind])


class _Products(Sequence[Tensor]):
    """The products of a value with the blocks of all gates, which notes those that are read."""

    def __init__(self, cut: Cut, values: Sequence[Tensor], operand: Tensor | None) -> None:
        self.cut, self.values, self.operand = cut, values, operand
        self.site: int | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, gate: Any) -> Any:
        return self.cut.product(self, gate)


class Cut(TorchFunctionMode):
    """The mode; `results` are the results of all reductions in order, zeros if there are none."""

    def __init__(
        self,
        cell: Cell,
        shape: tuple[int, ...],
        count: Tensor,
        results: Iterator[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.cell, self.shape, self.count, self.given = cell, shape, count, results
        self.sites: list[Site] = []
        self.operands: list[Tensor] = []
        self._values: Sequence[Tensor] = ()
        self._state: Tensor | None = None
        self._operand_of: dict[str, _Products] = {}

    # Products.

    def products(self, values: Sequence[Tensor], state: Tensor) -> Sequence[Tensor]:
        """The recurrent projections, of which `values` are the results."""
        self._values, self._state = values, state
        return _Products(self, values, None)

    def apply(self, operand: Tensor) -> Sequence[Tensor]:
        """The recurrent projections of another value than the state: `v(operand)`."""
        if operand is self._state:
            return _Products(self, self._values, None)
        return _Products(self, self._values, operand)

    def product(self, asked: _Products, gate: int) -> Tensor:
        name = self.cell.gates[gate]
        before = self._operand_of.setdefault(name, asked)
        if before.operand is not asked.operand:
            raise Underivable(
                f"cell {self.cell.name!r} multiplies the recurrent block of gate {name!r} with two "
                "values; declare a gate for each"
            )
        if asked.operand is not None and before is asked:
            self._add_gate(asked, name)
        return self._values[gate]

    def _add_gate(self, asked: _Products, name: str) -> None:
        assert asked.operand is not None
        same = [k for k, x in enumerate(self.operands) if x is asked.operand]
        same = [k for k in same if self.sites[k].kind == "product"]
        if not same:
            operand = asked.operand
            if operand.shape != self.shape:
                raise Underivable(
                    f"cell {self.cell.name!r} calls v with a tensor of shape "
                    f"{list(operand.shape)}, where its inputs are of shape {list(self.shape)}; v "
                    "takes one number for each unit"
                )
            self._note(operand, "product", (name,))
        elif name not in self.sites[same[0]].gates:
            old = self.sites[same[0]]
            self.sites[same[0]] = Site("product", old.number, 1, (*old.gates, name))

    def _note(self, operand: Tensor, kind: str, gates: tuple[str, ...] = ()) -> Site:
        width = self.shape[-1]
        if operand.shape[-1] == 1 != width:
            operand = operand.expand(self.shape)
        if operand.shape[:-1] != self.shape[:-1] or operand.shape[-1] % width:
            raise Underivable(
                f"cell {self.cell.name!r} reduces a tensor of shape {list(operand.shape)}, where "
                f"its inputs are of shape {list(self.shape)}; reductions are over all units of a "
                "gate, or of gates side by side"
            )
        site = Site(kind, len(self.sites), operand.shape[-1] // width, gates)
        self.sites.append(site)
        self.operands.append(operand)
        return site

    # Reductions.

    def _reduced(self, x: Tensor, kind: str) -> list[Tensor]:
        site = self._note(x, kind)
        size = (*self.shape[:-1], 1)
        if self.given is None:
            return [torch.zeros(size, dtype=x.dtype, device=x.device) for _ in site.results]
        return [next(self.given) for _ in site.results]

    def _total(self, x: Tensor) -> Tensor:
        parts = x.shape[-1] // self.shape[-1]
        return self.count * parts if parts > 1 else self.count

    def sum(self, x: Tensor) -> Tensor:
        (total,) = self._reduced(x, "sum")
        return total

    def amax(self, x: Tensor) -> Tensor:
        (largest,) = self._reduced(x, "amax")
        return largest

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self._total(x)

    def moments(self, x: Tensor, correction: float) -> tuple[Tensor, Tensor]:
        mean, deviation = self._reduced(x, "moments")
        total = self._total(x)
        return mean, deviation / (total - correction if correction else total)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _NORMS and args:
            norm: Any = _NORMS[name]
            return norm(self, *args, **kwargs)
        if name not in _REDUCTIONS or not args or not isinstance(args[0], Tensor):
            return function(*args, **kwargs)
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(dims, (tuple, list)) and len(dims) == 1:
            dims = dims[0]
        if dims != -1:
            where = "all dimensions" if dims is None else f"dimension {dims}"
            raise Underivable(
                f"cell {self.cell.name!r} calls {name} over {where}; a cell may reduce over the "
                "last dimension, which is that of the units: dim=-1"
            )
        return _REDUCTIONS[name](self, *args, **kwargs)


def _shaped(row: Tensor, keepdim: bool) -> Tensor:
    return row if keepdim else row.squeeze(-1)


def _sum(cut: Cut, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _shaped(cut.sum(x), keepdim)


def _amax(cut: Cut, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _shaped(cut.amax(x), keepdim)


def _amin(cut: Cut, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _shaped(-cut.amax(-x), keepdim)


def _mean(cut: Cut, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _shaped(cut.mean(x), keepdim)


def _var(cut: Cut, x: Tensor, *args: Any, keepdim: bool = False, **named: Any) -> Tensor:
    # var(x, dim, unbiased, keepdim) and var(x, dim, *, correction, keepdim)
    unbiased = args[1] if len(args) > 1 else named.get("unbiased", True)
    keepdim = args[2] if len(args) > 2 else keepdim
    correction = named.get("correction")
    correction = float(unbiased) if correction is None else float(correction)
    return _shaped(cut.moments(x, correction)[1], keepdim)


def _std(cut: Cut, x: Tensor, *args: Any, **named: Any) -> Tensor:
    return _var(cut, x, *args, **named).sqrt()


def _softmax(cut: Cut, x: Tensor, dim: Any = None, *_: Any, **__: Any) -> Tensor:
    exp = (x - cut.amax(x.detach())).exp()
    return exp / cut.sum(exp)


def _log_softmax(cut: Cut, x: Tensor, dim: Any = None, *_: Any, **__: Any) -> Tensor:
    below = x - cut.amax(x.detach())
    return below - cut.sum(below.exp()).log()


def _logsumexp(cut: Cut, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    largest = cut.amax(x.detach())
    return _shaped(cut.sum((x - largest).exp()).log() + largest, keepdim)


def _layer_norm(
    cut: Cut,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> Tensor:
    _check_normalized(cut, "layer_norm", x, normalized_shape)
    mean, variance = cut.moments(x, 0)
    y = (x - mean) * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(
    cut: Cut,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    _check_normalized(cut, "rms_norm", x, normalized_shape)
    if eps is None:
        raise Underivable(
            f"cell {cut.cell.name!r} calls rms_norm without eps, for which torch then takes "
            "another number for each dtype; give eps a number"
        )
    y = x * (cut.mean(x * x) + eps).rsqrt()
    return y if weight is None else y * weight


def _check_normalized(cut: Cut, name: str, x: Tensor, shape: Sequence[int]) -> None:
    if list(shape) != [x.shape[-1]]:
        raise Underivable(
            f"cell {cut.cell.name!r} calls {name} with normalized_shape {list(shape)}; a cell may "
            "reduce over the last dimension, which is that of the units: x.shape[-1:]"
        )


_REDUCTIONS = {
    "sum": _sum,
    "mean": _mean,
    "amax": _amax,
    "amin": _amin,
    "var": _var,
    "std": _std,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
}
_NORMS = {"layer_norm": _layer_norm, "rms_norm": _rms_norm}
