"""Takes gradients back through the cuts of a step (`cut.py`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from fastrnn.cells import Cell
from fastrnn.compiler.expression import Algebra, Expr, uses
from fastrnn.compiler.stages import Exchange
from fastrnn.compiler.trace import Trace

__all__ = ["needed", "through_cuts"]


def needed(exchanges: Sequence[Exchange], outputs: Iterable[Expr]) -> list[Exchange]:
    """The exchanges whose results the outputs, or later exchanges that are needed, read."""
    needed: list[Exchange] = []
    read = uses(outputs)
    for exchange in reversed(exchanges):
        if not read.isdisjoint(exchange.results):
            needed.append(exchange)
            read |= uses(exchange.operands)
    return needed[::-1]


def through_cuts(
    algebra: Algebra, cell: Cell, traced: Trace
) -> tuple[tuple[Expr, ...], list[Exchange]]:
    """The gradients of a step as a whole, from those of the formulas between its cuts, and the
    exchanges that they need, in order."""
    make, const = algebra.make, algebra.const
    known: dict[Expr, Expr] = {}
    exchanges: list[Exchange] = []
    own = dict(traced.results)
    first = len(cell.inputs)

    def gradient(expr: Expr) -> Expr:
        return algebra.rebuild([expr], known)[0]

    def total(label: str, expr: Expr) -> Expr:
        """The sum of a gradient over the units."""
        if expr.constant == 0:
            return expr
        exchanges.append(Exchange("sum", (label,), (expr,)))
        return algebra.input(label)

    for site, parts in reversed(list(zip(traced.sites, traced.operands, strict=True))):
        k = site.number
        if site.kind == "product":
            places = [cell.recurrent.index(name) for name in site.gates]
            dv = tuple(gradient(traced.gradients[first + place]) for place in places)
            reaches = any(each.constant != 0 for each in dv)
            back = [algebra.input(f"back.{k}") if reaches else const(0)]
            if reaches:
                exchanges.append(Exchange("transposed", (f"back.{k}",), dv))
        elif site.kind == "sum":
            back = [total(f"dsum.{k}", gradient(own[f"sum.{k}"]))] * site.parts
        elif site.kind == "amax":
            d = total(f"dmax.{k}", gradient(own[f"max.{k}"]))
            # The largest of what this pass computes again: a state that was stored in 16 bits may
            # differ from the one that the step reduced.
            most = algebra.input(f"most.{k}")
            largest = functools.reduce(lambda a, b: make("maximum", a, b), parts)
            exchanges.append(Exchange("amax", (f"most.{k}",), (largest,)))
            here = [make("where", make("eq", x, most), const(1), const(0)) for x in parts]
            if d.constant != 0:  # units that tie share the gradient, as in torch
                all_here = functools.reduce(lambda a, b: make("add", a, b), here)
                d = make("div", d, total(f"ties.{k}", all_here))
            back = [make("mul", each, d) for each in here]
        else:
            d_mean = total(f"dmean.{k}", gradient(own[f"mean.{k}"]))
            d_deviation = total(f"ddev.{k}", gradient(own[f"dev.{k}"]))
            every = make("mul", algebra.input("count"), const(site.parts))
            shift = make("div", d_mean, every)
            # The deviations add up to zero, so that of the mean within them adds nothing.
            scale = make("mul", const(2), d_deviation)
            back = [
                make("add", shift, make("mul", scale, make("sub", x, algebra.input(f"mean.{k}"))))
                for x in parts
            ]
        for part, each in enumerate(back):
            known[algebra.input(f"doperand.{k}.{part}")] = each
    return algebra.rebuild(traced.gradients, known), exchanges
