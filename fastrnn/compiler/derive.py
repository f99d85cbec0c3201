"""Derives from a cell's function its derivative and the values saved for the backward pass.

The function and its vector-Jacobian product are traced once (`trace.py`) into pointwise expressions
(`expression.py`). Two rules then shape them:

- **summed**: if the gradients of a gate's `u` and `v` are the same node, the cell depends only on
  their sum `a`, and one array serves both.
- **saved**: the backward pass gets the states before and after the step, and recomputes whatever
  follows from them. A step saves the fewest other values from which the gradients follow by
  arithmetic alone, without a transcendental function.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrnn.cells import Cell
from fastrnn.compiler.expression import (
    MASKS,
    TRANSCENDENTAL,
    Algebra,
    Expr,
    evaluate,
    ordered,
    uses,
)
from fastrnn.compiler.trace import Underivable, trace

__all__ = ["Derived", "Underivable", "derive"]

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, eq=False)
class Derived:
    """Everything that is derived from a cell's function.

    Attributes:
        name, gates, states, params: the cell's; of the parameters, the names.
        shared: per parameter, whether all units share one number.
        summed: per gate, whether the cell depends on `u + v` alone.
        saved: names of the values saved per unit and step for the backward pass: a gate's name for
            its value after the nonlinearity, `v.n` or `u.n` for a raw projection, `a.n` for their
            sum.
        projectable: whether state 0 enters a step through `v` alone, so that it may be projected
            to another width between the steps.
        step: expressions of the next states and the saved values.
        gradients: expressions of the gradients of `u`, `v`, the states and the parameters; those
            of parameters are to be summed over steps and rows.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    params: tuple[str, ...]
    shared: tuple[bool, ...]
    summed: tuple[bool, ...]
    saved: tuple[str, ...]
    projectable: bool
    step: tuple[Expr, ...]
    gradients: tuple[Expr, ...]

    @property
    def summary(self) -> str:
        """One line for the head of generated code."""
        name = " ".join(self.name.split()).rstrip("\\")
        gates, states, saved = (" ".join(names) for names in (self.gates, self.states, self.saved))
        learned = f", parameters {' '.join(self.params)}" if self.params else ""
        return f"{name}: gates {gates}, states {states}{learned}; saves {saved or 'nothing'}"

    def tape_width(self, projected: bool) -> int:
        """Values per unit in a row of the tape: the states after the first, the saved values and,
        if `projected`, state 0 before the projection."""
        return len(self.states) - 1 + len(self.saved) + projected

    def places(self, after: str = "next", dafter: str = "dnext") -> dict[str, str]:
        """The array element in generated code for each input of the expressions. `after` and
        `dafter` name the arrays of the states after the step and of their gradients."""
        arrays = {"u": self.gates, "v": self.gates, "a": self.gates, "saved": self.saved}
        arrays["p"] = self.params
        arrays |= dict.fromkeys(("s", "next", "dnext"), self.states)
        named = {"a": "v", "next": after, "dnext": dafter}
        return {
            f"{array}.{name}": f"{named.get(array, array)}[{k}]"
            for array, names in arrays.items()
            for k, name in enumerate(names)
        }

    def forward(
        self,
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        s: Sequence[Tensor],
        p: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step on tensors of one shape, one per gate and state, and on parameters that may be
        smaller. Returns `(next, saved)`.

        State 0 of a projectable cell may have any shape.
        """
        inputs = _labelled("s", self.states, s) | _labelled("p", self.params, p)
        if self.projectable:
            del inputs[f"s.{self.states[0]}"]
        for name, summed, left, right in zip(self.gates, self.summed, u, v, strict=True):
            if summed:
                inputs[f"a.{name}"] = left + right
            else:
                inputs |= {f"u.{name}": left, f"v.{name}": right}
        out = evaluate(self.step, inputs)
        return out[: len(self.states)], out[len(self.states) :]

    def backward(
        self,
        saved: Sequence[Tensor],
        s: Sequence[Tensor],
        next: Sequence[Tensor],
        dnext: Sequence[Tensor],
        p: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients `(du, dv, ds, dp)` of that step, from the gradients `dnext` of its next states.
        Those of parameters have a number for each row and unit."""
        inputs = _labelled("s", self.states, s) | _labelled("p", self.params, p)
        inputs |= _labelled("next", self.states, next)
        inputs |= _labelled("dnext", self.states, dnext)
        inputs |= _labelled("saved", self.saved, saved)
        du, dv, ds, dp = self.grouped(evaluate(self.gradients, inputs))
        return list(du), list(dv), list(ds), list(dp)

    def grouped(self, gradients: Sequence[_Entry]) -> tuple[Sequence[_Entry], ...]:
        """Gradients of `u`, of `v`, of the states and of the parameters, from all in this order."""
        gates = len(self.gates)
        ends = gates, 2 * gates, 2 * gates + len(self.states)
        return tuple(gradients[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True))


def _labelled(kind: str, names: Sequence[str], values: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": value for name, value in zip(names, values, strict=True)}


def derive(cell: Cell) -> Derived:
    """Derive everything from a cell, once per cell.

    Raises:
        Underivable: if the function is not a pointwise formula; the message says why.
    """
    derived = _derive(cell)
    if isinstance(derived, Underivable):
        raise Underivable(*derived.args) from derived.__cause__
    return derived


@functools.cache
def _derive(cell: Cell) -> Derived | Underivable:
    if torch.version.cuda:
        # Without this call, torch 2.11 for CUDA crashes in the second such thread without a GPU.
        torch._C._ensureCUDADeviceGuardSet()
    # A new thread has none of the caller's modes: autocast, fake tensors, functorch levels. The
    # fork gives back the random numbers that the cell draws while it is traced.
    with ThreadPoolExecutor(1) as alone, torch.random.fork_rng(devices=[]):
        try:
            return alone.submit(_derive_here, cell).result()
        except Underivable as reason:
            return reason


def _derive_here(cell: Cell) -> Derived:
    algebra = Algebra()
    traced = trace(algebra, cell)
    count, states = len(cell.gates), len(cell.states)
    du, dv = traced[states : states + count], traced[states + count : states + 2 * count]
    summed, traced = _sum_gates(
        algebra, cell, traced, [a is b for a, b in zip(du, dv, strict=True)]
    )
    step, gradients = traced[:states], traced[states:]
    gradients = _without_zero_gradients(algebra, gradients)
    available = {
        node: algebra.input(f"next.{name}")
        for node, name in reversed(list(zip(step, cell.states, strict=True)))
        if node.op != "const" and not node.label.startswith("s.")
    }
    saved = _name(_saved_values(gradients, available), available, cell.gates)
    known = available | {node: algebra.input(f"saved.{name}") for name, node in saved.items()}
    gradients = algebra.rebuild(gradients, known)
    first = f"s.{cell.states[0]}"
    return Derived(
        name=cell.name,
        gates=cell.gates,
        states=cell.states,
        params=tuple(cell.params),
        shared=tuple(param.kind == "one" for param in cell.params.values()),
        summed=summed,
        saved=tuple(saved),
        projectable=first not in uses([*gradients, *step, *saved.values()])
        and gradients[2 * count].constant == 0,
        step=(*step, *saved.values()),
        gradients=gradients,
    )


# The rules.


def _sum_gates(
    algebra: Algebra, cell: Cell, traced: tuple[Expr, ...], alike: list[bool]
) -> tuple[tuple[bool, ...], tuple[Expr, ...]]:
    """Replace `v` by the sum `a`, and `u` by 0, for each gate where that leaves the cell the same.
    `alike` tells the gates whose gradients of `u` and `v` are the same node."""
    summed = list(alike)
    for k, name in enumerate(cell.gates):
        if not summed[k]:
            continue
        u, v, a = (algebra.input(f"{side}.{name}") for side in "uva")
        reduced = algebra.rebuild(traced, {u: algebra.const(0), v: a})
        # Equal gradients prove nothing about functions without one, such as sign or a comparison.
        summed[k] = _agree(
            algebra, traced, algebra.rebuild(reduced, {a: algebra.make("add", u, v)})
        )
        if summed[k]:
            traced = reduced
    return tuple(summed), traced


def _agree(algebra: Algebra, some: tuple[Expr, ...], others: tuple[Expr, ...]) -> bool:
    """Whether two lists of expressions have the same values at random points of all scales."""
    cpu: Any = {"dtype": torch.float64, "device": "cpu"}
    random = torch.Generator("cpu").manual_seed(0)
    scale = torch.logspace(-3, 3, 997, **cpu)
    inputs = {"": scale}  # gives the shape to constants
    for label in sorted(uses(some) | uses(others)):
        inputs[label] = scale * torch.randn(len(scale), generator=random, **cpu)
    left, right = evaluate(some, inputs), evaluate(others, inputs)
    return all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def _without_zero_gradients(algebra: Algebra, gradients: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Drop products with a gradient that is zero by construction, as behind `sign` or `floor`.

    If the other factor depends on a gradient, the zero is the cell's own and the product stays.
    """

    def rule(node: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if node.op in ("mul", "div"):
            for zero, other in (args, args[::-1])[: 2 if node.op == "mul" else 1]:
                if zero.constant == 0 and not any(n.startswith("dnext.") for n in uses([other])):
                    return algebra.const(0)
        return None

    return algebra.rebuild(gradients, {}, rule)


def _saved_values(gradients: tuple[Expr, ...], available: Mapping[Expr, Expr]) -> list[Expr]:
    """The fewest nodes from which, with the states, the gradients follow by arithmetic alone.

    They are a minimum vertex cut between the nodes that only the forward step knows (gates and
    values of transcendental functions) and the nodes that the backward pass reads. If there are
    several such cuts, it is the one nearest to the former. Masks cannot be saved.
    """
    order = ordered(gradients, stop=available)
    known: set[Expr] = set(available)  # follows from the states
    backward: set[Expr] = set()  # involves a gradient
    for node in order:
        if any(a in backward for a in node.args) or node.label.startswith("dnext."):
            backward.add(node)
        elif all(a in known for a in node.args) and node.label[:2] not in ("u.", "v.", "a."):
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
    """Every node that a path of free capacity from the start reaches, with its predecessor."""
    came = {start: start}
    queue = [start]
    for place in queue:
        for after, capacity in edges[place].items():
            if capacity > 0 and after not in came:
                came[after] = place
                queue.append(after)
    return came


def _name(
    saved: list[Expr], available: Mapping[Expr, Expr], gates: tuple[str, ...]
) -> dict[str, Expr]:
    """Names for saved values, in the order of the gates that they belong to."""
    claims: list[tuple[int, int, str, Expr]] = []
    for place, node in enumerate(saved):
        near = sorted(_near_gates(node, available), key=lambda label: gates.index(label[2:]))
        raw = node.op == "input"
        single = near[0] if near and len({label[2:] for label in near}) == 1 else ""
        name = (single if raw else single[2:]) or ""
        rank = len(gates) * 2 if not name else gates.index(single[2:]) + (len(gates) if raw else 0)
        claims.append((rank, place, name, node))
    names: dict[str, Expr] = {}
    for _, _, name, node in sorted(claims, key=lambda claim: claim[:2]):
        if not name or name in names:
            name = next(f"k{i}" for i in range(len(saved) + 1) if f"k{i}" not in names)
        names[name] = node
    return names


def _near_gates(node: Expr, available: Mapping[Expr, Expr]) -> set[str]:
    """Gate inputs that a node depends on through no nonlinearity, or else through one."""

    @functools.cache
    def within(at: Expr, nonlinearities: int) -> frozenset[str]:
        if at.op == "input" and at.label[:2] in ("u.", "v.", "a."):
            return frozenset({at.label})
        left = nonlinearities - (at.op in TRANSCENDENTAL)
        if left < 0 or at in available:
            return frozenset()
        return frozenset().union(*(within(arg, left) for arg in at.args))

    return set(within(node, 0) or within(node, 1))
