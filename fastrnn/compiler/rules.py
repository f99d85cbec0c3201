"""What each function of torch is as an expression."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from fastrnn.compiler.advice import DTYPE
from fastrnn.compiler.expression import Algebra, Expr

__all__ = ["ALIASES", "FUNCTIONS", "SIDE_BY_SIDE", "TENSORS", "parts_of"]


class Reader(Protocol):
    """What a rule asks of the reader of a traced graph.

    Attributes:
        algebra: makes expressions.
        shape: of one value of all units.
        own: the dtypes of the cell's values.
        values: the parts of each node: values that lie side by side in one tensor.
    """

    algebra: Algebra
    shape: tuple[int, ...]
    own: frozenset[torch.dtype]
    values: dict[fx.Node, list[Expr]]

    def pick(self, node: fx.Node) -> Expr:
        """The value of a node in the part that the rule computes."""

    def real(self, arg: Any) -> Expr:
        """An argument as a number."""

    def mask(self, arg: Any) -> Expr:
        """An argument as a mask."""

    def number(self, value: Expr) -> Expr:
        """A value as a number."""


_Rule = Callable[..., Expr | str]


def _same(op: str) -> _Rule:
    return lambda reader, *args: reader.algebra.make(op, *map(reader.real, args))


def _masks(op: str) -> _Rule:
    return lambda reader, *args: reader.algebra.make(op, *map(reader.mask, args))


def _constant(value: float) -> _Rule:
    return lambda reader, *_, **__: reader.algebra.const(value)


def _add(op: str) -> _Rule:
    def rule(reader: Reader, x: Any, y: Any, alpha: float = 1) -> Expr:
        make, const = reader.algebra.make, reader.algebra.const
        return make(op, reader.real(x), make("mul", reader.real(y), const(alpha)))

    return rule


def _div(reader: Reader, x: Any, y: Any, rounding_mode: str | None = None) -> Expr:
    quotient = reader.algebra.make("div", reader.real(x), reader.real(y))
    if rounding_mode == "floor":
        return reader.algebra.make("floor", quotient)
    return quotient if rounding_mode is None else _trunc(reader, quotient)


def _ceil(reader: Reader, x: Expr) -> Expr:
    make = reader.algebra.make
    return make("neg", make("floor", make("neg", x)))


def _trunc(reader: Reader, x: Expr) -> Expr:
    make = reader.algebra.make
    below = make("lt", x, reader.algebra.const(0))
    return make("where", below, _ceil(reader, x), make("floor", x))


def _clamp(reader: Reader, x: Any, low: Any = None, high: Any = None, **bounds: Any) -> Expr:
    value = reader.real(x)
    low, high = bounds.get("min", low), bounds.get("max", high)
    if low is not None:
        value = reader.algebra.make("maximum", value, reader.real(low))
    if high is not None:
        value = reader.algebra.make("minimum", value, reader.real(high))
    return value


def _where(reader: Reader, mask: Any, yes: Any, no: Any) -> Expr:
    return reader.algebra.make("where", reader.mask(mask), reader.real(yes), reader.real(no))


def _pow(reader: Reader, base: Any, exponent: Any) -> Expr | str:
    x, y = reader.real(base), reader.real(exponent)
    if y.constant is not None:
        return reader.algebra.pow(x, y.constant)
    if x.constant is not None and x.constant > 0:
        scaled = reader.algebra.make("mul", y, reader.algebra.const(math.log(x.constant)))
        return reader.algebra.make("exp", scaled)
    return "a power needs a constant exponent or a positive constant base; write exp(y * log(x))"


def _scaled(op: str, scale: float) -> _Rule:
    """`op(x) * scale`."""

    def rule(reader: Reader, x: Any) -> Expr:
        make, const = reader.algebra.make, reader.algebra.const
        return make("mul", make(op, reader.real(x)), const(scale))

    return rule


def _hyperbolic(op: str, function: str) -> _Rule:
    """`(f(x) op f(-x)) / 2`; with f = expm1, sinh is exact near zero."""

    def rule(reader: Reader, x: Any) -> Expr:
        make, value = reader.algebra.make, reader.real(x)
        both = make(op, make(function, value), make(function, make("neg", value)))
        return make("mul", both, reader.algebra.const(0.5))

    return rule


def _tan(reader: Reader, x: Any) -> Expr:
    make, value = reader.algebra.make, reader.real(x)
    return make("div", make("sin", value), make("cos", value))


def _isinf(reader: Reader, x: Any) -> Expr:
    make = reader.algebra.make
    return make("eq", make("abs", reader.real(x)), reader.algebra.const(float("inf")))


def _shrunk(reader: Reader, gradient: Any, x: Any, bound: Any) -> Expr:
    make, value = reader.algebra.make, reader.real(x)
    inside = make("le", make("abs", value), reader.real(bound))
    return make("where", inside, reader.algebra.const(0), reader.real(gradient))


def _cast(reader: Reader, x: Any, dtype: torch.dtype | None = None, **_: Any) -> Expr | str:
    old = x.meta["val"].dtype
    if dtype in (None, old, torch.bool):
        return reader.pick(x)
    if dtype.is_floating_point and (old == torch.bool or old.is_floating_point):
        return reader.pick(x)  # the reader asks whether the numbers have room in that dtype
    what = "a mask" if old == torch.bool else "numbers"
    return f"it converts {what} to {dtype}; {DTYPE}"


def _argument(position: int) -> _Rule:
    return lambda reader, *args, **_: reader.real(args[position])


def _copy(reader: Reader, x: Any, **_: Any) -> Expr:
    return reader.pick(x)


# Rules for values that lie side by side: they return all parts, or None if units would mix.


def parts_of(reader: Reader, node: Any) -> list[Expr]:
    """The parts of a value of whole units; a number for each row is the same in all."""
    parts = reader.values[node]
    return parts * (node.meta["val"].shape[-1] // reader.shape[-1]) if len(parts) == 1 else parts


def _cat(reader: Reader, node: Any) -> list[Expr] | None:
    tensors, *dim = node.args
    last = (dim[0] if dim else 0) in (-1, len(reader.shape) - 1)
    whole = all(t.meta["val"].shape[-1] % reader.shape[-1] == 0 for t in tensors)
    return [part for t in tensors for part in parts_of(reader, t)] if last and whole else None


def _slice(reader: Reader, node: Any) -> list[Expr] | None:
    source = node.args[0]
    place = _place(reader, source, node.args[1:])
    return None if place is None else parts_of(reader, source)[place]


def _slice_scatter(reader: Reader, node: Any) -> list[Expr] | None:
    source, piece = node.args[:2]
    place = _place(reader, source, node.args[2:])
    if place is None:
        return None
    parts = list(parts_of(reader, source))
    parts[place] = parts_of(reader, piece)
    return parts


def _place(reader: Reader, source: Any, given: Sequence[Any]) -> slice | None:
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


def _pad(reader: Reader, node: Any) -> list[Expr] | None:
    source, pads = node.args[:2]
    width = reader.shape[-1]
    if any(pads[2:]) or pads[0] % width or pads[1] % width:
        return None
    fill = [reader.algebra.const(node.args[2] if len(node.args) > 2 else 0)]
    return fill * (pads[0] // width) + parts_of(reader, source) + fill * (pads[1] // width)


def _sum_of_gradients(reader: Reader, node: Any) -> list[Expr] | None:
    """The gradient of a number that was broadcast to the units of a row. It is to be summed over
    them (`Trace`), so it stays as it is; but its parts are added up."""
    source, dims = node.args[:2] if len(node.args) > 1 else (node.args[0], None)
    if dims not in ([-1], [len(reader.shape) - 1]):
        return None
    first, *others = (reader.number(part) for part in reader.values[source])
    for part in others:
        first = reader.algebra.make("add", first, part)
    return [first]


_PLAIN = """mul neg lt le gt ge eq ne maximum minimum relu abs sign floor sqrt rsqrt reciprocal
    sigmoid tanh exp expm1 log log1p sin cos erf"""
# For each function of torch.ops.aten: the rule that gives its expression, or why there is none.
FUNCTIONS: dict[str, _Rule] = {
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
TENSORS: dict[str, _Rule] = {
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
ALIASES = frozenset(
    {"alias", "detach", "lift_fresh", "view", "_unsafe_view", "expand", "squeeze", "unsqueeze"}
)
SIDE_BY_SIDE: dict[str, Callable[[Reader, Any], list[Expr] | None]] = {
    "cat": _cat,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "constant_pad_nd": _pad,
    "sum": _sum_of_gradients,
}
