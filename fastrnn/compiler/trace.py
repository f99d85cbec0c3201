"""Reads a cell's function and its vector-Jacobian product into expressions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from fastrnn.cells import Cell
from fastrnn.compiler.expression import MASKS, Algebra, Expr

__all__ = ["Underivable", "trace"]


class Underivable(TypeError):
    """The cell's function is not a pointwise formula, so only the reference can run it."""


def trace(algebra: Algebra, cell: Cell) -> tuple[Expr, ...]:
    """Expressions of the next states and of the gradients of `u`, `v`, the states and the learned
    parameters.

    The inputs have the labels `u.i`, `v.i` for a gate i, `s.h`, `dnext.h` for a state h and `p.a`
    for a parameter a. Gradients of parameters are those of one row and unit.

    Raises:
        Underivable: if the function is not a pointwise formula of those inputs.
    """
    traced = _read(algebra, cell, (3,))
    if any(a is not b for a, b in zip(traced, _read(algebra, cell, (2, 5)), strict=True)):
        raise Underivable(
            f"cell {cell.name!r} depends on the shape of its tensors, or is another formula each "
            "time it is called; a cell must be the same formula for every unit"
        )
    return traced


def _read(algebra: Algebra, cell: Cell, shape: tuple[int, ...]) -> tuple[Expr, ...]:
    gates, states, params = len(cell.gates), len(cell.states), len(cell.params)
    ends = (gates, 2 * gates, 2 * gates + states)

    # Parameters have a number for each row, too: so their gradients are pointwise.
    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        u, v, s, p = (flat[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True))
        return tuple(cell.step(u, v, s, p))

    def sweep(*flat: Tensor) -> tuple[Tensor, ...]:
        after, back = torch.func.vjp(step, *flat[:-states])[:2]
        return (*after, *back(flat[-states:]))

    inputs = [
        torch.zeros(shape, dtype=torch.float64, device="cpu")
        for _ in range(2 * gates + 2 * states + params)
    ]
    try:
        after = step(*(x.clone() for x in inputs[:-states]))
        _check_states(cell, after, shape)
        traced = make_fx(sweep, decomposition_table=_decompositions())(*inputs)
    except RuntimeError as error:
        what = str(error).split("\n")[0]
        if re.search(r"Boolean value of Tensor|to get value out|to Scalar", what):
            what = "it reads the value of a tensor, perhaps to branch on it; "
            what += "choose per unit with torch.where"
        elif "in-place" in what:
            what = "it writes into one of its arguments; give the result a name of its own"
        raise Underivable(f"no code can be derived for cell {cell.name!r}: {what}") from error
    labels = [f"{side}.{name}" for side in "uv" for name in cell.gates]
    for side, names in (("s", cell.states), ("p", cell.params), ("dnext", cell.states)):
        labels += [f"{side}.{name}" for name in names]
    return _Reader(algebra, cell, shape).read(traced, labels)


def _check_states(cell: Cell, states: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    for name, state in zip(cell.states, states, strict=True):
        if not isinstance(state, Tensor):
            what = f"a {type(state).__name__}"
        elif state.shape != shape or state.dtype != torch.float64:
            what = f"of shape {list(state.shape)} and {state.dtype}"
        else:
            continue
        raise Underivable(
            f"cell {cell.name!r} returned state {name!r} {what}, where its inputs are of shape "
            f"{list(shape)} and torch.float64; a state must be like the inputs"
        )


def _decompositions() -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    activations = [aten.gelu, aten.elu, aten.leaky_relu, aten.hardtanh]
    return dict(core_aten_decompositions().items()) | get_decompositions(activations)


class _Reader:
    """Turns a traced graph into expressions."""

    def __init__(self, algebra: Algebra, cell: Cell, shape: tuple[int, ...]) -> None:
        self.algebra = algebra
        self.cell = cell
        self.shape = shape
        # Aliases share a one-element list, so that in-place operations reach all of them.
        self.values: dict[fx.Node, list[Expr]] = {}
        self.arguments: set[int] = set()

    def read(self, traced: fx.GraphModule, labels: list[str]) -> tuple[Expr, ...]:
        names = iter(labels)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = [self.algebra.input(next(names))]
                self.arguments.add(id(self.values[node]))
            elif node.op == "get_attr":
                self.values[node] = [self._captured(getattr(traced, node.target), node)]
            elif node.op == "call_function":
                self._call(node)
            else:
                return tuple(self.real(a) for a in node.args[0])
        raise AssertionError("a traced graph ends with its output")

    def real(self, arg: Any) -> Expr:
        """An argument as a number: a mask becomes 1 and 0, as torch promotes it."""
        value = self.values[arg][0] if isinstance(arg, fx.Node) else self.algebra.const(arg)
        if value.op in MASKS:
            return self.algebra.make("where", value, self.algebra.const(1), self.algebra.const(0))
        return value

    def mask(self, arg: Any) -> Expr:
        value = self.values[arg][0] if isinstance(arg, fx.Node) else self.algebra.const(arg)
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

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        args: tuple[Any, ...] = node.args
        name = str(target.overloadpacket.__name__ if hasattr(target, "overloadpacket") else target)
        in_place = name.endswith("_") and not name.endswith("__")
        name = name[:-1] if in_place else name
        rule = _FUNCTIONS.get(name) or _TENSORS.get(name)
        like = node.meta.get("val")
        shape = getattr(like, "shape", None)
        if shape not in (self.shape, ()) or not (rule or name in _ALIASES):
            raise self._refusal(node, shape)
        if not rule:
            self.values[node] = self.values[args[0]]
            return
        value = rule(self, *args, **node.kwargs)
        if isinstance(value, str):
            raise Underivable(f"cell {self.cell.name!r} calls {target}: {value}")
        if like is not None and like.dtype == torch.bool and value.op not in MASKS:
            value = self.algebra.make("ne", value, self.algebra.const(0))
        place = self.values[args[0]] if in_place else [value]
        if id(place) in self.arguments:
            raise Underivable(
                f"cell {self.cell.name!r} writes into one of its arguments ({target}); "
                "give the result a name of its own"
            )
        place[0] = value
        self.values[node] = place

    def _refusal(self, node: fx.Node, shape: tuple[int, ...] | None) -> Underivable:
        input_shapes = [getattr(a.meta.get("val"), "shape", None) for a in node.all_input_nodes]
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            what = "is random; noise must come through u or a state"
        elif shape != self.shape and self.shape in input_shapes:
            what = "changes the shape; units cannot be mixed, so no sum, mean, product or choice "
            what += "over them can be part of a cell"
        else:
            what = "is not among the functions that code is derived for"
        return Underivable(
            f"cell {self.cell.name!r} calls {node.target}, which {what}. A cell is a pointwise "
            "formula of its gates and states, in terms of arithmetic, powers with a constant "
            "exponent, comparisons, where, maximum, minimum, clamp, abs, sign, floor, sqrt, exp, "
            "log, sin, cos, erf, sigmoid, tanh and the activations made of these"
        )


_Rule = Callable[..., Expr | str]


def _same(op: str) -> _Rule:
    return lambda reader, *args: reader.algebra.make(op, *map(reader.real, args))


def _masks(op: str) -> _Rule:
    return lambda reader, *args: reader.algebra.make(op, *map(reader.mask, args))


def _constant(value: float) -> _Rule:
    return lambda reader, *_, **__: reader.algebra.const(value)


def _add(op: str) -> _Rule:
    def rule(reader: _Reader, x: Any, y: Any, alpha: float = 1) -> Expr:
        make, const = reader.algebra.make, reader.algebra.const
        return make(op, reader.real(x), make("mul", reader.real(y), const(alpha)))

    return rule


def _div(reader: _Reader, x: Any, y: Any, rounding_mode: str | None = None) -> Expr:
    quotient = reader.algebra.make("div", reader.real(x), reader.real(y))
    if rounding_mode == "floor":
        return reader.algebra.make("floor", quotient)
    return quotient if rounding_mode is None else _trunc(reader, quotient)


def _ceil(reader: _Reader, x: Expr) -> Expr:
    make = reader.algebra.make
    return make("neg", make("floor", make("neg", x)))


def _trunc(reader: _Reader, x: Expr) -> Expr:
    make = reader.algebra.make
    below = make("lt", x, reader.algebra.const(0))
    return make("where", below, _ceil(reader, x), make("floor", x))


def _clamp(reader: _Reader, x: Any, low: Any = None, high: Any = None, **bounds: Any) -> Expr:
    value = reader.real(x)
    low, high = bounds.get("min", low), bounds.get("max", high)
    if low is not None:
        value = reader.algebra.make("maximum", value, reader.real(low))
    if high is not None:
        value = reader.algebra.make("minimum", value, reader.real(high))
    return value


def _where(reader: _Reader, mask: Any, yes: Any, no: Any) -> Expr:
    return reader.algebra.make("where", reader.mask(mask), reader.real(yes), reader.real(no))


def _pow(reader: _Reader, base: Any, exponent: Any) -> Expr | str:
    x, y = reader.real(base), reader.real(exponent)
    if y.constant is not None:
        return reader.algebra.pow(x, y.constant)
    if x.constant is not None and x.constant > 0:
        scaled = reader.algebra.make("mul", y, reader.algebra.const(math.log(x.constant)))
        return reader.algebra.make("exp", scaled)
    return "a power needs a constant exponent or a positive constant base; write exp(y * log(x))"


def _scaled(op: str, scale: float) -> _Rule:
    """`op(x) * scale`."""

    def rule(reader: _Reader, x: Any) -> Expr:
        make, const = reader.algebra.make, reader.algebra.const
        return make("mul", make(op, reader.real(x)), const(scale))

    return rule


def _hyperbolic(op: str, function: str) -> _Rule:
    """`(f(x) op f(-x)) / 2`; with f = expm1, sinh is exact near zero."""

    def rule(reader: _Reader, x: Any) -> Expr:
        make, value = reader.algebra.make, reader.real(x)
        both = make(op, make(function, value), make(function, make("neg", value)))
        return make("mul", both, reader.algebra.const(0.5))

    return rule


def _tan(reader: _Reader, x: Any) -> Expr:
    make, value = reader.algebra.make, reader.real(x)
    return make("div", make("sin", value), make("cos", value))


def _isinf(reader: _Reader, x: Any) -> Expr:
    make = reader.algebra.make
    return make("eq", make("abs", reader.real(x)), reader.algebra.const(float("inf")))


def _shrunk(reader: _Reader, gradient: Any, x: Any, bound: Any) -> Expr:
    make, value = reader.algebra.make, reader.real(x)
    inside = make("le", make("abs", value), reader.real(bound))
    return make("where", inside, reader.algebra.const(0), reader.real(gradient))


def _cast(reader: _Reader, x: Any, dtype: torch.dtype | None = None, **_: Any) -> Expr | str:
    old = x.meta["val"].dtype
    if dtype in (None, old, torch.bool) or (old == torch.bool and dtype.is_floating_point):
        return reader.values[x][0]
    return f"it converts {old} to {dtype}, but a cell computes in the dtype of its inputs"


def _argument(position: int) -> _Rule:
    return lambda reader, *args, **_: reader.real(args[position])


def _copy(reader: _Reader, x: Any, **_: Any) -> Expr:
    return reader.values[x][0]


_PLAIN = """mul neg lt le gt ge eq ne maximum minimum relu abs sign floor sqrt rsqrt reciprocal
    sigmoid tanh exp expm1 log log1p sin cos erf"""
# For each function of torch.ops.aten: the rule that gives its expression, or why there is none.
_FUNCTIONS: dict[str, _Rule] = {
    **{op: _same(op) for op in _PLAIN.split()},
    "add": _add("add"),
    "sub": _add("sub"),
    "rsub": lambda reader, x, y, alpha=1: _add("sub")(reader, y, x, alpha),
    "div": _div,
    "pow": _pow,
    "where": _where,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda reader, x, high: _clamp(reader, x, None, high),
    "ceil": lambda reader, x: _ceil(reader, reader.real(x)),
    "trunc": lambda reader, x: _trunc(reader, reader.real(x)),
    "log2": _scaled("log", 1 / math.log(2)),
    "log10": _scaled("log", 1 / math.log(10)),
    "exp2": lambda reader, x: _pow(reader, 2.0, x),
    "sinh": _hyperbolic("sub", "expm1"),
    "cosh": _hyperbolic("add", "exp"),
    "tan": _tan,
    "logical_and": _masks("both"),
    "logical_or": _masks("either"),
    "logical_not": _masks("negate"),
    "bitwise_and": _masks("both"),
    "bitwise_or": _masks("either"),
    "bitwise_not": _masks("negate"),
    "isnan": lambda reader, x: reader.algebra.make("ne", reader.real(x), reader.real(x)),
    "isinf": _isinf,
    "softshrink_backward": _shrunk,
    "hardshrink_backward": _shrunk,
}
# Functions that only create, copy or fill tensors; the result of `empty` is overwritten later.
_TENSORS: dict[str, _Rule] = {
    **{
        name: _constant(math.nan) for name in ("empty", "empty_like", "empty_permuted", "new_empty")
    },
    "_to_copy": _cast,
    "clone": _copy,
    "lift_fresh_copy": _copy,
    "copy": _argument(1),
    "fill": _argument(1),
    "scalar_tensor": _argument(0),
    "full": _argument(1),
    "full_like": _argument(1),
    "new_full": _argument(2),
    "zero": _constant(0),
    "zeros": _constant(0),
    "zeros_like": _constant(0),
    "new_zeros": _constant(0),
    "ones": _constant(1),
    "ones_like": _constant(1),
    "new_ones": _constant(1),
}
# Functions that return an alias of their first argument.
_ALIASES = frozenset({"alias", "detach", "lift_fresh", "view", "_unsafe_view", "expand"})
