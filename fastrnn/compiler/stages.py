"""Cuts a step into stages.

A *stage* begins with what needs all units of a row (products of the recurrent weights, completed
reductions) and goes on with pointwise formulas. What follows from k such exchanges one after the
other is computed in stage k, so there are as few stages as the formulas allow. A value that one
stage computes and a later one reads is a *temporary*, unless it is cheap to compute again. Formulas
of numbers that all units of a row share are *row formulas*: a stage computes them once a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastrnn.compiler.cut import GRADIENT_RESULTS, RESULTS
from fastrnn.compiler.expression import MASKS, TRANSCENDENTAL, Algebra, Expr, ordered

__all__ = ["Exchange", "Program", "Stage", "schedule"]

# Labels of inputs that have one number for each row.
_ROW = ("count", *RESULTS, *GRADIENT_RESULTS)
# A value that more operations lead to is not computed again, but a temporary.
_CHEAP = 2
_DEAR = TRANSCENDENTAL | {"div", "sqrt", "rsqrt", "reciprocal"}


@dataclass(frozen=True)
class Exchange:
    """What needs all units of a row.

    Attributes:
        kind: "product", "transposed" (a product in the backward pass), "sum", "amax" or "moments".
        results: labels of the inputs that it gives to later stages.
        operands: what it reads: of "product" and "moments", whole values; of "sum" and "amax", one
            value that is reduced; of "transposed", gradients of `v` that are results anyway.
    """

    kind: str
    results: tuple[str, ...]
    operands: tuple[Expr, ...]


@dataclass(frozen=True)
class Stage:
    """A stage: `rows` are formulas of the inputs with one number for each row, computed first, and
    are the inputs `row.0`, `row.1`, ... of `outputs`, the pointwise formulas by label."""

    rows: tuple[Expr, ...] = ()
    outputs: Mapping[str, Expr] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A step as stages.

    Attributes:
        stages: in order. Outputs are the given ones, `temp.k`, and `part.x` for the value that a
            sum or maximum with the result x reduces.
        temporaries: their number; a later stage reads number k as the input `temp.k`.
        begins: the stage before which each exchange is complete.
        sources: for "product" and "moments", the labels of their operands: a temporary, or an input
            that lies in memory.
    """

    stages: tuple[Stage, ...]
    temporaries: int
    begins: tuple[int, ...]
    sources: tuple[tuple[str, ...], ...]


def schedule(
    algebra: Algebra, outputs: Mapping[str, Expr], exchanges: Sequence[Exchange]
) -> Program:
    """The program that computes `outputs` with these exchanges, each after those it depends on."""
    return _Schedule(algebra, outputs, exchanges).program()


class _Schedule:
    def __init__(
        self, algebra: Algebra, outputs: Mapping[str, Expr], exchanges: Sequence[Exchange]
    ) -> None:
        self.algebra, self.exchanges = algebra, exchanges
        self.came: dict[str, int] = {}  # the stage that an exchange's result comes before
        self.levels: dict[Expr, int] = {}
        self.row: dict[Expr, bool] = {}
        self.temporaries: dict[Expr, int] = {}
        self.begins: list[int] = []
        for exchange in exchanges:
            after = 1 + max(map(self.level, exchange.operands))
            self.begins.append(after)
            self.came.update(dict.fromkeys(exchange.results, after))
            self.levels.clear()
        count = 1 + max([self.level(e) for e in outputs.values()] + self.begins)
        self.targets: list[dict[str, Expr]] = [{} for _ in range(count)]
        for label, expr in outputs.items():
            self.targets[self.level(expr)][label] = expr

    def program(self) -> Program:
        pairs = zip(self.exchanges, self.begins, strict=True)
        sources = tuple(self.sources(exchange, after) for exchange, after in pairs)
        for stage in range(1, len(self.targets)):
            self.find_crossing(stage)
        self.move_copies()
        stages = tuple(self.stage(k) for k in range(len(self.targets)))
        return Program(stages, len(self.temporaries), tuple(self.begins), sources)

    def level(self, node: Expr) -> int:
        """The stage in which a value is first known."""
        for n in ordered([node], stop=self.levels):
            self.levels[n] = max(
                (self.levels[a] for a in n.args), default=self.came.get(n.label, 0)
            )
        return self.levels[node]

    def is_row(self, node: Expr) -> bool:
        """Whether a value is one number for each row; constants are not."""
        for n in ordered([node], stop=self.row):
            if n.op in MASKS:  # which can be handed on nowhere
                own = False
            elif n.args:
                own = any(self.row[a] for a in n.args) and all(
                    self.row[a] or a.constant is not None for a in n.args
                )
            else:
                own = n.op == "input" and n.label.startswith(_ROW)
            self.row[n] = own
        return self.row[node]

    def temporary(self, node: Expr) -> str:
        """The label of a temporary, which the stage writes in which it is first known."""
        label = f"temp.{self.temporaries.setdefault(node, len(self.temporaries))}"
        self.targets[self.level(node)][label] = node
        return label

    def sources(self, exchange: Exchange, after: int) -> tuple[str, ...]:
        if exchange.kind in ("sum", "amax"):
            (operand,) = exchange.operands
            self.targets[after - 1][f"part.{exchange.results[0]}"] = operand
        if exchange.kind not in ("product", "moments"):
            return ()

        def source(operand: Expr) -> str:
            gate = operand.op == "input" and operand.label.startswith(("u.", "v.", "a."))
            return operand.label if gate and exchange.kind == "moments" else self.temporary(operand)

        return tuple(map(source, exchange.operands))

    def find_crossing(self, stage: int) -> None:
        """Make temporaries of values that this stage reads, that an earlier one computes anyway,
        and that are not cheap to compute again."""
        earlier = [e for targets in self.targets[:stage] for e in targets.values()]
        computed = set(ordered(earlier))
        seen: set[Expr] = set()
        pending = list(self.targets[stage].values())
        while pending:
            node = pending.pop()
            if node in seen or not node.args or self.is_row(node):
                continue
            seen.add(node)
            if node in computed and node.op not in MASKS and not self.is_cheap(node):
                self.temporary(node)
            else:
                pending.extend(node.args)

    def move_copies(self) -> None:
        """Leave saving an input to the first stage that reads it: a stage that is there for copies
        alone would have to load it once more."""
        for stage, targets in enumerate(self.targets):
            copies = [k for k, e in targets.items() if k.startswith("saved.") and not e.args]
            for label in copies:
                copied = targets.pop(label)
                later = (s for s in range(stage, len(self.targets)) if self.reads(s, copied))
                self.targets[next(later, stage)][label] = copied

    def reads(self, stage: int, node: Expr) -> bool:
        formulas = [e for e in self.targets[stage].values() if e.args]
        return node in ordered(formulas, stop=self.known(stage))

    def known(self, stage: int) -> dict[Expr, Expr]:
        """Temporaries of earlier stages, as the inputs that they are to this one."""
        return {
            node: self.algebra.input(f"temp.{k}")
            for node, k in self.temporaries.items()
            if self.level(node) < stage
        }

    def is_cheap(self, node: Expr) -> bool:
        operations, pending = 0, [node]
        while pending:
            at = pending.pop()
            if not at.args or self.is_row(at) or (at in self.temporaries and at is not node):
                continue
            operations += 1
            if at.op in _DEAR or operations > _CHEAP:
                return False
            pending.extend(at.args)
        return node not in self.temporaries

    def multiplied(self, roots: Sequence[Expr], stop: Mapping[Expr, Expr]) -> list[Expr]:
        """The roots with quotients by a number for each row as products with its inverse, of which
        there is one for the whole row."""
        make = self.algebra.make

        def rule(node: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if node.op != "div" or self.is_row(args[0]) or not self.is_row(args[1]):
                return None
            return make("mul", args[0], make("reciprocal", args[1]))

        same = {node: node for node in stop}
        return list(self.algebra.rebuild(roots, same, rule))

    def stage(self, stage: int) -> Stage:
        known = self.known(stage)
        shared: dict[Expr, None] = {}
        roots = self.multiplied(list(self.targets[stage].values()), known)
        for node in ordered(roots, stop=known):
            if node.args and not self.is_row(node):
                shared.update(dict.fromkeys(filter(self.is_row, node.args)))
        shared.update(dict.fromkeys(filter(self.is_row, roots)))
        for k, node in enumerate(shared):
            known[node] = self.algebra.input(f"row.{k}")
        new = self.algebra.rebuild(roots, known)
        return Stage(tuple(shared), dict(zip(self.targets[stage], new, strict=True)))
