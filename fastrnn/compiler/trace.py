"""Reads a cell's function and its vector-Jacobian product into expressions.

Expressions are pointwise. Where units need each other, at a product or a reduction, the step is cut
(`cut.py`): the result is an input of what follows, and the operand is one more output.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from fastrnn.cells import Cell
from fastrnn.compiler.cut import Cut, Site, Underivable
from fastrnn.compiler.expression import MASKS, Algebra, Expr

__all__ = ["Trace", "Underivable", "trace"]


@dataclass(frozen=True)
class Trace:
    """A cell's step and its derivative.

    The inputs have the labels `u.i`, `v.i` for a gate i, `s.h`, `dnext.h` for a state h, `p.a` for
    a parameter a (`p.a.i` if it has a number for each gate), `count` for the number of units, the
    labels of `Site.results`, and `doperand.k.j` for the gradient of part j of the operand of site
    k. Gradients of parameters are those of one row and unit; those of the results of a reduction
    are to be summed over the units.

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
    """
    traced = _read(algebra, cell, (3,))
    if traced != _read(algebra, cell, (2, 5)):
        raise Underivable(
            f"cell {cell.name!r} depends on the shape of its tensors, or is another formula each "
            "time it is called; a cell must be the same formula for every unit"
        )
    return traced


def _read(algebra: Algebra, cell: Cell, shape: tuple[int, ...]) -> Trace:
    gates, states = len(cell.gates), len(cell.states)
    *outer, width = shape

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device="cpu")

    # Parameters have a number for each row, too: so their gradients are pointwise.
    parts = [gates if param.kind == "gates" else 1 for param in cell.params.values()]
    inputs = [zeros(*shape) for _ in range(2 * gates + states)]
    inputs += [zeros(*outer, n * width) for n in parts]
    own = len(inputs)
    ends = (gates, 2 * gates, 2 * gates + states)
    count = zeros() + width

    def step(cut: Cut, flat: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        u, v, s, p = (flat[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True))
        with cut:
            return tuple(cell.step(u, cut.products(v, s[0]), s, p, cut.apply))

    try:
        probe = Cut(cell, shape, count)
        after = step(probe, tuple(x.clone() for x in inputs))
        _check_states(cell, after, shape)
        sites = tuple(probe.sites)
        results = [label for site in sites for label in site.results]
        inputs += [zeros(*outer, 1) for _ in results]
        active = len(inputs)
        inputs += [zeros(*shape) for _ in cell.states]
        inputs += [zeros(*outer, site.parts * width) for site in sites]

        def sweep(*flat: Tensor) -> tuple[Tensor, ...]:
            def function(*some: Tensor) -> tuple[Tensor, ...]:
                cut = Cut(cell, shape, flat[-1], iter(some[own:]))
                after = step(cut, some[:own])
                if tuple(cut.sites) != sites:
                    raise Underivable(f"cell {cell.name!r} is another formula each time")
                return (*after, *cut.operands)

            after, back = torch.func.vjp(function, *flat[:active])[:2]
            return (*after, *back(flat[active:-1]))

        traced = make_fx(sweep, decomposition_table=_decompositions())(*inputs, count)
    except RuntimeError as error:
        what = str(error).split("\n")[0]
        if re.search(r"Boolean value of Tensor|to get value out|to Scalar", what):
            what = "it reads the value of a tensor, perhaps to branch on it; "
            what += "choose per unit with torch.where"
        elif "in-place" in what:
            what = "it writes into one of its arguments; give the result a name of its own"
        raise Underivable(f"no code can be derived for cell {cell.name!r}: {what}") from error
    labels: list[tuple[str, ...]] = []
    labels += [(f"{side}.{name}",) for side in "uv" for name in cell.gates]
    labels += [(f"s.{name}",) for name in cell.states]
    labels += [tuple(f"p.{row}" for row in rows) for rows in cell.param_rows().values()]
    labels += [(label,) for label in results]
    labels += [(f"dnext.{name}",) for name in cell.states]
    labels += [
        tuple(f"doperand.{k}.{part}" for part in range(site.parts)) for k, site in enumerate(sites)
    ]
    read = _Reader(algebra, cell, shape).read(traced, [*labels, ("count",)])
    first = states + len(sites)
    gradients = read[first:]
    return Trace(
        tuple(value for (value,) in read[:states]),
        sites,
        tuple(read[states:first]),
        tuple(value for parts in gradients[:own] for value in parts),
        tuple(zip(results, (value for (value,) in gradients[own:]), strict=True)),
    )


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
        # Values that lie side by side in one tensor, as gates do after `cat`, are parts of it.
        self.values: dict[fx.Node, list[Expr]] = {}
        self.pieces: dict[fx.Node, list[list[Expr]]] = {}  # results of `split`
        self.fixed: set[int] = set()  # arguments, and parts of other values
        self.part = 0  # which part a rule computes

    def read(
        self, traced: fx.GraphModule, labels: Iterable[tuple[str, ...]]
    ) -> list[tuple[Expr, ...]]:
        names = iter(labels)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = [self.algebra.input(label) for label in next(names)]
                self.fixed.add(id(self.values[node]))
            elif node.op == "get_attr":
                self.values[node] = [self._captured(getattr(traced, node.target), node)]
            elif node.op == "call_function":
                self._call(node)
            else:
                return [tuple(map(self._number, self.values[a])) for a in node.args[0]]
        raise AssertionError("a traced graph ends with its output")

    def pick(self, node: fx.Node) -> Expr:
        """The value of a node in the part that a rule computes."""
        parts = self.values[node]
        return parts[self.part if len(parts) > 1 else 0]

    def real(self, arg: Any) -> Expr:
        """An argument as a number: a mask becomes 1 and 0, as torch promotes it."""
        return self._number(self.pick(arg) if isinstance(arg, fx.Node) else self.algebra.const(arg))

    def _number(self, value: Expr) -> Expr:
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
        rule = _FUNCTIONS.get(name) or _TENSORS.get(name)
        side = _SIDE_BY_SIDE.get(name)
        like = node.meta.get("val")
        shape = getattr(like, "shape", None)
        parts = self._parts(shape)
        if not parts or not (rule or side or name in _ALIASES):
            raise self._refusal(node, shape)
        if side:
            beside = side(self, node)
            if beside is None or len(beside) != parts:
                raise self._refusal(node, shape)
            self.values[node] = beside
            # They may share memory with what they were made of.
            self.fixed.update(id(self.values[n]) for n in (node, *node.all_input_nodes))
            return
        if not rule:
            self.values[node] = self.values[args[0]]
            return
        values = []
        for self.part in range(parts):
            value = rule(self, *args, **node.kwargs)
            if isinstance(value, str):
                raise Underivable(f"cell {self.cell.name!r} calls {target}: {value}")
            if like is not None and like.dtype == torch.bool and value.op not in MASKS:
                value = self.algebra.make("ne", value, self.algebra.const(0))
            values.append(value)
        place = self.values[args[0]] if in_place else values
        if id(place) in self.fixed:
            raise Underivable(
                f"cell {self.cell.name!r} writes into one of its arguments, or into a part of a "
                f"tensor ({target}); give the result a name of its own"
            )
        place[:] = values
        self.values[node] = place

    def _split(self, node: fx.Node) -> None:
        pieces = [piece.shape for piece in node.meta["val"]]
        source = node.args[0]
        assert isinstance(source, fx.Node)
        width = self.shape[-1]
        if len(pieces[0]) != len(self.shape) or any(size[-1] % width for size in pieces):
            raise self._refusal(node, pieces[0])
        parts = iter(self.values[source])
        self.pieces[node] = [[next(parts) for _ in range(size[-1] // width)] for size in pieces]
        self.fixed.update(map(id, (*self.pieces[node], self.values[source])))

    def _refusal(self, node: fx.Node, shape: tuple[int, ...] | None) -> Underivable:
        input_shapes = [getattr(a.meta.get("val"), "shape", None) for a in node.all_input_nodes]
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            what = "is random; noise must come through u or a state"
        elif shape != self.shape and self.shape in input_shapes:
            what = "changes the shape; units can be mixed by reductions over the last dimension "
            what += "(sum, mean, var, std, amax, softmax, layer_norm, rms_norm) and by v(x) alone"
        else:
            what = "is not among the functions that code is derived for"
        return Underivable(
            f"cell {self.cell.name!r} calls {node.target}, which {what}. Apart from these, a cell "
            "is a pointwise formula, in terms of arithmetic, powers with a constant "
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
        return reader.pick(x)
    return f"it converts {old} to {dtype}, but a cell computes in the dtype of its inputs"


def _argument(position: int) -> _Rule:
    return lambda reader, *args, **_: reader.real(args[position])


def _copy(reader: _Reader, x: Any, **_: Any) -> Expr:
    return reader.pick(x)


# Rules for values that lie side by side: they return all parts, or None if units would mix.


def _cat(reader: _Reader, node: Any) -> list[Expr] | None:
    tensors, *dim = node.args
    last = (dim[0] if dim else 0) in (-1, len(reader.shape) - 1)
    whole = all(t.meta["val"].shape[-1] % reader.shape[-1] == 0 for t in tensors)
    return [part for t in tensors for part in reader.values[t]] if last and whole else None


def _slice(reader: _Reader, node: Any) -> list[Expr] | None:
    source = node.args[0]
    parts = reader.values[source]
    place = _place(reader, source, node.args[1:])
    return None if place is None else parts[place]


def _slice_scatter(reader: _Reader, node: Any) -> list[Expr] | None:
    source, piece = node.args[:2]
    place = _place(reader, source, node.args[2:])
    if place is None:
        return None
    parts = list(reader.values[source])
    parts = parts * (source.meta["val"].shape[-1] // reader.shape[-1] // len(parts))
    parts[place] = reader.values[piece]
    return parts


def _place(reader: _Reader, source: Any, given: Sequence[Any]) -> slice | None:
    """The parts of a value that `dim, begin, end, step` select, or None if units would mix."""
    bounds: list[Any] = [*given, *(0, None, None, 1)[len(given) :]]
    dim, begin, end, step = bounds
    size, width = source.meta["val"].shape, reader.shape[-1]
    if step != 1 or len(size) != len(reader.shape) or size[-1] % width:
        return None
    begin, end, _ = slice(begin, end).indices(size[dim])
    if dim % len(size) != len(size) - 1:
        return slice(None) if (begin, end) == (0, size[dim]) else None
    return None if begin % width or end % width else slice(begin // width, end // width)


def _pad(reader: _Reader, node: Any) -> list[Expr] | None:
    source, pads = node.args[:2]
    width = reader.shape[-1]
    if any(pads[2:]) or pads[0] % width or pads[1] % width:
        return None
    fill = [reader.algebra.const(node.args[2] if len(node.args) > 2 else 0)]
    return fill * (pads[0] // width) + reader.values[source] + fill * (pads[1] // width)


def _sum_of_gradients(reader: _Reader, node: Any) -> list[Expr] | None:
    """The gradient of a number that was broadcast to the units of a row. It is to be summed over
    them (`Trace`), so it stays as it is; but its parts are added up."""
    source, dims = node.args[:2] if len(node.args) > 1 else (node.args[0], None)
    if dims not in ([-1], [len(reader.shape) - 1]):
        return None
    first, *others = (reader._number(part) for part in reader.values[source])
    for part in others:
        first = reader.algebra.make("add", first, part)
    return [first]


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
_ALIASES = frozenset(
    {"alias", "detach", "lift_fresh", "view", "_unsafe_view", "expand", "squeeze", "unsqueeze"}
)
_SIDE_BY_SIDE: dict[str, Callable[[_Reader, Any], list[Expr] | None]] = {
    "cat": _cat,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "constant_pad_nd": _pad,
    "sum": _sum_of_gradients,
}
