"""Describes for people what is derived from a cell: `python -m fastrnn cell`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastrnn.compiler.cut import Site
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import TRANSCENDENTAL, Expr, ordered, write
from fastrnn.compiler.stages import Exchange

__all__ = ["describe"]


def describe(derived: Derived) -> str:
    """Text with a cell's equations, summed gates, saved values and costs; of a cell whose step has
    stages, those of every stage, and what lies between them.

    A prime marks a state after the step, `dx` is the gradient of `x`, and `a` is `u + v`.
    """
    equations = _staged(derived) if derived.programs else _pointwise(derived)
    sums = [name for name, summed in zip(derived.gates, derived.summed, strict=True) if summed]
    bytes = 4 * len(derived.saved)
    rows = f", and {4 * len(derived.rows)} bytes per row" if derived.rows else ""
    return "\n".join(
        [
            f"cell {derived.name}",
            f"  gates   {' '.join(derived.gates)}",
            f"  states  {' '.join(derived.states)}",
            *([f"  params  {_params(derived)}"] if derived.params else []),
            *([f"  draws   {_draws(derived)}"] if derived.draws else []),
            f"  summed  {' '.join(sums) or 'none'}",
            f"  saves   {' '.join([*derived.saved, *derived.rows]) or 'nothing'}: {bytes} bytes "
            f"per unit{rows} and step in float32, besides the states",
            *equations,
        ]
    )


def _pointwise(derived: Derived) -> list[str]:
    states = len(derived.states)
    after = [f"{name}'" for name in derived.states]
    forward = dict(zip(after, derived.step[:states], strict=True))
    backward: dict[str, Expr] = {}
    du, dv, ds, dp = derived.grouped(derived.gradients)
    for name, summed, left, right in zip(derived.gates, derived.summed, du, dv, strict=True):
        backward |= {f"da.{name}": left} if summed else {f"du.{name}": left, f"dv.{name}": right}
    backward |= {f"d{name}": expr for name, expr in zip(derived.states, ds, strict=True)}
    backward |= {f"dp.{name}": expr for name, expr in zip(derived.params, dp, strict=True)}
    # A saved gate may be called like a state.
    names = {name: f"saved.{name}" if name in derived.states else name for name in derived.saved}
    saved = dict(zip(derived.step[states:], names.values(), strict=True))
    return [
        "",
        f"forward: {_cost(derived.step)}",
        *_equations(forward, saved, names),
        "",
        f"backward: {_cost(derived.gradients)}",
        *_equations(backward, {}, names),
    ]


def _staged(derived: Derived) -> list[str]:
    assert derived.programs is not None
    names = {name: f"saved.{name}" for name in derived.saved}
    steps: tuple[Sequence[Site | Exchange], ...] = (derived.sites, derived.exchanges)
    lines: list[str] = []
    for way, program, exchanges in zip(
        ("forward", "backward"), derived.programs, steps, strict=True
    ):
        for k, stage in enumerate(program.stages):
            between = zip(exchanges, program.begins, program.sources, strict=True)
            begins = [
                _exchange(derived, exchange, sources)
                for exchange, begin, sources in between
                if begin == k
            ]
            targets = {f"row.{j}": row for j, row in enumerate(stage.rows)}
            targets |= {_target(label, derived): e for label, e in stage.outputs.items()}
            lines += ["", f"{way}, stage {k}: {_cost(list(targets.values()))}"]
            lines += [f"  begins with {what}" for what in begins]
            lines += _equations(targets, {}, names) if targets else []
    return lines


def _exchange(derived: Derived, exchange: Site | Exchange, sources: Sequence[str]) -> str:
    if exchange.kind == "product":
        gates = exchange.gates if isinstance(exchange, Site) else ()
        return f"v.{' v.'.join(gates)}: R times {sources[0]}"
    if exchange.kind == "transposed":
        (label,) = exchange.results
        gates = derived.sites[int(label.split(".")[1])].gates
        return f"{label}: transposed R times dv.{' dv.'.join(gates)}"
    over = f"of {' '.join(sources)} " if sources else ""
    kind = {"sum": "sum", "amax": "maximum", "moments": "mean and squared deviations"}
    return f"{' '.join(exchange.results)}: {kind[exchange.kind]} {over}over the units"


def _target(label: str, derived: Derived) -> str:
    kind, _, name = label.partition(".")
    if kind in ("du", "dv") and derived.summed[derived.gates.index(name)]:
        return f"da.{name}"
    shown = {"next": f"{name}'", "ds": f"d{name}", "part": name}
    return shown.get(kind, label)


def _equations(
    targets: Mapping[str, Expr], names: Mapping[Expr, str], saved: Mapping[str, str]
) -> list[str]:
    def leaf(node: Expr) -> str:
        if node.op == "const":
            return node.label.removesuffix(".0")
        kind, _, name = node.label.partition(".")
        if kind == "saved":
            return saved[name]
        shown = {"s": name, "next": f"{name}'", "dnext": f"d{name}'"}
        return shown.get(kind, node.label)

    own: dict[Expr, str] = {}
    for name, root in targets.items():
        if root.args:
            own.setdefault(root, name)
    named = own | {node: name for node, name in names.items() if node.args}
    lines, texts = write(list(targets.values()), leaf, named)
    rows = [(name, text) for _, name, text in lines]
    written = {name for name, _ in rows}
    rows += [row for row in zip(targets, texts, strict=True) if row[0] not in written]
    pad = max(len(name) for name, _ in rows)
    return [f"  {name:<{pad}} = {text}" for name, text in rows]


def _params(derived: Derived) -> str:
    pairs = zip(derived.params, derived.shared, strict=True)
    return " ".join(name + " (one for all units)" * shared for name, shared in pairs)


def _draws(derived: Derived) -> str:
    return ", ".join(
        f"z.{k} per {draw.per}: {1 / draw.probability if draw.scaled else 1:g} with probability "
        f"{draw.probability:g}, else 0"
        for k, draw in enumerate(derived.draws)
    )


def _cost(roots: Sequence[Expr]) -> str:
    operations = [node for node in ordered(roots) if node.args]
    transcendental = sum(node.op in TRANSCENDENTAL for node in operations)
    count = len(operations)
    return f"{count} operation{'s' * (count != 1)}, {transcendental} transcendental"
