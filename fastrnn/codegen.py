"""Everything that is derived from a cell's function: its derivative, what back-propagation keeps,
the C++ it compiles to and the text that explains it.

The function and its vector-Jacobian product are traced once into pointwise expressions
(`expression.py`). Two rules then shape them:

- **tied**: where the gradients of a gate's `u` and `v` are the same node, the cell depends on their
  sum `a` alone, and one array serves both.
- **keep**: backward is given the states before and after the step. Whatever follows from those is
  recomputed. Of the rest, the fewest values are kept from which backward follows by arithmetic
  alone, without a transcendental function.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.expression import MASKS, TRANSCENDENTAL, Algebra, Expr, evaluate, ordered, uses, write

__all__ = [
    "Derived",
    "Underivable",
    "cpp",
    "derive",
    "describe",
    "header",
    "key",
    "struct_name",
    "write_header",
]


class Underivable(TypeError):
    """The cell's function is no pointwise formula, so only the reference can run it."""


@dataclass(frozen=True, eq=False)
class Derived:
    """What follows from a cell's function.

    Attributes:
        name, gates, states: the cell's.
        tied: per gate, whether the cell depends on `u + v` alone.
        kept: names of the values kept per unit and step for backward: a gate's name for what its
            nonlinearity gives, `v.n` or `u.n` for a raw projection, `a.n` for their sum.
        reads_state, reads_next: per state, whether backward reads it before and after the step.
        step: expressions of the next states and the kept values.
        gradients: expressions of the gradients of `u`, `v` and the states.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    tied: tuple[bool, ...]
    kept: tuple[str, ...]
    reads_state: tuple[bool, ...]
    reads_next: tuple[bool, ...]
    step: tuple[Expr, ...]
    gradients: tuple[Expr, ...]

    def forward(
        self, u: Sequence[Tensor], v: Sequence[Tensor], s: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step on tensors of one shape, one per gate and state: `(next, kept)`."""
        inputs = _labelled("s", self.states, s)
        for name, tied, left, right in zip(self.gates, self.tied, u, v, strict=True):
            if tied:
                inputs[f"a.{name}"] = left + right
            else:
                inputs |= {f"u.{name}": left, f"v.{name}": right}
        out = evaluate(self.step, inputs)
        return out[: len(self.states)], out[len(self.states) :]

    def backward(
        self,
        kept: Sequence[Tensor],
        s: Sequence[Tensor],
        next: Sequence[Tensor],
        dnext: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients `(du, dv, ds)` of that step, from `dnext`, those of its next states."""
        inputs = _labelled("s", self.states, s)
        inputs |= _labelled("next", self.states, next)
        inputs |= _labelled("dnext", self.states, dnext)
        inputs |= _labelled("kept", self.kept, kept)
        out = evaluate(self.gradients, inputs)
        count = len(self.gates)
        return out[:count], out[count : 2 * count], out[2 * count :]


def _labelled(kind: str, names: Sequence[str], values: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": value for name, value in zip(names, values, strict=True)}


def derive(cell: Cell) -> Derived:
    """Derive everything from a cell; remembered per cell.

    Raises:
        Underivable: names what the function does that no pointwise formula can.
    """
    found = _derive(cell)
    if isinstance(found, Underivable):
        raise Underivable(*found.args) from found.__cause__
    return found


@functools.cache
def _derive(cell: Cell) -> Derived | Underivable:
    # A new thread has none of the caller's modes: autocast, fake tensors, functorch levels.
    with ThreadPoolExecutor(1) as alone:
        try:
            return alone.submit(_derive_here, cell).result()
        except Underivable as reason:
            return reason


def _derive_here(cell: Cell) -> Derived:
    algebra = Algebra()
    traced = _read(algebra, cell, (3,))
    if any(a is not b for a, b in zip(traced, _read(algebra, cell, (2, 5)), strict=True)):
        raise Underivable(
            f"cell {cell.name!r} depends on the shape of its tensors, or gives another formula every "
            "time it is called; a cell must be the same formula for every unit"
        )
    count, states = len(cell.gates), len(cell.states)
    du, dv = traced[states : states + count], traced[states + count : states + 2 * count]
    tied, traced = _tie(algebra, cell, traced, [a is b for a, b in zip(du, dv, strict=True)])
    step, gradients = traced[:states], traced[states:]
    gradients = _without_zero_gradients(algebra, gradients)
    available = {
        node: algebra.input(f"next.{name}")
        for node, name in reversed(list(zip(step, cell.states, strict=True)))
        if node.op != "const" and not node.label.startswith("s.")
    }
    kept = _name(_keep(gradients, available), cell.gates)
    known = available | {node: algebra.input(f"kept.{name}") for name, node in kept.items()}
    gradients = algebra.rebuild(gradients, known)
    read = uses(gradients)
    return Derived(
        name=cell.name,
        gates=cell.gates,
        states=cell.states,
        tied=tied,
        kept=tuple(kept),
        reads_state=tuple(f"s.{name}" in read for name in cell.states),
        reads_next=tuple(f"next.{name}" in read for name in cell.states),
        step=(*step, *kept.values()),
        gradients=gradients,
    )


# Tracing.


def _read(algebra: Algebra, cell: Cell, shape: tuple[int, ...]) -> tuple[Expr, ...]:
    """Expressions of the next states and of the gradients of `u`, `v` and the states."""
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    decompositions = torch._decomp.core_aten_decompositions()
    activations = [aten.gelu, aten.elu, aten.leaky_relu, aten.hardtanh]
    decompositions.update(torch._decomp.get_decompositions(activations))
    gates, states = len(cell.gates), len(cell.states)

    def sweep(*flat: Tensor) -> tuple[Tensor, ...]:
        u, v, s, dnext = (
            flat[:gates],
            flat[gates : 2 * gates],
            flat[2 * gates : -states],
            flat[-states:],
        )
        out, back = torch.func.vjp(lambda u, v, s: tuple(cell.step(u, v, s)), u, v, s)
        du, dv, ds = back(dnext)
        return (*out, *du, *dv, *ds)

    inputs = [torch.zeros(shape, dtype=torch.float64) for _ in range(2 * gates + 2 * states)]
    try:
        for name, state in zip(cell.states, cell.step(*_parts(inputs, gates, states)), strict=True):
            if state.shape != shape or state.dtype != torch.float64:
                raise Underivable(
                    f"cell {cell.name!r} returned state {name!r} of shape {list(state.shape)} and "
                    f"{state.dtype} where its inputs have {list(shape)} and torch.float64; "
                    "a state must keep the shape and dtype of the inputs"
                )
        traced = make_fx(sweep, decomposition_table=decompositions)(*inputs)
    except RuntimeError as error:
        branches = re.search(r"Boolean value|get value out|scalar|data-dependent", str(error))
        raise Underivable(
            f"cell {cell.name!r} cannot be traced: "
            + (
                "it branches on, or reads, the value of a tensor; choose per unit with torch.where"
                if branches
                else str(error).split("\n")[0]
            )
        ) from error
    labels = [
        *(f"u.{n}" for n in cell.gates),
        *(f"v.{n}" for n in cell.gates),
        *(f"s.{n}" for n in cell.states),
        *(f"dnext.{n}" for n in cell.states),
    ]
    return _Reader(algebra, cell, shape).read(traced, labels)


def _parts(inputs: list[Tensor], gates: int, states: int) -> tuple[list[Tensor], ...]:
    copies = [x.clone() for x in inputs]
    return copies[:gates], copies[gates : 2 * gates], copies[2 * gates : 2 * gates + states]


class _Reader:
    """Turns a traced graph into expressions."""

    def __init__(self, algebra: Algebra, cell: Cell, shape: tuple[int, ...]) -> None:
        self.algebra = algebra
        self.cell = cell
        self.shape = shape
        # One-element lists, shared by aliases, so that in-place operations reach all of them.
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
        """An argument as a number: masks count 1 and 0, as torch promotes them."""
        if isinstance(arg, fx.Node):
            value = self.values[arg][0]
        else:
            value = self.algebra.const(arg)
        if value.op in MASKS:
            return self.algebra.make("where", value, self.algebra.const(1), self.algebra.const(0))
        return value

    def mask(self, arg: Any) -> Expr:
        value = self.values[arg][0] if isinstance(arg, fx.Node) else self.algebra.const(arg)
        return value if value.op in MASKS else self.algebra.make("ne", value, self.algebra.const(0))

    def _captured(self, tensor: Tensor, node: fx.Node) -> Expr:
        made_inside = all("lift_fresh" in str(user.target) for user in node.users)
        if tensor.dim() or not made_inside:
            raise Underivable(
                f"cell {self.cell.name!r} uses a tensor that is none of its arguments; a cell may use "
                "Python numbers, and what differs between units or is learned must arrive through u, v "
                "or a state"
            )
        return self.algebra.const(tensor.item())

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        name = target.overloadpacket.__name__ if hasattr(target, "overloadpacket") else str(target)
        in_place = name.endswith("_") and not name.endswith("__")
        name = name if not in_place else name[:-1]
        shape = tuple(getattr(node.meta.get("val"), "shape", ()))
        if shape not in (self.shape, ()) or (name not in _POINTWISE and name not in _ALIASES):
            raise self._refusal(target, shape)
        if name in _ALIASES:
            self.values[node] = self.values[node.args[0]]
            return
        value = _POINTWISE[name](self, *node.args, **node.kwargs)
        if isinstance(value, str):
            raise Underivable(f"cell {self.cell.name!r} calls {target}: {value}")
        if not in_place:
            self.values[node] = [value]
            return
        place = self.values[node.args[0]]
        if id(place) in self.arguments:
            raise Underivable(
                f"cell {self.cell.name!r} writes into one of its arguments ({target}); "
                "give the result a name of its own"
            )
        place[0] = value
        self.values[node] = place

    def _refusal(self, target: Any, shape: tuple[int, ...]) -> Underivable:
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            what = "is random; noise must arrive through u or a state"
        elif "local_scalar" in str(target):
            what = "reads the value of a tensor; choose per unit with torch.where"
        elif shape not in (self.shape, ()):
            what = "changes the shape, and so mixes units; means, products and the like over units"
            what += " cannot be part of a cell"
        else:
            what = "is not among those that code is derived for"
        return Underivable(
            f"cell {self.cell.name!r} calls {target}, which {what}. A cell may use pointwise "
            f"functions of its gates and states, built of: {', '.join(sorted(_POINTWISE))}"
        )


_Rule = Callable[..., Expr | str]


def _same(op: str) -> _Rule:
    return lambda reader, *args: reader.algebra.make(op, *map(reader.real, args))


def _masks(op: str) -> _Rule:
    return lambda reader, *args: reader.algebra.make(op, *map(reader.mask, args))


def _constant(value: float) -> _Rule:
    return lambda reader, *args, **kwargs: reader.algebra.const(value)


def _add(op: str) -> _Rule:
    def rule(reader: _Reader, x: Any, y: Any, alpha: float = 1) -> Expr:
        make, const = reader.algebra.make, reader.algebra.const
        return make(op, reader.real(x), make("mul", reader.real(y), const(alpha)))

    return rule


def _div(reader: _Reader, x: Any, y: Any, rounding_mode: str | None = None) -> Expr:
    quotient = reader.algebra.make("div", reader.real(x), reader.real(y))
    if rounding_mode is None:
        return quotient
    return _floor(reader, quotient) if rounding_mode == "floor" else _trunc(reader, quotient)


def _floor(reader: _Reader, x: Expr) -> Expr:
    return reader.algebra.make("floor", x)


def _ceil(reader: _Reader, x: Expr) -> Expr:
    make = reader.algebra.make
    return make("neg", make("floor", make("neg", x)))


def _trunc(reader: _Reader, x: Expr) -> Expr:
    make = reader.algebra.make
    below = make("lt", x, reader.algebra.const(0))
    return make("where", below, _ceil(reader, x), _floor(reader, x))


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
        scale = float(torch.tensor(x.constant, dtype=torch.float64).log())
        return reader.algebra.make(
            "exp", reader.algebra.make("mul", y, reader.algebra.const(scale))
        )
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


def _cast(reader: _Reader, x: Any, dtype: torch.dtype | None = None, **_: Any) -> Expr | str:
    if dtype == torch.bool:
        return reader.mask(x)
    came_from = x.meta["val"].dtype
    if dtype in (None, torch.float64, came_from) or not came_from.is_floating_point:
        return reader.real(x)
    return f"a cell computes in one dtype; it may not convert {came_from} to {dtype}"


def _fill(position: int) -> _Rule:
    return lambda reader, *args, **kwargs: reader.real(args[position])


_LOG2, _LOG10 = 1.4426950408889634, 0.4342944819032518
# Operations that give the same tensor anew.
_ALIASES = frozenset({"alias", "detach", "lift_fresh", "view", "_unsafe_view", "expand"})
# torch.ops.aten -> expression; a string in place of one is a reason to refuse.
_POINTWISE: dict[str, _Rule] = {
    **{
        op: _same(op)
        for op in (
            "mul neg lt le gt ge eq ne maximum minimum relu abs sign floor sqrt rsqrt reciprocal "
            "sigmoid tanh exp expm1 log log1p sin cos erf"
        ).split()
    },
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
    "log2": _scaled("log", _LOG2),
    "log10": _scaled("log", _LOG10),
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
    "_to_copy": _cast,
    "clone": lambda reader, x, **_: reader.values[x][0],
    "lift_fresh_copy": lambda reader, x: reader.values[x][0],
    "copy": _fill(1),
    "fill": _fill(1),
    "scalar_tensor": _fill(0),
    "full": _fill(1),
    "full_like": _fill(1),
    "new_full": _fill(2),
    "zeros": _constant(0),
    "zeros_like": _constant(0),
    "new_zeros": _constant(0),
    "ones": _constant(1),
    "ones_like": _constant(1),
    "new_ones": _constant(1),
}


# The rules.


def _tie(
    algebra: Algebra, cell: Cell, traced: tuple[Expr, ...], alike: list[bool]
) -> tuple[tuple[bool, ...], tuple[Expr, ...]]:
    """Replace `v` by the sum `a` and `u` by nothing, for each gate where that is the same cell."""
    tied = list(alike)
    for k, name in enumerate(cell.gates):
        if not tied[k]:
            continue
        u, v, a = (algebra.input(f"{side}.{name}") for side in "uva")
        summed = algebra.rebuild(traced, {u: algebra.const(0), v: a})
        # Equal gradients say nothing about what has none, such as sign(u) or a comparison.
        tied[k] = _agree(algebra, traced, algebra.rebuild(summed, {a: algebra.make("add", u, v)}))
        if tied[k]:
            traced = summed
    return tuple(tied), traced


def _agree(algebra: Algebra, some: tuple[Expr, ...], others: tuple[Expr, ...]) -> bool:
    """Whether two lists of expressions have the same values, at random points of all scales."""
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, 997, dtype=torch.float64)
    inputs = {"": scale}  # gives the shape to constants
    for label in sorted(uses(some) | uses(others)):
        inputs[label] = scale * torch.randn(len(scale), generator=random, dtype=torch.float64)
    left, right = evaluate(some, inputs), evaluate(others, inputs)
    return all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def _without_zero_gradients(algebra: Algebra, gradients: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Drop products of a gradient that is zero by construction, as behind `sign` or `floor`.

    Where the other factor depends on a gradient, the zero is the cell's own and stays.
    """

    def rule(node: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if node.op in ("mul", "div"):
            for zero, other in (args, args[::-1])[: 2 if node.op == "mul" else 1]:
                if zero.constant == 0 and not any(n.startswith("dnext.") for n in uses([other])):
                    return algebra.const(0)
        return None

    return algebra.rebuild(gradients, {}, rule)


def _keep(gradients: tuple[Expr, ...], available: Mapping[Expr, Expr]) -> list[Expr]:
    """The fewest nodes from which, with the states, the gradients follow by arithmetic alone.

    That is a minimum vertex cut between what only the forward step knows (the gates, and the
    values of transcendental functions) and what backward reads; of several, the one nearest to
    the former. Masks cannot be kept.
    """
    order = ordered(gradients, stop=available)
    known: set[Expr] = set(available)  # follows from the states
    backward: set[Expr] = set()  # involves a gradient
    for node in order:
        if any(a in backward for a in node.args) or node.label.startswith("dnext."):
            backward.add(node)
        elif node.op == "const" or node.label.startswith("s."):
            known.add(node)
        elif node.args and all(a in known for a in node.args):
            known.add(node)
    origin, goal = ("origin", 0), ("goal", 0)
    edges: dict[Any, dict[Any, float]] = {origin: {}, goal: {}}

    def connect(a: Any, b: Any, capacity: float) -> None:
        edges.setdefault(a, {})[b] = capacity
        edges.setdefault(b, {}).setdefault(a, 0)

    for node in order:
        if node in known:
            continue
        if node in backward:
            for arg in node.args:
                if arg not in backward and arg not in known:
                    connect((arg, 1), goal, float("inf"))
            continue
        connect((node, 0), (node, 1), float("inf") if node.op in MASKS else 1)
        if not node.args or node.op in TRANSCENDENTAL:
            connect(origin, (node, 0), float("inf"))
        else:
            for arg in node.args:
                if arg not in known:
                    connect((arg, 1), (node, 0), float("inf"))
    while goal in (came := _reach(edges, origin)):
        place = goal
        while place != origin:
            before = came[place]
            edges[before][place] -= 1
            edges[place][before] += 1
            place = before
    return [n for n in order if (n, 0) in came and (n, 1) in edges and (n, 1) not in came]


def _reach(edges: Mapping[Any, Mapping[Any, float]], start: Any) -> dict[Any, Any]:
    """Every place with a way of free capacity from the start, and the place before it."""
    came = {start: start}
    queue = [start]
    for place in queue:
        for after, capacity in edges[place].items():
            if capacity > 0 and after not in came:
                came[after] = place
                queue.append(after)
    return came


def _name(kept: list[Expr], gates: tuple[str, ...]) -> dict[str, Expr]:
    """Names for kept values, in the order of the gates they belong to."""
    claims: list[tuple[int, int, str, Expr]] = []
    for place, node in enumerate(kept):
        near = sorted(_near_gates(node), key=lambda label: gates.index(label[2:]))
        raw = node.op == "input"
        single = near[0] if near and len({label[2:] for label in near}) == 1 else ""
        name = (single if raw else single[2:]) or ""
        rank = len(gates) * 2 if not name else gates.index(single[2:]) + (len(gates) if raw else 0)
        claims.append((rank, place, name, node))
    names: dict[str, Expr] = {}
    for _, _, name, node in sorted(claims, key=lambda claim: claim[:2]):
        if not name or name in names:
            name = next(f"k{i}" for i in range(len(kept) + 1) if f"k{i}" not in names)
        names[name] = node
    return names


def _near_gates(node: Expr) -> set[str]:
    """Inputs of gates that a node depends on other than through a further nonlinearity."""
    found: set[str] = set()
    todo = [node] if node.op == "input" else list(node.args)
    while todo:
        at = todo.pop()
        if at.op == "input" and at.label[:2] in ("u.", "v.", "a."):
            found.add(at.label)
        elif at.op not in TRANSCENDENTAL:
            todo.extend(at.args)
    return found


# Writing.


def struct_name(name: str) -> str:
    """The C++ name of a cell: `gru` is `Gru`, `my_cell-1f` is `MyCell1f`."""
    words = [w for w in re.split(r"[^0-9A-Za-z]+", name) if w]
    camel = "".join(w[0].upper() + w[1:] for w in words)
    return camel if camel and not camel[0].isdigit() else f"Cell{camel}"


def cpp(derived: Derived, name: str | None = None) -> str:
    """The C++ struct of a cell, known to the kernels as `name` (the cell's own by default)."""
    name = name or derived.name
    gates, states, kept = len(derived.gates), len(derived.states), len(derived.kept)
    split = states + kept
    forward = _cpp_body(derived, derived.step, [("next", states), ("kept", kept)])
    backward = _cpp_body(derived, derived.gradients, [("du", gates), ("dv", gates), ("ds", states)])
    assert len(derived.step) == split
    read = uses(derived.step), uses(derived.gradients)

    def parameters(inputs: Iterable[tuple[str, bool]], outputs: Iterable[tuple[str, bool]]) -> str:
        texts = [f"const V* {n if used else f'/*{n}*/'}" for n, used in inputs]
        texts += [f"V* {n if used else f'/*{n}*/'}" for n, used in outputs]
        return ", ".join(texts)

    def reads(side: int, *prefixes: str) -> bool:
        return any(label.split(".")[0] in prefixes for label in read[side])

    forward_parameters = parameters(
        [("u", reads(0, "u")), ("v", reads(0, "v", "a")), ("s", reads(0, "s"))],
        [("next", True), ("kept", kept > 0)],
    )
    backward_parameters = parameters(
        [(n, reads(1, n)) for n in ("kept", "s", "next", "dnext")],
        [(n, True) for n in ("du", "dv", "ds")],
    )
    return f"""\
// {_one_line(derived.name)}: gates {" ".join(derived.gates)}, states {" ".join(derived.states)}; \
keeps {" ".join(derived.kept) or "nothing"}
struct {struct_name(name)} {{
  static constexpr const char* kName = {json.dumps(name)};
  static constexpr int kGates = {gates}, kStates = {states}, kKept = {kept};
  static constexpr bool kTied[kGates] = {_cpp_bools(derived.tied)};
  // What backward reads of the states before and after the step.
  static constexpr bool kReadsState[kStates] = {_cpp_bools(derived.reads_state)};
  static constexpr bool kReadsNext[kStates] = {_cpp_bools(derived.reads_next)};
  // For a tied gate v[g] is the sum of both projections and u[g] is not read.
  template <class V>
  FASTRNN_INLINE static void forward({forward_parameters}) {{
{forward}
  }}
  // For a tied gate du[g] and dv[g] are equal. All reads come before the first write.
  template <class V>
  FASTRNN_INLINE static void backward({backward_parameters}) {{
{backward}
  }}
}};
"""


def _cpp_bools(values: Iterable[bool]) -> str:
    return "{" + ", ".join("true" if v else "false" for v in values) + "}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip("\\")


def _cpp_body(derived: Derived, roots: Sequence[Expr], outputs: Sequence[tuple[str, int]]) -> str:
    places = {
        **{f"{side}.{g}": f"{side}[{k}]" for side in "uv" for k, g in enumerate(derived.gates)},
        **{f"a.{g}": f"v[{k}]" for k, g in enumerate(derived.gates)},
        **{
            f"{side}.{s}": f"{side}[{k}]"
            for side in ("s", "next", "dnext")
            for k, s in enumerate(derived.states)
        },
        **{f"kept.{n}": f"kept[{k}]" for k, n in enumerate(derived.kept)},
    }

    def leaf(node: Expr) -> str:
        return places[node.label] if node.op == "input" else f"splat<V>({_cpp_number(node.label)})"

    # Inputs that are passed on are read before anything is written, since arrays may coincide.
    copies = {r: f"r{k}" for k, r in enumerate(dict.fromkeys(r for r in roots if r.op == "input"))}
    lines, names = write(roots, leaf)
    text = [f"const V {name} = {leaf(node)};" for node, name in copies.items()]
    text += [
        f"const {'auto' if n.op in MASKS else 'V'} {name} = {body};" for n, name, body in lines
    ]
    targets = (f"{array}[{k}]" for array, size in outputs for k in range(size))
    text += [
        f"{target} = {copies.get(root, name)};"
        for target, root, name in zip(targets, roots, names, strict=True)
    ]
    return "\n".join(f"    {line}" for line in text)


def _cpp_number(label: str) -> str:
    value = float(label)
    if value != value:
        return "std::numeric_limits<double>::quiet_NaN()"
    if value in (float("inf"), float("-inf")):
        return ("-" if value < 0 else "") + "std::numeric_limits<double>::infinity()"
    return label


def header(deriveds: Sequence[Derived], names: Sequence[str] | None = None) -> str:
    """The header that `csrc/cell.h` includes: the structs, and their list as `FASTRNN_CELLS(X)`."""
    keys = list(names or (d.name for d in deriveds))
    structs = [struct_name(k) for k in keys]
    if len(set(structs)) != len(structs):
        raise ValueError(f"cells need different names in C++, got {', '.join(structs)}")
    body = "\n".join(cpp(d, k) for d, k in zip(deriveds, keys, strict=True))
    return f"""\
// Generated from fastrnn/cells.py by fastrnn/codegen.py.
#ifndef FASTRNN_CELLS_GEN_H_
#define FASTRNN_CELLS_GEN_H_

#include <limits>

#include "math.h"

namespace fastrnn {{
inline namespace FASTRNN_ISA {{

{body}
}}  // namespace FASTRNN_ISA
}}  // namespace fastrnn

#define FASTRNN_CELLS(X) {" ".join(f"X({s})" for s in structs)}

#endif  // FASTRNN_CELLS_GEN_H_
"""


def write_header(path: str | Path) -> bool:
    """Write the header of all declared cells where it differs from what is there.

    Returns:
        Whether it was written, so that an unchanged one does not cause a rebuild.
    """
    text = header([derive(cells.get(name)) for name in cells.names()])
    target = Path(path)
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return True


def describe(derived: Derived) -> str:
    """What is derived from a cell, as text: equations, tied gates, kept values and costs."""
    places = dict(zip(derived.step, (f"{s}'" for s in derived.states), strict=False))
    forward_names = {
        node: name
        for node, name in zip(derived.step[len(derived.states) :], derived.kept, strict=True)
        if node.args
    } | {node: name for node, name in places.items() if node.args}

    def leaf(node: Expr) -> str:
        if node.op == "const":
            value = float(node.label)
            return f"{value:g}" if float(f"{value:g}") == value else node.label
        kind, name = node.label.split(".", 1)
        return {"s": name, "next": f"{name}'", "dnext": f"d{name}'", "kept": name}.get(
            kind, node.label
        )

    targets: dict[str, Expr] = {}
    count = len(derived.gates)
    du, dv = derived.gradients[:count], derived.gradients[count : 2 * count]
    for name, tied, left, right in zip(derived.gates, derived.tied, du, dv, strict=True):
        targets |= {f"da.{name}": left} if tied else {f"du.{name}": left, f"dv.{name}": right}
    targets |= {
        f"d{name}": g
        for name, g in zip(derived.states, derived.gradients[2 * count :], strict=True)
    }
    forward = _equations(
        {f"{s}'": e for s, e in zip(derived.states, derived.step)}, forward_names, leaf
    )  # noqa: B905
    backward = _equations(targets, {}, leaf)
    tied = [g for g, t in zip(derived.gates, derived.tied, strict=True) if t]
    kept = len(derived.kept)
    lines = [
        f"cell {derived.name}: gates {' '.join(derived.gates)}, states {' '.join(derived.states)}",
        f"tied gates (a = u + v): {' '.join(tied) or 'none'}",
        f"kept per unit and step for backward: {' '.join(derived.kept) or 'nothing'}"
        f" ({4 * kept} bytes in float32)",
        "",
        f"forward ({_cost(derived.step)})",
        *forward,
        "",
        f"backward ({_cost(derived.gradients)})",
        *backward,
    ]
    return "\n".join(lines)


def _equations(
    targets: Mapping[str, Expr], names: Mapping[Expr, str], leaf: Callable[[Expr], str]
) -> list[str]:
    own = {node: name for name, node in reversed(targets.items()) if node.args}
    lines, texts = write(list(targets.values()), leaf, {**own, **names})
    said = {name for _, name, _ in lines}
    rows = [(name, body) for _, name, body in lines]
    rows += [(t, text) for t, text in zip(targets, texts, strict=True) if t not in said]
    pad = max(len(name) for name, _ in rows)
    return [f"  {name:<{pad}} = {body}" for name, body in rows]


def _cost(roots: Sequence[Expr]) -> str:
    done = [n for n in ordered(roots) if n.args]
    dear = sum(n.op in TRANSCENDENTAL for n in done)
    return f"{len(done)} operations, {dear} of them transcendental"


@functools.cache
def key(cell: Cell) -> str:
    """The name under which the kernels know a cell.

    Built-in cells keep theirs. Others get a digest of what was derived from them, or of their byte
    code where nothing could be, so that a cell declared anew never meets old code.
    """
    if cell.name in cells._built_in and cells.get(cell.name) == cell:
        return cell.name
    try:
        text = cpp(derive(cell))
    except Underivable:
        text = repr((cell.gates, cell.states, _code(cell.function)))
    return f"{cell.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _code(function: Any) -> Any:
    """What decides a function's behaviour, without addresses."""
    code: CodeType | None = getattr(function, "__code__", None)
    if code is None:
        return repr(function)

    def content(code: CodeType) -> Any:
        constants = [content(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
        return code.co_code, code.co_names, constants

    captured = [repr(c.cell_contents) for c in function.__closure__ or ()]
    return content(code), captured, repr(function.__defaults__)
