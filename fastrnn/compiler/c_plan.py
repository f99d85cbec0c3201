"""What the C of a cell looks like: the array of its gates, its products, reductions and stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastrnn.compiler.c import can_be_a_member
from fastrnn.compiler.derive import Derived, forward_exchanges
from fastrnn.compiler.expression import MASKS, Algebra, Expr, ordered, uses
from fastrnn.compiler.stages import Exchange, Stage, schedule
from fastrnn.compiler.through_cuts import needed

__all__ = ["Plan", "Product", "Reduction", "Weights", "parts_of", "plan_of"]


class Weights(Protocol):
    """The weights of one recurrence in torch's layout, as `kernels.operands.Weights`: float32, or
    int8 matrices."""

    @property
    def w_ih(self) -> Tensor: ...
    @property
    def w_hh(self) -> Tensor: ...
    @property
    def b_ih(self) -> Tensor | None: ...
    @property
    def b_hh(self) -> Tensor | None: ...
    @property
    def w_hr(self) -> Tensor | None: ...
    @property
    def params(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Product:
    """The recurrent weights of some gates times a value of the step.

    Attributes:
        name: of its matrix: `hh`, or `hh_0`, `hh_1`, ... for other values than state 0.
        gates: indices of the gates, in the order of its columns.
        block: the first of its gates in the array of gates.
        operand: the temporary that it multiplies; None for state 0.
        stage: it is complete before this stage.
    """

    name: str
    gates: tuple[int, ...]
    block: int
    operand: int | None = None
    stage: int = 0


@dataclass(frozen=True)
class Reduction:
    """A reduction of values of all units.

    Attributes:
        kind: "sum", "amax" or "moments".
        results: its labels; those of moments are the mean and the sum of squared deviations.
        sources: labels of the arrays that it reads: gates, temporaries, or `part.x` for the result
            x of a sum or maximum.
        stage: it is complete before this stage.
    """

    kind: str
    results: tuple[str, ...]
    sources: tuple[str, ...]
    stage: int


@dataclass(frozen=True)
class Plan:
    """What the C of a cell looks like.

    The array of gates has `H` numbers for each of: `u` of the gates that are not summed, the summed
    gates, and `v` of the gates that are not summed. So the product of the input, and that of state
    0, write into contiguous columns, and columns that a cell does not read are left out.

    Attributes:
        layers, heads: their numbers.
        inputs, hidden, output: `I` of the first layer, and of one head `H` and `Q`.
        biased, rounded: whether there are biases, and whether matrices are int8 with scales.
        projected: whether state 0 is projected to `Q` numbers.
        labels: the inputs that the array of gates holds: `u.i`, `a.i` for a summed gate, `v.i`.
        from_x: indices of the gates in a row of the input weights.
        products, reductions: those of a step, in order.
        stages: their outputs are `next.s` of the states, `temp.k` and `part.x`.
        temporaries: arrays that a stage writes for later ones.
        parts: arrays for what sums and maxima of one stage reduce.
        held: indices of the states that a later stage still reads when the next are known.
        units, shared: expressions of the learned parameters alone, which export computes: those
            with a number for each unit, which are `unit.k`, and those with one for all, `shared.k`.
        members: names of the states in the public struct.
    """

    layers: int
    heads: int
    inputs: int
    hidden: int
    output: int
    biased: bool
    rounded: bool
    projected: bool
    labels: tuple[str, ...]
    from_x: tuple[int, ...]
    products: tuple[Product, ...]
    reductions: tuple[Reduction, ...]
    stages: tuple[Stage, ...]
    temporaries: int
    parts: int
    held: tuple[int, ...]
    units: tuple[Expr, ...]
    shared: tuple[Expr, ...]
    members: tuple[str, ...]

    @property
    def columns(self) -> int:
        """The most columns of a matrix, in blocks of `H`, if sums of int8 need an array."""
        widths = [len(self.from_x), self.projected, *(len(p.gates) for p in self.products)]
        return max(widths) if self.rounded else 0

    @property
    def stack(self) -> int:
        """Bytes of the arrays of a step."""
        blocks = len(self.labels) + self.projected + self.columns
        return 4 * self.hidden * (blocks + self.temporaries + self.parts + len(self.held))


def plan_of(derived: Derived, layers: Sequence[Weights], heads: int) -> Plan:
    """The plan of layers that have the weights of their heads side by side."""
    first = layers[0]
    hidden = first.w_ih.size(0) // len(derived.inputs)
    algebra = Algebra()
    units, shared, step, exchanges = _without_params(algebra, derived, hidden)
    program = schedule(algebra, step, exchanges)
    formulas = [e for stage in program.stages for e in (*stage.rows, *stage.outputs.values())]
    read = uses(formulas).union(*program.sources)
    begun = list(zip(exchanges, program.begins, program.sources, strict=True))
    labels, products = _products(derived, read, begun)
    from_x = [label.split(".", 1) for label in labels if label[0] in "ua"]
    return Plan(
        layers=len(layers) // heads,
        heads=heads,
        inputs=first.w_ih.size(1),
        hidden=hidden,
        output=first.w_hh.size(1),
        biased=first.b_ih is not None,
        rounded=first.w_ih.dtype == torch.int8,
        projected=first.w_hr is not None,
        labels=tuple(labels),
        from_x=tuple(derived.gates.index(gate) for _, gate in from_x),
        products=tuple(products),
        reductions=tuple(
            Reduction(x.kind, x.results, sources or (f"part.{x.results[0]}",), stage)
            for x, stage, sources in begun
            if x.kind != "product"
        ),
        stages=program.stages,
        temporaries=program.temporaries,
        parts=max(len(parts_of(stage)) for stage in program.stages),
        held=_held(derived, program.stages),
        units=units,
        shared=shared,
        members=tuple(
            state if can_be_a_member(state) else f"state_{k}"
            for k, state in enumerate(derived.states)
        ),
    )


def parts_of(stage: Stage) -> list[str]:
    """Labels of what the sums and maxima behind a stage reduce."""
    return [label for label in stage.outputs if label.startswith("part.")]


def _products(
    derived: Derived, read: Set[str], begun: Iterable[tuple[Exchange, int, Sequence[str]]]
) -> tuple[list[str], list[Product]]:
    """The labels of the array of gates, and the products with recurrent weights."""
    sites = [
        ([label.split(".", 1)[1] for label in x.results], int(sources[0].split(".")[1]), stage)
        for x, stage, sources in begun
        if x.kind == "product"
    ]
    moved = {gate for gates, _, _ in sites for gate in gates}
    rest = [gate for gate in derived.gates if gate not in moved]
    products: list[Product] = []

    def of(kind: str, gates: Iterable[str]) -> list[str]:
        return [f"{kind}.{gate}" for gate in gates if f"{kind}.{gate}" in read]

    def add(columns: list[str], operand: int | None = None, stage: int = 0) -> None:
        if columns:
            name = "hh" if operand is None else f"hh_{len(products)}"
            gates = tuple(derived.gates.index(label.split(".", 1)[1]) for label in columns)
            products.append(Product(name, gates, len(labels), operand, stage))
            labels.extend(columns)

    labels = of("u", derived.gates)
    for gates, operand, stage in sites:
        add(of("a", gates), operand, stage)
    add([*of("a", rest), *of("v", rest)])
    for gates, operand, stage in sites:
        add(of("v", gates), operand, stage)
    return labels, products


def _held(derived: Derived, stages: Sequence[Stage]) -> tuple[int, ...]:
    """The states that a stage reads after another has computed the next."""
    found = []
    for k, state in enumerate(derived.states):
        made = next(n for n, stage in enumerate(stages) if f"next.{state}" in stage.outputs)
        later = [e for stage in stages[made + 1 :] for e in stage.outputs.values()]
        if f"s.{state}" in uses(later):
            found.append(k)
    return tuple(found)


def _without_params(
    algebra: Algebra, derived: Derived, hidden: int
) -> tuple[tuple[Expr, ...], tuple[Expr, ...], dict[str, Expr], list[Exchange]]:
    """The largest expressions of learned parameters alone, of those with a number for each unit and
    of those without; and the step and its exchanges, in which they are the inputs `unit.k` and
    `shared.k`, and the number of units is a constant."""
    exchanges = needed(forward_exchanges(algebra, derived), derived.step[: len(derived.states)])
    roots = [*derived.step[: len(derived.states)], *(e for x in exchanges for e in x.operands)]
    count = {node: algebra.const(hidden) for node in ordered(roots) if node.label == "count"}
    roots = list(algebra.rebuild(roots, count))
    kinds = {f"p.{n}": one for n, one in zip(derived.params, derived.shared, strict=True)}
    order = ordered(roots)
    below = {node: uses([node]) for node in order}

    def is_learned(node: Expr) -> bool:
        return bool(below[node]) and below[node] <= set(kinds) and node.op not in MASKS

    wanted = [a for node in order if not is_learned(node) for a in node.args if is_learned(a)]
    chosen = dict.fromkeys([*wanted, *(root for root in roots if is_learned(root))])
    shared = [node for node in chosen if all(kinds[label] for label in below[node])]
    units = [node for node in chosen if node not in shared]
    known = {node: algebra.input(f"unit.{k}") for k, node in enumerate(units)}
    known |= {node: algebra.input(f"shared.{k}") for k, node in enumerate(shared)}
    made = iter(algebra.rebuild(roots, known))
    step = {f"next.{state}": next(made) for state in derived.states}
    exchanges = [
        Exchange(x.kind, x.results, tuple(itertools.islice(made, len(x.operands))))
        for x in exchanges
    ]
    return tuple(units), tuple(shared), step, exchanges
