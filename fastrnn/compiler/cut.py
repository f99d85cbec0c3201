"""Cuts a cell's step where units need each other: at reductions over the units of a row, and at
products of the recurrent weights with a value of the step.

While the cell's function runs, a mode replaces every reduction by an input of what follows, and
remembers its operand. Norms, means and softmax are written in terms of four reductions, and of the
number of units as a tensor, so that no width becomes a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastrnn.cells import Cell
from fastrnn.cells.checks import fault_of_operand
from fastrnn.compiler.advice import BRANCH, DTYPE, MIXED, NEVER, about

__all__ = [
    "GRADIENT_RESULTS",
    "RESULTS",
    "Backward",
    "Calls",
    "Cut",
    "Site",
    "Underivable",
    "own_dtypes",
]

# How the labels of the results of reductions begin, which are one number for each row: those of a
# step, and those of its backward pass (`through_cuts.py`).
RESULTS = ("sum.", "max.", "mean.", "dev.")
GRADIENT_RESULTS = ("dsum.", "dmax.", "dmean.", "ddev.", "most.", "ties.")


class Underivable(TypeError):
    """No code can be derived from the cell's function, so only the reference can run it."""


def own_dtypes(dtype: torch.dtype) -> frozenset[torch.dtype]:
    """The dtypes in which a kernel computes a cell of this dtype."""
    return frozenset({dtype, torch.float32} if dtype.itemsize == 2 else {dtype})


@dataclass
class Calls:
    """What a cell's function asks of torch.

    Attributes:
        now: the name of the function that it is calling.
        failed: the name of the one that raised an error, and the error.
        written: the names of those that wrote into a tensor.
        dtype: whether it asked for the dtype of a tensor.
        refused: the first reason why no code can be derived.
    """

    now: str = ""
    failed: tuple[str, Exception | None] = ("", None)
    written: list[str] = field(default_factory=list)
    dtype: bool = False
    refused: Underivable | None = None

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch and take note of it."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            attribute = getattr(function, "__self__", None)
            self.dtype |= attribute in _ASK_DTYPE
            name = getattr(attribute, "__name__", "")
        self.now = name
        self.dtype |= name in ("element_size", "result_type", "type")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self.written.append(name)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self.failed = name, error
            raise
        finally:
            self.now = ""


_ASK_DTYPE = (Tensor.dtype, Tensor.itemsize, Tensor.nbytes)


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
    """The products of a value with all recurrent blocks, which notes those that are read."""

    def __init__(self, cut: Cut, values: Sequence[Tensor], operand: Tensor | None) -> None:
        self.cut, self.values, self.operand = cut, values, operand
        self.site: Site | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, gate: Any) -> Any:
        return self.cut.product(self, gate)


class _Watching(TorchFunctionMode):
    """Sees what is called, and keeps the first refusal: torch's operators take a `TypeError` for
    that of an operand."""

    def __init__(self, cell: Cell, calls: Calls) -> None:
        super().__init__()
        self.cell, self.calls = cell, calls

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            return self._call(getattr(function, "__name__", ""), function, args, dict(kwargs or {}))
        except Underivable as refusal:
            self.calls.refused = self.calls.refused or refusal
            raise

    def _call(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class Cut(_Watching):
    """The mode; `results` are the results of all reductions in order, zeros if there are none."""

    def __init__(
        self,
        cell: Cell,
        shape: tuple[int, ...],
        count: Tensor,
        results: Iterator[Tensor] | None = None,
        calls: Calls | None = None,
    ) -> None:
        super().__init__(cell, calls or Calls())
        self.shape, self.count, self.given = shape, count, results
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
        if fault := fault_of_operand(self.cell, operand, self.shape):
            raise Underivable(fault)
        self._check(operand, "calls v with")
        # The value of now: the cell may write into it later.
        return _Products(self, self._values, operand.clone())

    def product(self, asked: _Products, gate: int) -> Tensor:
        name = self.cell.recurrent[gate]
        before = self._operand_of.setdefault(name, asked)
        if before.operand is not asked.operand:
            raise Underivable(
                f"cell {self.cell.name!r} multiplies the recurrent block of gate {name!r} with two "
                "values; declare a gate for each, or call v once and use its result twice"
            )
        if asked.operand is not None and before is asked:
            self._add_gate(asked, asked.operand, name)
        return self._values[gate]

    def _add_gate(self, asked: _Products, operand: Tensor, name: str) -> None:
        if asked.site is None:
            asked.site = self._note(operand, "product", (name,))
        elif name not in asked.site.gates:
            old = asked.site
            asked.site = Site("product", old.number, 1, (*old.gates, name))
            self.sites[old.number] = asked.site

    def _check(self, operand: Tensor, what: str) -> None:
        if not operand.is_floating_point():
            raise Underivable(
                f"cell {self.cell.name!r} {what} a mask, which has no numbers; write "
                "mask.to(h.dtype)"
            )
        if not torch.is_grad_enabled():
            raise Underivable(
                f"cell {self.cell.name!r} {what} a value under no_grad, which hides its gradient; "
                "write detach()"
            )

    def _note(self, operand: Tensor, kind: str, gates: tuple[str, ...] = ()) -> Site:
        width = self.shape[-1]
        if operand.shape[:-1] != self.shape[:-1] or operand.shape[-1] % width:
            raise Underivable(
                f"cell {self.cell.name!r} reduces a tensor of shape {list(operand.shape)}, where "
                f"its inputs are of shape {list(self.shape)}; reductions are over all units of a "
                "gate, or of gates side by side"
            )
        self._check(operand, "reduces")
        site = Site(kind, len(self.sites), operand.shape[-1] // width, gates)
        self.sites.append(site)
        self.operands.append(operand.clone())
        return site

    # Reductions.

    def _reduced(self, x: Tensor, kind: str) -> list[Tensor]:
        site = self._note(x, kind)
        size = (*self.shape[:-1], 1)
        if self.given is None:
            return [torch.zeros(size, dtype=x.dtype, device=x.device) for _ in site.results]
        return [next(self.given) for _ in site.results]

    def _total(self, x: Tensor) -> Tensor:
        if self._is_row(x):
            return torch.ones_like(self.count)
        parts = x.shape[-1] // self.shape[-1]
        return self.count * parts if parts > 1 else self.count

    def _is_row(self, x: Tensor) -> bool:
        """Whether a tensor has one number for each row, in a dimension of its own."""
        return x.dim() == len(self.shape) and x.shape[-1] == 1

    def sum(self, x: Tensor) -> Tensor:
        return x if self._is_row(x) else self._reduced(x, "sum")[0]

    def amax(self, x: Tensor) -> Tensor:
        return x if self._is_row(x) else self._reduced(x, "amax")[0]

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self._total(x)

    def moments(self, x: Tensor, correction: float) -> tuple[Tensor, Tensor]:
        if self._is_row(x):
            mean, deviation = x, torch.zeros_like(x)
        else:
            mean, deviation = self._reduced(x, "moments")
        total = self._total(x)
        return mean, deviation / (total - correction if correction else total)

    def _call(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in (*_NORMS, *_REDUCTIONS) and not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if name in _NORMS and args:
            norm: Any = _NORMS[name]
            return norm(self, *args, **kwargs)
        _check_is_recorded(self.cell, function)
        self._check_is_derivable(name)
        if name not in _REDUCTIONS or not args or not isinstance(args[0], Tensor):
            result = self.calls.call(function, args, kwargs)
            _check_dtype(self.cell, self.count.dtype, name, (args, kwargs), result)
            self._check_mixes_no_units(name, args, result)
            return result
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        fixed = [d for d in (*args, kwargs.pop("dtype", None)) if isinstance(d, torch.dtype)]
        if any(dtype != args[0].dtype for dtype in fixed):
            raise Underivable(
                f"cell {self.cell.name!r} calls {name} with dtype={fixed[0]}; {DTYPE}"
            )
        args = tuple(a for a in args if not isinstance(a, torch.dtype))
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(dims, (tuple, list)) and len(dims) == 1:
            dims = dims[0]
        if why := self._irreducible(args[0], dims):
            self._refuse(f"cell {self.cell.name!r} calls {name} {why}")
            return self.calls.call(function, args, kwargs)
        return _REDUCTIONS[name](self, *args, **kwargs)

    def _irreducible(self, x: Tensor, dims: Any) -> str:
        """Why a value cannot be reduced over these dimensions."""
        own = len(self.shape)
        what = f"of a tensor of {x.dim()} dimensions, where its inputs have {own}; "
        if x.dim() < own:
            return what + "a reduction whose result is reduced again needs keepdim=True"
        if x.dim() > own:
            return what + (
                "each value of a cell has a number for each unit, [..., H], so it makes no outer "
                "products and no matrices; their sums are those of products: "
                "(x * y).sum(-1, keepdim=True)"
            )
        if dims == -1:
            return ""
        where = "all dimensions" if dims is None else f"dimension {dims}"
        return (
            f"over {where}; a cell may reduce over the last dimension, which is that of the units: "
            "dim=-1, keepdim=True"
        )

    def _refuse(self, why: str) -> None:
        """Refuse what the step does once it is through: a function that branches on the value is
        told that instead."""
        self.calls.refused = self.calls.refused or Underivable(why)

    def check(self) -> None:
        """Raise why the step cannot be derived, if it did such a thing."""
        if self.calls.refused:
            raise self.calls.refused

    def _check_is_derivable(self, name: str) -> None:
        caller = sys._getframe(3).f_globals.get("__name__", "")
        if caller.startswith("torch._higher_order_ops"):
            name = f"torch.{caller.rpartition('.')[2]}"
        elif name in NEVER:
            raise Underivable(f"cell {self.cell.name!r} calls {name}, which {about(name)}")
        elif self.calls.refused is None or name not in _VALUES:
            return
        self.calls.refused = None
        raise Underivable(f"no code can be derived for cell {self.cell.name!r}: {BRANCH} ({name})")

    def _check_mixes_no_units(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Refuse what makes fewer numbers of the units of a row than there are."""
        outer = self.shape[:-1]

        def is_whole(x: Any) -> bool:
            return isinstance(x, Tensor) and x.shape[:-1] == outer and x.shape[-1:] > (1,)

        results = result if isinstance(result, (tuple, list)) else [result]
        rows = ((*outer, 1), outer)
        made = any(isinstance(x, Tensor) and tuple(x.shape) in rows for x in results)
        if made and any(map(is_whole, args)) and name not in _NEW:
            what = about(name) or f"makes one number of the units of a row; {MIXED}"
            self._refuse(f"cell {self.cell.name!r} calls {name}, which {what}")


class Backward(_Watching):
    """Refuses what a derivative may not do that is written in Python: torch's own, which are not,
    go unseen. A sum would be taken for that of a number which was spread over the units."""

    def __init__(self, cell: Cell, dtype: torch.dtype, calls: Calls) -> None:
        super().__init__(cell, calls)
        self.dtype = dtype

    def _call(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in (*_NORMS, *_REDUCTIONS):
            raise Underivable(
                f"cell {self.cell.name!r} calls {name} in a derivative of its own, which has to be "
                "a pointwise formula"
            )
        _check_is_recorded(self.cell, function)
        result = self.calls.call(function, args, kwargs)
        _check_dtype(self.cell, self.dtype, name, (args, kwargs), result)
        return result


def _check_dtype(cell: Cell, dtype: torch.dtype, name: str, given: Any, result: Any) -> None:
    """Refuse what takes the values of a cell of this dtype to another one."""
    own = own_dtypes(dtype)

    def dtypes(values: Any) -> set[torch.dtype]:
        found = (x.dtype for x in tree_leaves(values) if isinstance(x, Tensor))
        return {d for d in found if d.is_floating_point}

    foreign = dtypes(result) - own
    if foreign and not own.isdisjoint(dtypes(given)):
        raise Underivable(
            f"cell {cell.name!r} calls {name}, which gives {foreign.pop()} whatever the dtype of "
            f"its layer; {DTYPE}"
        )


def _check_is_recorded(cell: Cell, function: Any) -> None:
    """Refuse what no operation of torch shows."""
    name = getattr(function, "__name__", "")
    if name in _READS:
        raise Underivable(
            f"no code can be derived for cell {cell.name!r}: it reads the value of a tensor "
            f"({name}); write its formula in functions of torch"
        )
    if name == "__set__" and getattr(function, "__self__", None) is Tensor.data:
        raise Underivable(
            f"no code can be derived for cell {cell.name!r}: it sets the data of a tensor; give "
            "the result a name of its own"
        )


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
    variance = _var(cut, x, *args, **named)
    none = variance == 0  # there torch's gradient is zero
    return torch.where(none, 0, torch.where(none, 1, variance).sqrt())


def _softmax(cut: Cut, x: Tensor, dim: Any = None, *_: Any, **__: Any) -> Tensor:
    exp = (x - cut.amax(x.detach())).exp()
    return exp / cut.sum(exp)


def _log_softmax(cut: Cut, x: Tensor, dim: Any = None, *_: Any, **__: Any) -> Tensor:
    below = x - cut.amax(x.detach())
    return below - cut.sum(below.exp()).log()


def _logsumexp(cut: Cut, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    largest = cut.amax(x.detach())
    largest = torch.where(largest.abs() == torch.inf, 0, largest)
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
_NEW = {"new_zeros", "new_ones", "new_full", "new_tensor"}
# Functions that give the value of a tensor to Python.
_VALUES = {"__bool__", "__float__", "__index__", "__int__", "equal", "item"}
# Functions that read the memory of a tensor, which no operation of torch shows.
_READS = {"__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage"}
