"""Describes for people what is derived from a cell: `python -m fastrnn cell`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastrnn.cells.arguments import as_written
from fastrnn.compiler.cut import Site
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import TRANSCENDENTAL, Expr, ordered, uses, write
from fastrnn.compiler.stages import Exchange

__all__ = ["describe"]


def describe(derived: Derived) -> str:
    """Text with a cell's equations, summed gates, saved values and costs; of a cell whose step has
    stages, those of every stage, and what lies between them.

    A prime marks a state after the step, `dx` is the gradient of `x`, and `a` is `u + v`.
    """
    equations = _staged(derived) if derived.programs else _pointwise(derived)
    sums = [name for name, summed in zip(derived.recurrent, derived.summed, strict=True) if summed]
    bytes = 4 * len(derived.saved)
    rows = f", and {4 * len(derived.rows)} bytes per row" if derived.rows else ""
    return "\n".join(
        [
            f"cell {derived.name}",
            f"  gates   {' '.join(derived.gates)}",
            *_rows(derived),
            f"  states  {' '.join(derived.states)}",
            *([f"  params  {_params(derived)}"] if derived.params else []),
            *([f"  draws   {_draws(derived)}"] if derived.draws else []),
            *([f"  clips   gradients of states to {derived.limit:g}"] if derived.limit else []),
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
    left, right = (
        dict(zip(derived.inputs, du, strict=True)),
        dict(zip(derived.recurrent, dv, strict=True)),
    )
    summed = [name for name, both in zip(derived.recurrent, derived.summed, strict=True) if both]
    for name in derived.gates:
        if name in summed:
            backward[f"da.{name}"] = left[name]
            continue
        for side, gradients in (("u", left), ("v", right)):
            if name in gradients:
                backward[f"d{side}.{name}"] = gradients[name]
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
    both = derived.recurrent.index(name) if name in derived.recurrent else None
    if kind in ("du", "dv") and both is not None and derived.summed[both]:
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


def _rows(derived: Derived) -> list[str]:
    """Lines with the gates of either matrix, or with rows that nothing reads, if there are any."""
    if not derived.has_all_rows:
        return [
            f"  inputs  {' '.join(derived.inputs)}: rows of weight_ih",
            f"  recurs  {' '.join(derived.recurrent) or 'none'}: rows of weight_hh",
        ]
    operands = [part for parts in derived.operands for part in parts]
    read = uses([*derived.step, *derived.gradients, *operands])
    unread = [
        (side, name)
        for side in "uv"
        for name in derived.gates
        if read.isdisjoint((f"{side}.{name}", f"a.{name}"))
    ]
    if not unread:
        return []
    names = " ".join(f"{side}.{name}" for side, name in unread)
    said = [
        f"{keyword}={as_written([g for g in derived.gates if (side, g) not in unread])}"
        for side, keyword in (("u", "inputs"), ("v", "recurrent"))
        if any(side == other for other, _ in unread)
    ]
    return [f"  unread  {names}: {' and '.join(said)} would leave out these rows"]


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
