"""Chooses the values that a step saves for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fastrnn.compiler.cut import GRADIENT_RESULTS
from fastrnn.compiler.expression import MASKS, SATURATING, TRANSCENDENTAL, Expr, ordered

__all__ = ["GRADIENTS", "named", "saved_values"]

# The price of saving a value, and of computing a function again: a processor takes about as long
# for both, so this pays where it saves at least as many values.
_VALUE, _AGAIN = 1000, 999

# Labels of inputs that only the backward pass has.
GRADIENTS = ("dnext.", "back.", *GRADIENT_RESULTS)


def saved_values(gradients: Sequence[Expr], available: Mapping[Expr, Expr]) -> list[Expr]:
    """The fewest nodes from which, with the states and the results of reductions, the gradients
    follow by arithmetic, and by saturating functions if each of those spares a saved value. Others
    are not computed again: of a saved argument that is rounded to 16 bits, exp may be far off.

    They are a minimum vertex cut between the nodes that only the forward step knows (gates and
    values of transcendental functions) and the nodes that the backward pass reads. If there are
    several such cuts, it is the one nearest to the former. Masks cannot be saved.
    """
    order = ordered(gradients, stop=available)
    known: set[Expr] = set(available)  # follows from the states
    backward: set[Expr] = set()  # involves a gradient
    for node in order:
        if any(a in backward for a in node.args) or node.label.startswith(GRADIENTS):
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
        connect((node, 0), (node, 1), float("inf") if node.op in MASKS else _VALUE)
        if node.op in SATURATING:
            connect(origin, (node, 0), _AGAIN)
        elif not node.args or node.op in TRANSCENDENTAL:
            connect(origin, (node, 0), float("inf"))
        for arg in node.args:
            if arg not in known:
                connect((arg, 1), (node, 0), float("inf"))
    for node in gradients:  # operands of products, which no gradient is part of
        if node not in backward and node not in known and node in order:
            connect((node, 1), goal, float("inf"))
    while goal in (came := _reach(edges, origin)):
        way, place = [], goal
        while place != origin:
            way.append((came[place], place))
            place = came[place]
        flow = min(edges[a][b] for a, b in way)
        for a, b in way:
            edges[a][b] -= flow
            edges[b][a] += flow
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


def named(
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
