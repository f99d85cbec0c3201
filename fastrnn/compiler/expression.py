"""Pointwise expressions: the compiler's intermediate representation of a cell's arithmetic.

An expression is a graph of immutable nodes. One `Algebra` creates all nodes of a derivation and
never creates two equal ones, so common subexpressions are one object and equality is identity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MASKS",
    "SATURATING",
    "TRANSCENDENTAL",
    "Algebra",
    "Expr",
    "evaluate",
    "ordered",
    "uses",
    "write",
]

# torch's function for every operation; csrc/core/math.h has the C++ function for each.
_TORCH: dict[str, Callable[..., Tensor]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "both": torch.logical_and,
    "either": torch.logical_or,
    "negate": torch.logical_not,
    "where": torch.where,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "relu": torch.relu,
    "abs": torch.abs,
    "sign": torch.sign,
    "floor": torch.floor,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "pow": torch.pow,
}
MASKS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "both", "either", "negate"})
TRANSCENDENTAL = frozenset(
    {"sigmoid", "tanh", "exp", "expm1", "log", "log1p", "sin", "cos", "erf", "pow"}
)
# Of these, functions that flatten out: a rounded argument, however large, hardly moves the value.
SATURATING = frozenset({"sigmoid", "tanh", "erf"})
_COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "eq", "ne", "both", "either"})
_INFIX = {
    "lt": ("<", 1),
    "le": ("<=", 1),
    "gt": (">", 1),
    "ge": (">=", 1),
    "eq": ("==", 1),
    "ne": ("!=", 1),
    "add": ("+", 2),
    "sub": ("-", 2),
    "mul": ("*", 3),
    "div": ("/", 3),
}
_UNARY, _ATOM = 4, 5


@dataclass(frozen=True, eq=False, slots=True)
class Expr:
    """A node: an input, a constant or an operation.

    The label is the name of an input, the value of a constant, or the exponent of `pow`, which is
    always constant.
    """

    op: str
    args: tuple[Expr, ...] = ()
    label: str = ""

    @property
    def constant(self) -> float | None:
        return float(self.label) if self.op == "const" else None


class Algebra:
    """Creates expressions, simplified and without duplicates.

    Simplification changes no value, for finite, infinite or NaN inputs, except the sign of a zero.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[Expr, ...], str], Expr] = {}

    def input(self, label: str) -> Expr:
        return self._intern("input", (), label)

    def const(self, value: float) -> Expr:
        return self._intern("const", (), repr(float(value)))

    def make(self, op: str, *args: Expr, label: str = "") -> Expr:
        return self._simpler(op, args, label) or self._intern(op, args, label)

    def pow(self, x: Expr, exponent: float) -> Expr:
        """`x ** exponent`; small integer and half exponents need no `pow`, as in torch."""
        if exponent == 0:
            return self.const(1)
        if exponent < 0 and -exponent in (0.5, 1, 2, 3):
            return self.make(
                "rsqrt" if exponent == -0.5 else "reciprocal", self.pow(x, max(1, -exponent))
            )
        if exponent == 0.5:
            return self.make("sqrt", x)
        if exponent in (1, 2, 3):
            return x if exponent == 1 else self.make("mul", self.pow(x, exponent - 1), x)
        return self.make("pow", x, label=repr(float(exponent)))

    def rebuild(
        self,
        roots: Sequence[Expr],
        known: Mapping[Expr, Expr],
        rule: Callable[[Expr, tuple[Expr, ...]], Expr | None] | None = None,
    ) -> tuple[Expr, ...]:
        """The roots with the nodes of `known` replaced, simplified again.

        `rule(node, args)` may return another node in the place of `node` with its new arguments.
        """
        new = dict(known)
        for node in ordered(roots, stop=known):
            args = tuple(new[a] for a in node.args)
            replacement = rule(node, args) if rule else None
            if replacement is None:
                replacement = self.make(node.op, *args, label=node.label) if args else node
            new[node] = replacement
        return tuple(new[r] for r in roots)

    def _intern(self, op: str, args: tuple[Expr, ...], label: str) -> Expr:
        if op in _COMMUTATIVE:
            swapped = self._made.get((op, args[::-1], label))
            if swapped is not None:
                return swapped
        return self._made.setdefault((op, args, label), Expr(op, args, label))

    def _simpler(self, op: str, args: tuple[Expr, ...], label: str) -> Expr | None:
        """A simpler node with the same value, or None."""
        values = [a.constant for a in args]
        if op == "where":
            return self._simpler_where(*args)
        if op == "negate":
            return args[0].args[0] if args[0].op == "negate" else None
        if args and op not in MASKS and all(v is not None for v in values):
            inputs = {
                str(k): torch.tensor(v, dtype=torch.float64, device="cpu")
                for k, v in enumerate(values)
            }
            raw = Expr(op, tuple(Expr("input", (), k) for k in inputs), label)
            return self.const(evaluate([raw], inputs)[0].item())
        if op == "neg":
            return args[0].args[0] if args[0].op == "neg" else None
        if op in ("add", "sub", "mul", "div"):
            return self._simpler_arithmetic(op, *args)
        return None

    def _simpler_where(self, mask: Expr, yes: Expr, no: Expr) -> Expr | None:
        if yes is no:
            return yes
        if mask.op == "negate":
            return self.make("where", mask.args[0], no, yes)
        return None

    def _simpler_arithmetic(self, op: str, x: Expr, y: Expr) -> Expr | None:
        a, b = x.constant, y.constant
        if op in ("add", "sub") and b == 0:
            return x
        if op == "add":
            if a == 0:
                return y
            if y.op == "neg":
                return self.make("sub", x, y.args[0])
            if x.op == "neg":
                return self.make("sub", y, x.args[0])
        elif op == "sub":
            if a == 0:
                return self.make("neg", y)
            if y.op == "neg":
                return self.make("add", x, y.args[0])
        else:
            if b == 1:
                return x
            if op == "mul" and a == 1:
                return y
            if b == -1 or (op == "mul" and a == -1):
                return self.make("neg", x if b == -1 else y)
            if op == "div" and a == 1:
                return self.make("reciprocal", y)
            if op == "div" and b and abs(math.frexp(b)[0]) == 0.5 and 1e-30 < abs(b) < 1e30:
                return self.make("mul", x, self.const(1 / b))
            for k, side in enumerate((x, y)):  # signs move outward, where sums absorb them
                if side.op == "neg":
                    unsigned = (side.args[0], y) if k == 0 else (x, side.args[0])
                    return self.make("neg", self.make(op, *unsigned))
        return None


def ordered(roots: Iterable[Expr], stop: Mapping[Expr, Any] | None = None) -> list[Expr]:
    """All nodes that the roots depend on, arguments first, without those in `stop` and below."""
    order: dict[Expr, None] = {}
    left_out = stop or {}
    pending = [root for root in reversed(list(roots)) if root not in left_out]
    while pending:
        waiting = [a for a in pending[-1].args if a not in order and a not in left_out]
        if waiting:
            pending.extend(reversed(waiting))
        else:
            order.setdefault(pending.pop())
    return list(order)


def uses(roots: Iterable[Expr]) -> set[str]:
    """Labels of the inputs that the roots depend on."""
    return {node.label for node in ordered(roots) if node.op == "input"}


def evaluate(roots: Sequence[Expr], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Values of the roots, in the shape, dtype and device of the inputs; an input that the roots do
    not depend on may be smaller."""
    # Not the one with most numbers: none is left of a batch of 0, but of the parameters.
    like = max(inputs.values(), key=lambda each: (each.dim(), *each.shape))
    values: dict[Expr, Tensor] = {}
    for node in ordered(roots):
        if node.op == "input":
            values[node] = inputs[node.label]
        elif node.constant is not None:
            values[node] = like.new_full((), node.constant)
        else:
            args: list[Any] = [values[a] for a in node.args]
            if node.op == "pow":
                args.append(float(node.label))
            values[node] = _TORCH[node.op](*args)
    return [values[r].expand(like.shape) for r in roots]


def write(
    roots: Sequence[Expr],
    leaf: Callable[[Expr], str],
    names: Mapping[Expr, str] | None = None,
    width: int = 72,
) -> tuple[list[tuple[Expr, str, str]], list[str]]:
    """Assignments `(node, name, text)` in order of evaluation, and the texts of the roots.

    Args:
        leaf: text of an input or constant.
        names: names for chosen nodes. Other nodes that are used twice, are roots, or are longer
            than `width` characters get the names `t0`, `t1`, ...
    """
    chosen = names or {}
    order = ordered(roots)
    count = dict.fromkeys(order, 0)
    for node in order:
        for arg in node.args:
            count[arg] += 1
    named = {*chosen, *roots}
    lines: list[tuple[Expr, str, str]] = []
    text: dict[Expr, tuple[str, int]] = {}

    def operand(node: Expr, level: int) -> str:
        body, own = text[node]
        return f"({body})" if own < level else body

    def assign(node: Expr) -> None:
        taken = sum(1 for _, name, _ in lines if name[0] == "t" and name[1:].isdigit())
        name = chosen.get(node) or f"t{taken}"
        lines.append((node, name, text[node][0]))
        text[node] = (name, _ATOM)

    for node in order:
        if not node.args:
            text[node] = (leaf(node), _ATOM)
            continue
        if node.op in _INFIX:
            symbol, level = _INFIX[node.op]
            left, right = node.args
            text[node] = (f"{operand(left, level)} {symbol} {operand(right, level + 1)}", level)
        elif node.op == "neg":
            text[node] = (f"-{operand(node.args[0], _UNARY + 1)}", _UNARY)
        else:
            args = [operand(a, 0) for a in node.args] + ([node.label] if node.op == "pow" else [])
            text[node] = (f"{node.op}({', '.join(args)})", _ATOM)
        if node in named or count[node] > 1 or len(text[node][0]) > width:
            assign(node)
    return lines, [operand(r, 0) for r in roots]
