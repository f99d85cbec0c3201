"""Reads a cell's function and its vector-Jacobian product into expressions.

Expressions are pointwise. Where units need each other, at a product or a reduction, the step is cut
(`cut.py`): the result is an input of what follows, and the operand is one more output.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import _engine_run_backward

from fastrnn.cells import Cell
from fastrnn.cells.arguments import as_written
from fastrnn.cells.checks import fault_of_states
from fastrnn.compiler.advice import (
    BRANCH,
    CALLED,
    DTYPE,
    IN_PLACE,
    MIXED,
    about,
    torchs_function,
)
from fastrnn.compiler.cut import Backward, Calls, Cut, Site, Underivable, own_dtypes
from fastrnn.compiler.expression import MASKS, Algebra, Expr, uses
from fastrnn.compiler.record import ValueRead, record
from fastrnn.compiler.rules import ALIASES, FUNCTIONS, SIDE_BY_SIDE, TENSORS, parts_of

__all__ = ["Trace", "Underivable", "trace"]


@dataclass(frozen=True)
class Trace:
    """A cell's step and its derivative.

    The inputs have the labels `u.i`, `v.i` for a gate i, `s.h`, `dnext.h` for a state h, `p.a` for
    a parameter a (`p.a.i` if it has a number for each gate), `z.k` for the numbers of draw k,
    `count` for the number of units, the labels of `Site.results`, and `doperand.k.j` for the
    gradient of part j of the operand of site k. Gradients of parameters are those of one row and
    unit; those of the results of a reduction are to be summed over the units.

    Attributes:
        states: the next states.
        sites: where the step is cut, in the order in which it runs.
        operands: of each site, its parts.
        gradients: of `u`, `v`, the states and the parameters.
        results: gradients of the results of the reductions, by label.
    """

    states: tuple[Expr, ...]
    sites: tuple[Site, ...]
    operands: tuple[tuple[Expr, ...], ...]
    gradients: tuple[Expr, ...]
    results: tuple[tuple[str, Expr], ...]

    def roots(self) -> tuple[Expr, ...]:
        """All expressions."""
        operands = [part for parts in self.operands for part in parts]
        return (*self.states, *operands, *self.gradients, *(expr for _, expr in self.results))

    def with_roots(self, roots: Iterable[Expr]) -> Trace:
        """The same with other expressions, in the order of `roots()`."""
        given = iter(roots)
        return Trace(
            tuple(islice(given, len(self.states))),
            self.sites,
            operands=tuple(tuple(islice(given, s.parts)) for s in self.sites),
            gradients=tuple(islice(given, len(self.gradients))),
            results=tuple((label, next(given)) for label, _ in self.results),
        )


def trace(algebra: Algebra, cell: Cell) -> Trace:
    """Expressions of a cell's step and its derivative.

    Raises:
        Underivable: if the function is not a formula of its arguments in terms of pointwise
            functions, reductions over the units and products.
        ValueError: if the cell declares rows of a gate that the function does not read.
    """
    calls = Calls()
    traced = _read(algebra, cell, (3,), torch.float64, calls)
    _check_rows(cell, traced)
    # Another side of most bounds of a width, and of a dtype.
    if not _alike(traced, _read(algebra, cell, _WIDE, torch.float32, calls)):
        if _alike(traced, _read(algebra, cell, _WIDE, torch.float64, calls)):
            raise _other_formula(cell, torch.float32)
        raise Underivable(
            f"cell {cell.name!r} depends on the shape of its tensors, or is another formula each "
            "time it is called; a cell must be the same formula for every unit. Write "
            "x.mean(-1, keepdim=True) for x.sum(-1, keepdim=True) / x.shape[-1], and "
            "torch.ones_like(x).sum(-1, keepdim=True) for any other use of the width"
        )
    if calls.dtype:
        for dtype in (torch.float16, torch.bfloat16):
            if not _alike(traced, _read(algebra, cell, (3,), dtype, calls)):
                raise _other_formula(cell, dtype)
    return traced


_WIDE = (2, 1031)


def _other_formula(cell: Cell, dtype: torch.dtype) -> Underivable:
    return Underivable(
        f"cell {cell.name!r} is another formula in {dtype} than in torch.float64, perhaps by "
        f"h.dtype or torch.finfo; write numbers and one formula for every dtype: {DTYPE}"
    )


def _alike(one: Trace, other: Trace) -> bool:
    """Whether two traces are the same, but for constants that were rounded to float32."""
    same: dict[tuple[Expr, Expr], bool] = {}

    def alike(a: Expr, b: Expr) -> bool:
        if a is b:
            return True
        if (a, b) not in same:
            x, y = a.constant, b.constant
            if x is not None and y is not None:
                same[a, b] = math.isclose(x, y, rel_tol=2**-23)
            else:
                equal = (a.op, a.label, len(a.args)) == (b.op, b.label, len(b.args))
                same[a, b] = equal and all(map(alike, a.args, b.args))
        return same[a, b]

    return (one.sites, len(one.roots())) == (other.sites, len(other.roots())) and all(
        map(alike, one.roots(), other.roots())
    )


def _check_rows(cell: Cell, traced: Trace) -> None:
    """Refuse rows that nothing reads. A cell that says nothing about rows has torch's layout."""
    if cell.has_all_rows:
        return
    read = uses(traced.roots())
    for side, keyword, matrix in (("u", "inputs", "weight_ih"), ("v", "recurrent", "weight_hh")):
        names = getattr(cell, keyword)
        unread = [name for name in names if f"{side}.{name}" not in read]
        if unread:
            rest = as_written([name for name in names if name not in unread])
            raise ValueError(
                f"cell {cell.name!r} declares {keyword}={as_written(names)}, but its result does "
                f"not depend on {side}.{unread[0]}, so those rows of {matrix} would be learned and "
                f"multiplied for nothing; write {keyword}={rest}, or read {side}.{unread[0]}"
            )


def _read(
    algebra: Algebra, cell: Cell, shape: tuple[int, ...], dtype: torch.dtype, calls: Calls
) -> Trace:
    gates, states = len(cell.gates), len(cell.states)
    of_u, of_uv = len(cell.inputs), len(cell.inputs) + len(cell.recurrent)
    *outer, width = shape

    def full(*size: int) -> Tensor:
        # A value that differs between the shapes, so that a formula with it would, too.
        return torch.full(size, 1 / width, dtype=dtype, device="cpu")

    # Parameters have a number for each row, too: so their gradients are pointwise.
    sizes = {"unit": width, "one": 1, "gates": gates * width}
    inputs = [full(*shape) for _ in range(of_uv + states)]
    inputs += [full(*outer, sizes[param.kind]) for param in cell.params.values()]
    own = len(inputs)
    ends = (of_u, of_uv, of_uv + states)
    count = torch.tensor(width, dtype=dtype, device="cpu")
    numbers = [full(*shape) for _ in cell.draws] if cell.noise else []
    last = -1 - len(numbers)

    def step(cut: Cut, flat: tuple[Tensor, ...], z: Sequence[Tensor]) -> tuple[Tensor, ...]:
        u, v, s, p = (flat[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True))
        with cut:
            after = tuple(cell.step(u, cut.products(v, s[0]), s, p, cut.apply, z))
            cut.check()
        # With parameters, a state may follow from one number for all units alone.
        row = (*outer, 1) if cell.params else None
        return tuple(a.expand(shape) if getattr(a, "shape", shape) == row else a for a in after)

    try:
        probe = Cut(cell, shape, count, calls=calls)
        after = step(probe, tuple(x.clone() for x in inputs), numbers)
        _check_states(cell, after, shape, dtype)
        sites = tuple(probe.sites)
        results = [label for site in sites for label in site.results]
        inputs += [full(*outer, 1) for _ in results]
        active = len(inputs)
        for x in inputs:
            x.requires_grad_()
        inputs += [full(*shape) for _ in cell.states]
        inputs += [full(*outer, site.parts * width) for site in sites]

        def sweep(*flat: Tensor) -> tuple[Tensor, ...]:
            cut = Cut(cell, shape, flat[-1], iter(flat[own:active]), calls)
            after = step(cut, flat[:own], flat[last:-1])
            if tuple(cut.sites) != sites:
                raise Underivable(f"cell {cell.name!r} is another formula each time")
            results = (*after, *cut.operands)
            with Backward(cell, dtype, calls):
                return *results, *_gradients(results, flat[:active], flat[active:last])

        traced = record(sweep, [*inputs, *numbers, count], lambda: calls.now)
    except Underivable:
        raise
    except Exception as error:
        if not (why := _why(error, calls)):
            raise
        if calls.refused and why != BRANCH:
            raise calls.refused from error
        raise Underivable(f"no code can be derived for cell {cell.name!r}: {why}") from error
    labels: list[tuple[str, ...]] = []
    labels += [(f"u.{name}",) for name in cell.inputs]
    labels += [(f"v.{name}",) for name in cell.recurrent]
    labels += [(f"s.{name}",) for name in cell.states]
    labels += [tuple(f"p.{row}" for row in rows) for rows in cell.param_rows().values()]
    labels += [(label,) for label in results]
    labels += [(f"dnext.{name}",) for name in cell.states]
    labels += [
        tuple(f"doperand.{k}.{part}" for part in range(site.parts)) for k, site in enumerate(sites)
    ]
    labels += [(f"z.{k}",) for k in range(len(numbers))]
    read = _Reader(algebra, cell, shape, dtype).read(traced, [*labels, ("count",)])
    first = states + len(sites)
    gradients = read[first:]
    return Trace(
        tuple(value for (value,) in read[:states]),
        sites,
        tuple(read[states:first]),
        tuple(value for parts in gradients[:own] for value in parts),
        tuple(zip(results, (value for (value,) in gradients[own:]), strict=True)),
    )


def _why(error: Exception, calls: Calls) -> str:
    """Why no code follows from a function at which torch raised an error; nothing if it is an error
    of the function itself."""
    called, failed = calls.failed
    name = called if failed is error else torchs_function(error.__traceback__)
    what = str(error).split("\n")[0]
    if isinstance(error, ValueRead) or re.search(r"Boolean value of Tensor|to Scalar", what):
        return BRANCH
    if "'Tensor' object is not callable" in what:
        return CALLED
    if re.search("in-?place", what) and calls.written:
        if "__setitem__" in calls.written:
            return f"it calls __setitem__, which {about('__setitem__')}"
        if "leaf" in what or "view" in what:
            return f"it writes into one of its arguments ({calls.written[-1]}); {IN_PLACE}"
        return f"it writes into a value that its gradient needs ({calls.written[-1]}); {IN_PLACE}"
    if re.search(r"dtype|scalar type|[Tt]ype promot", what):
        what = f"it meets tensors of several dtypes; {DTYPE}"
        return f"{what} (torch: {name})" if name else what
    if not name and not calls.refused and not isinstance(error, RuntimeError):
        return ""
    asked = f"it calls {name}, which " if name else ""
    return asked + (about(name) or f"{'fails: ' if name else ''}{what.rstrip('.')}. {_FAILED}")


_FAILED = (
    "While it is derived, a cell's function is called with values [H] and [B, H] for some numbers "
    "H of units, and it has to be the same formula for each"
)
_WRITES = ("copy", "fill", "full", "full_like", "new_full", "scalar_tensor")


def _as_numbers(name: str, like: Any, value: Expr) -> bool:
    """Whether a result is what its formula gives in real numbers, although it may be integers: a
    mask times an integer is."""
    dtype = getattr(like, "dtype", None)
    if dtype is None or dtype.is_floating_point or dtype == torch.bool:
        return True
    whole = value.constant is not None and value.constant.is_integer()
    return (
        dtype == torch.int64 and not name.startswith("bitwise") and (whole or name not in _WRITES)
    )


def _gradients(
    results: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Gradients of the inputs from those of the results, some of which may follow from no input."""
    ends = [k for k, result in enumerate(results) if result.requires_grad]
    if not ends:
        return [torch.zeros_like(x) for x in inputs]
    # As in torch.autograd.grad, which is a function of torch itself: a mode that has seen it sees
    # nothing within it. The graph of the gradients makes them formulas of basic operations.
    found = _engine_run_backward(
        tuple(results[k] for k in ends),
        tuple(given[k] for k in ends),
        True,  # retain_graph
        True,  # create_graph
        tuple(inputs),
        True,  # allow_unused
        accumulate_grad=False,
    )
    return [torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, found, strict=True)]


def _check_states(
    cell: Cell, states: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if fault := fault_of_states(cell, states, shape):
        raise Underivable(fault)
    for name, state in zip(cell.states, states, strict=True):
        if state.dtype not in own_dtypes(dtype):
            raise Underivable(
                f"cell {cell.name!r} returned state {name!r} in {state.dtype}, whatever the dtype "
                f"of its layer; {DTYPE}"
            )


class _Reader:
    """Turns a traced graph into expressions."""

    def __init__(
        self, algebra: Algebra, cell: Cell, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.algebra = algebra
        self.own = own_dtypes(dtype)
        self.cell = cell
        self.shape = shape
        # Aliases share a one-element list, so that in-place operations reach all of them.
        # Values that lie side by side in one tensor, as gates do after `cat`, are parts of it.
        self.values: dict[fx.Node, list[Expr]] = {}
        self.pieces: dict[fx.Node, list[list[Expr]]] = {}  # results of `split`
        self.fixed: set[int] = set()  # arguments, and parts of other values
        self.part = 0  # which part a rule computes

    def read(self, traced: fx.Graph, labels: Iterable[tuple[str, ...]]) -> list[tuple[Expr, ...]]:
        names = iter(labels)
        for node in traced.nodes:
            if node.op == "placeholder":
                self.values[node] = [self.algebra.input(label) for label in next(names)]
                self.fixed.add(id(self.values[node]))
            elif node.op == "get_attr":
                self.values[node] = [self._captured(node.meta["val"], node)]
            elif node.op == "call_function":
                self._call(node)
            else:
                return [tuple(map(self.number, self.values[a])) for a in node.args[0]]
        raise AssertionError("a traced graph ends with its output")

    def pick(self, node: fx.Node) -> Expr:
        """The value of a node in the part that a rule computes."""
        parts = self.values[node]
        return parts[self.part if len(parts) > 1 else 0]

    def real(self, arg: Any) -> Expr:
        """An argument as a number: a mask becomes 1 and 0, as torch promotes it."""
        return self.number(self.pick(arg) if isinstance(arg, fx.Node) else self.algebra.const(arg))

    def number(self, value: Expr) -> Expr:
        if value.op in MASKS:
            return self.algebra.make("where", value, self.algebra.const(1), self.algebra.const(0))
        return value

    def mask(self, arg: Any) -> Expr:
        value = self.pick(arg) if isinstance(arg, fx.Node) else self.algebra.const(arg)
        return value if value.op in MASKS else self.algebra.make("ne", value, self.algebra.const(0))

    def _captured(self, tensor: Tensor, node: fx.Node) -> Expr:
        created_inside = all("lift_fresh" in str(user.target) for user in node.users)
        if tensor.dim() or not created_inside:
            raise Underivable(
                f"cell {self.cell.name!r} uses a tensor that is not one of its arguments; a cell "
                "may use Python numbers, and what is learned or differs between units must come "
                "through u, v, a state or cell(params=...)"
            )
        return self.algebra.const(tensor.item())

    def _parts(self, shape: tuple[int, ...] | None) -> int:
        """The number of parts of a value of that shape; 1 also for a number for each row or one in
        all, and 0 for any other shape."""
        *outer, width = self.shape
        if shape is None or not shape or list(shape) == outer:
            return shape is not None
        if list(shape[:-1]) != outer:
            return 0
        return 1 if shape[-1] == 1 else 0 if shape[-1] % width else shape[-1] // width

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        args: tuple[Any, ...] = node.args
        name = str(target.overloadpacket.__name__ if hasattr(target, "overloadpacket") else target)
        if target is operator.getitem and args[0] in self.pieces:
            self.values[node] = self.pieces[args[0]][args[1]]
            return
        if name in ("split", "split_with_sizes"):
            self._split(node)
            return
        in_place = name.endswith("_") and not name.endswith("__")
        name = name[:-1] if in_place else name
        rule = FUNCTIONS.get(name) or TENSORS.get(name)
        side = SIDE_BY_SIDE.get(name)
        like: Any = node.meta.get("val")
        shape = getattr(like, "shape", None)
        parts = self._parts(shape)
        if not parts or not (rule or side or name in ALIASES):
            raise self._refusal(node, shape)
        if side:
            beside = side(self, node)
            if beside is None or len(beside) != parts:
                raise self._refusal(node, shape)
            self.values[node] = beside
            # They may share memory with what they were made of.
            self.fixed.update(id(self.values[n]) for n in (node, *node.all_input_nodes))
            return
        if not rule and str(target) != "aten.view.dtype":
            self.values[node] = self.values[args[0]]
            return
        if not rule:
            raise self._refusal(node, shape)
        values = []
        for self.part in range(parts):
            value = rule(self, *args, **node.kwargs)
            if isinstance(value, str):
                raise Underivable(f"cell {self.cell.name!r} calls {_named(node)}: {value}")
            if like is not None and like.dtype == torch.bool and value.op not in MASKS:
                value = self.algebra.make("ne", value, self.algebra.const(0))
            if not _as_numbers(name, like, value):
                raise Underivable(
                    f"cell {self.cell.name!r} calls {_named(node)} with {like.dtype}, whose "
                    f"numbers are rounded, wrap around or are bits; {DTYPE}"
                )
            values.append(self._fitting(node, name, value))
        place = self.values[args[0]] if in_place else values
        if id(place) in self.fixed:
            raise Underivable(
                f"cell {self.cell.name!r} writes into one of its arguments, or into a part of a "
                f"tensor: {_named(node)}; {about(node.meta['called']) or IN_PLACE}"
            )
        place[:] = values
        self.values[node] = place

    def _fitting(self, node: fx.Node, name: str, value: Expr) -> Expr:
        """A value as it is in the dtype of its node, which is another than the cell's if that is
        fixed: then it has to be the same number in any dtype."""
        dtype = getattr(node.meta.get("val"), "dtype", None)
        if dtype is None or not dtype.is_floating_point or dtype in self.own:
            return value
        if value.constant is not None:
            number = torch.tensor(value.constant, dtype=dtype, device="cpu")
            return self.algebra.const(number.item())
        chosen = name in ("where", "clone", "copy", "_to_copy") and not any(
            getattr(a.meta.get("val"), "dtype", None) in self.own for a in node.all_input_nodes
        )
        if not chosen and _largest_integer(value) > 256:  # bfloat16 has no 257
            raise Underivable(
                f"cell {self.cell.name!r} calls {_named(node)} in {dtype}, whatever the dtype of "
                f"its layer; {DTYPE}"
            )
        return value

    def _split(self, node: fx.Node) -> None:
        pieces = [piece.shape for piece in node.meta["val"]]
        source = node.args[0]
        assert isinstance(source, fx.Node)
        width = self.shape[-1]
        if len(pieces[0]) != len(self.shape) or any(size[-1] % width for size in pieces):
            raise self._refusal(node, pieces[0])
        parts = iter(parts_of(self, source))
        self.pieces[node] = [[next(parts) for _ in range(size[-1] // width)] for size in pieces]
        self.fixed.update(map(id, (*self.pieces[node], self.values[source])))

    def _refusal(self, node: fx.Node, shape: tuple[int, ...] | None) -> Underivable:
        input_shapes = [getattr(a.meta.get("val"), "shape", None) for a in node.all_input_nodes]
        called = node.meta["called"]
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            what = "is random; call fastrnn.dropout or fastrnn.bernoulli instead"
        elif about(called):
            what = about(called)
        elif "aten.sum" in str(node.target):
            what = "adds up what was spread over rows; a number for each row, as a reduction gives "
            what += "it, keeps its dimension: keepdim=True, or unsqueeze(-1)"
        elif shape != self.shape and self.shape in input_shapes:
            what = f"changes the shape; {MIXED}"
        else:
            what = (
                "is not among the functions that code is derived for. Apart from reductions over "
                "the last dimension and v(x), a cell is a pointwise formula, in terms of "
                "arithmetic, powers with a constant exponent, comparisons, where, maximum, "
                "minimum, clamp, abs, sign, floor, sqrt, exp, log, sin, cos, erf, sigmoid, tanh "
                "and the activations made of these"
            )
        return Underivable(f"cell {self.cell.name!r} calls {_named(node)}, which {what}")


def _named(node: fx.Node) -> str:
    """The function of torch that a cell calls, and the operation of it."""
    called = node.meta["called"]
    return f"{called} ({node.target})" if called else str(node.target)


def _largest_integer(value: Expr) -> float:
    """A bound of the absolute value of a formula that gives integers alone; infinite for others."""
    if value.op in MASKS or value.op == "sign":
        return 1
    if value.constant is not None:
        return abs(value.constant) if value.constant.is_integer() else math.inf
    if value.op not in ("add", "sub", "mul", "neg", "abs", "where", "maximum", "minimum"):
        return math.inf
    bounds = [_largest_integer(a) for a in value.args if a.op not in MASKS]
    if value.op in ("add", "sub"):
        return sum(bounds)
    return math.prod(bounds) if value.op == "mul" else max(bounds)
