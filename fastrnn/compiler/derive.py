"""Derives from a cell's function its derivative and the values saved for the backward pass.

The function and its vector-Jacobian product are traced once (`trace.py`) into pointwise expressions
(`expression.py`), cut where units need each other. Rules then shape them:

- **summed**: if the gradients of a gate's `u` and `v` are the same node, the cell depends only on
  their sum `a`, and one array serves both.
- **saved**: the backward pass gets the states before and after the step, and recomputes whatever
  follows from them. A step saves the fewest other values from which the gradients follow by
  arithmetic. Functions such as tanh are computed again only if each of them spares a saved value.
  A cell with reductions or products of its own also saves their results, a few numbers for each
  row.
- **stages**: such a cell becomes a program of stages (`stages.py`), forward and backward. Its
  gradients go back through every cut: that of a sum is the same for all units, that of the operand
  of a product is the transposed product.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrnn.cells import Cell
from fastrnn.cells.noise import Draw
from fastrnn.cells.variants import unclipped
from fastrnn.compiler.cut import Site
from fastrnn.compiler.expression import (
    Algebra,
    Expr,
    evaluate,
    uses,
)
from fastrnn.compiler.saved import GRADIENTS, named, saved_values
from fastrnn.compiler.stages import Exchange, Program, schedule
from fastrnn.compiler.through_cuts import needed, through_cuts
from fastrnn.compiler.trace import Trace, Underivable, trace

__all__ = ["Derived", "Underivable", "derive", "forward_exchanges"]

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, eq=False)
class Derived:
    """Everything that is derived from a cell's function.

    Attributes:
        name, gates, states, params: the cell's; of the parameters, the names of their rows of
            numbers per unit, one for each gate if the parameter has that many.
        shared: per parameter, whether all units share one number.
        inputs, recurrent: names of the gates with rows in `weight_ih` and in `weight_hh`: those of
            `u` and of `v`.
        summed: per recurrent gate, whether the cell depends on `u + v` alone.
        saved: names of the values saved per unit and step for the backward pass: a gate's name for
            its value after the nonlinearity, `v.n` or `u.n` for a raw projection, `a.n` for their
            sum.
        projectable: whether state 0 enters a step through `v` alone, so that it may be projected
            to another width between the steps.
        step: expressions of the next states and the saved values.
        gradients: expressions of the gradients of `u`, `v`, the states and the parameters; those
            of parameters are to be summed over steps and rows.
        sites: where units need each other, in the order in which a step runs.
        operands: of each site, its parts.
        rows: labels of the results of reductions that a step saves, one number for each row.
        exchanges: those of the backward pass, in order.
        programs: the step and its gradients as stages; None for a cell without sites.
        draws: what a step draws at random, in order.
        limit: the largest absolute value of the gradients of the states after a step, which the
            sweeps clip before the formulas see them; None without a limit.
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
    sites: tuple[Site, ...] = ()
    operands: tuple[tuple[Expr, ...], ...] = ()
    rows: tuple[str, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    programs: tuple[Program, Program] | None = None
    draws: tuple[Draw, ...] = ()
    inputs: tuple[str, ...] = ()
    recurrent: tuple[str, ...] = ()
    limit: float | None = None

    @property
    def has_all_rows(self) -> bool:
        """Whether every gate has rows in both matrices."""
        return len(self.inputs) == len(self.recurrent) == len(self.gates)

    @property
    def all_summed(self) -> bool:
        """Whether `u` and `v` count as their sum alone."""
        return self.has_all_rows and all(self.summed)

    def input_of(self) -> int:
        """Four bits for each summed gate of `v`: its place in `u`."""
        summed = [k for k, both in enumerate(self.summed) if both]
        return sum(self.inputs.index(self.recurrent[k]) << 4 * k for k in summed)

    @property
    def summary(self) -> str:
        """One line for the head of generated code."""
        name = " ".join(self.name.split()).rstrip("\\")
        gates, states, saved = (" ".join(names) for names in (self.gates, self.states, self.saved))
        learned = f", parameters {' '.join(self.params)}" if self.params else ""
        return f"{name}: gates {gates}, states {states}{learned}; saves {saved or 'nothing'}"

    def param_groups(self) -> list[slice]:
        """The rows of each parameter: one, or one for each gate."""
        groups: list[slice] = []
        for k, name in enumerate(self.params):
            if "." not in name:
                groups.append(slice(k, k + 1))
            elif name.endswith(f".{self.gates[0]}"):
                groups.append(slice(k, k + len(self.gates)))
        return groups

    def gate_params(self) -> int:
        """Bits of the first rows of the parameters that have a number for each gate."""
        return sum(
            1 << rows.start for rows in self.param_groups() if "." in self.params[rows.start]
        )

    @property
    def stages(self) -> int:
        """The number of stages of a step."""
        return len(self.programs[0].stages) if self.programs else 1

    def tape_width(self, projected: bool, hidden: int = 1, ratio: int = 1) -> int:
        """Values per unit in a row of the tape: the states after the first, the saved values, and
        if `projected`, state 0 before the projection. Numbers saved for each row follow in as many
        values as they fill, in the compute type, which takes `ratio` numbers of the tape."""
        row = -(-len(self.rows) * ratio // hidden) if self.rows else 0
        return len(self.states) - 1 + len(self.saved) + projected + row

    def places(self, after: str = "next", dafter: str = "dnext") -> dict[str, str]:
        """The array element in generated code for each input of the expressions. `after` and
        `dafter` name the arrays of the states after the step and of their gradients."""
        arrays = {"u": self.inputs, "v": self.recurrent, "a": self.recurrent}
        arrays |= {"saved": self.saved, "p": self.params}
        arrays |= dict.fromkeys(("s", "next", "dnext"), self.states)
        named = {"a": "v", "next": after, "dnext": dafter}
        places = {
            f"{array}.{name}": f"{named.get(array, array)}[{k}]"
            for array, names in arrays.items()
            for k, name in enumerate(names)
        }
        learned = len(self.params)
        return places | {f"z.{k}": f"p[{learned + k}]" for k in range(len(self.draws))}

    def forward(
        self,
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        s: Sequence[Tensor],
        p: Sequence[Tensor] = (),
        apply: Callable[[Tensor], Sequence[Tensor]] | None = None,
        z: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step on tensors of one shape, one per entry of `u` and `v` and per state, and on
        parameters that may be smaller. Returns `(next, saved)`; after the saved values, `saved`
        has the numbers saved for each row. `apply` and `z` are those of `Cell.step`.

        State 0 of a projectable cell may have any shape.
        """
        inputs = _labelled("s", self.states, s) | _labelled("p", self.params, p)
        if self.projectable:
            del inputs[f"s.{self.states[0]}"]
        inputs["count"] = u[0].new_full((), u[0].size(-1))
        inputs |= {f"z.{k}": numbers for k, numbers in enumerate(z)}

        left = dict(zip(self.inputs, u, strict=True))
        inputs |= _labelled("u", self.inputs, u)

        def project(gate: int, right: Tensor) -> None:
            name = self.recurrent[gate]
            if self.summed[gate]:
                inputs[f"a.{name}"] = left[name] + right
            else:
                inputs[f"v.{name}"] = right

        for gate, right in enumerate(v):
            project(gate, right)
        for site, parts in zip(self.sites, self.operands, strict=True):
            values = evaluate(parts, inputs)
            if site.kind == "product":
                assert apply is not None
                (operand,) = values
                for gate in map(self.recurrent.index, site.gates):
                    project(gate, apply(operand)[gate])
            else:
                inputs.update(zip(site.results, reduced(site.kind, values), strict=True))
        out = evaluate(self.step, inputs)
        return out[: len(self.states)], [
            *out[len(self.states) :],
            *(inputs[label] for label in self.rows),
        ]

    def backward(
        self,
        saved: Sequence[Tensor],
        s: Sequence[Tensor],
        next: Sequence[Tensor],
        dnext: Sequence[Tensor],
        p: Sequence[Tensor] = (),
        transposed: Callable[[int, Tensor], Tensor] | None = None,
        z: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients `(du, dv, ds, dp)` of that step, from the gradients `dnext` of its next states,
        which are within the cell's limit.
        Those of parameters have a number for each row and unit. `transposed(k, dv)` is the product
        of `dv` with recurrent block k, for a cell with products of its own."""
        inputs = _labelled("s", self.states, s) | _labelled("p", self.params, p)
        inputs |= _labelled("next", self.states, next)
        inputs |= _labelled("dnext", self.states, dnext)
        inputs |= _labelled("saved", self.saved, saved[: len(self.saved)])
        inputs |= dict(zip(self.rows, saved[len(self.saved) :], strict=True))
        inputs["count"] = next[0].new_full((), next[0].size(-1))
        inputs |= {f"z.{k}": numbers for k, numbers in enumerate(z)}
        for exchange in self.exchanges:
            values = evaluate(exchange.operands, inputs)
            if exchange.kind == "transposed":
                assert transposed is not None
                (label,) = exchange.results
                names = self.sites[int(label.split(".")[1])].gates
                terms = [
                    transposed(self.recurrent.index(name), dv)
                    for name, dv in zip(names, values, strict=True)
                ]
                inputs[label] = torch.stack(terms).sum(0)
            else:
                inputs.update(zip(exchange.results, reduced(exchange.kind, values), strict=True))
        du, dv, ds, dp = self.grouped(evaluate(self.gradients, inputs))
        return list(du), list(dv), list(ds), list(dp)

    def grouped(self, gradients: Sequence[_Entry]) -> tuple[Sequence[_Entry], ...]:
        """Gradients of `u`, of `v`, of the states and of the parameters, from all in this order."""
        of_u, of_uv = len(self.inputs), len(self.inputs) + len(self.recurrent)
        ends = of_u, of_uv, of_uv + len(self.states)
        return tuple(gradients[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True))


def _labelled(kind: str, names: Sequence[str], values: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": value for name, value in zip(names, values, strict=True)}


def reduced(kind: str, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a reduction of values of all units, which are in the last dimension."""
    x = torch.cat(list(values), -1)
    if kind == "sum":
        return (x.sum(-1, keepdim=True),)
    if kind == "amax":
        return (x.amax(-1, keepdim=True),)
    mean = x.mean(-1, keepdim=True)
    return mean, (x - mean).square().sum(-1, keepdim=True)


def derive(cell: Cell) -> Derived:
    """Derive everything from a cell, once per cell.

    Raises:
        Underivable: if the function is not a pointwise formula; the message says why.
    """
    whole, limit = unclipped(cell)
    derived = _derive(whole)
    if isinstance(derived, Underivable):
        raise Underivable(*derived.args) from derived.__cause__
    if limit is None:
        return derived
    return replace(derived, name=cell.name, limit=limit if limit < math.inf else None)


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


_MOST_BETWEEN_STAGES = 64  # bits of a mask of csrc/core/stages.h


def _derive_here(cell: Cell) -> Derived:
    algebra = Algebra()
    traced = trace(algebra, cell)
    summed, traced = _sum_gates(algebra, cell, traced)
    gradients, exchanges = through_cuts(algebra, cell, traced)
    pairs = zip(traced.sites, traced.operands, strict=True)
    reads = [parts[0] for site, parts in pairs if site.kind == "product"]
    outputs = [*gradients, *(e for x in exchanges for e in x.operands), *reads]
    outputs = list(_without_zero_gradients(algebra, outputs))
    available = {
        node: algebra.input(f"next.{name}")
        for node, name in reversed(list(zip(traced.states, cell.states, strict=True)))
        if node.op != "const" and not node.label.startswith("s.")
    }
    saved = named(saved_values(outputs, available), available, cell.gates)
    known = available | {node: algebra.input(f"saved.{name}") for name, node in saved.items()}
    outputs = list(algebra.rebuild(outputs, known))
    given = iter(outputs)
    gradients = tuple(itertools.islice(given, len(gradients)))
    exchanges = [
        Exchange(x.kind, x.results, tuple(itertools.islice(given, len(x.operands))))
        for x in exchanges
    ]
    reads = list(given)
    exchanges = needed(exchanges, [*gradients, *reads])
    step = (*traced.states, *saved.values())
    read = uses(outputs)
    # A mean and its deviation lie side by side, so both are saved if one is.
    saves = [site.results for site in traced.sites if not read.isdisjoint(site.results)]
    rows = tuple(label for results in saves for label in results)
    first = f"s.{cell.states[0]}"
    names = cell.param_rows()
    shared = [cell.params[name].kind == "one" for name, own in names.items() for _ in own]
    derived = Derived(
        name=cell.name,
        gates=cell.gates,
        states=cell.states,
        params=tuple(row for own in names.values() for row in own),
        shared=tuple(shared),
        summed=summed,
        saved=tuple(saved),
        projectable=all(site.kind != "product" for site in traced.sites)
        and first not in uses([*outputs, *step, *itertools.chain(*traced.operands)])
        and gradients[len(cell.inputs) + len(cell.recurrent)].constant == 0,
        step=step,
        gradients=gradients,
        sites=traced.sites,
        operands=traced.operands,
        rows=rows,
        exchanges=tuple(exchanges),
        draws=cell.draws if cell.noise else (),
        inputs=cell.inputs,
        recurrent=cell.recurrent,
    )
    if not traced.sites:
        return derived
    return replace(derived, programs=_programs(algebra, derived, reads))


def forward_exchanges(algebra: Algebra, derived: Derived) -> list[Exchange]:
    """The exchanges of a step, in order."""
    exchanges = []
    for site, parts in zip(derived.sites, derived.operands, strict=True):
        results = site.results
        operands = parts
        if site.kind == "product":
            results = tuple(
                f"{'a' if derived.summed[derived.recurrent.index(name)] else 'v'}.{name}"
                for name in site.gates
            )
        elif site.kind in ("sum", "amax"):
            op = "add" if site.kind == "sum" else "maximum"
            operands = (functools.reduce(lambda a, b: algebra.make(op, a, b), parts),)
        exchanges.append(Exchange(site.kind, results, operands))
    return exchanges


def _programs(algebra: Algebra, derived: Derived, reads: Sequence[Expr]) -> tuple[Program, Program]:
    """The stages of a step and of its gradients; `reads` are the operands of the products, in the
    terms of the backward pass."""
    step = {f"next.{n}": e for n, e in zip(derived.states, derived.step, strict=False)}
    step |= {
        f"saved.{n}": e
        for n, e in zip(derived.saved, derived.step[len(derived.states) :], strict=True)
    }
    du, dv, ds, dp = derived.grouped(derived.gradients)
    back = {f"du.{n}": e for n, e in zip(derived.inputs, du, strict=True)}
    back |= {f"dv.{n}": e for n, e in zip(derived.recurrent, dv, strict=True)}
    back |= {f"ds.{n}": e for n, e in zip(derived.states, ds, strict=True)}
    back |= {f"dp.{n}": e for n, e in zip(derived.params, dp, strict=True)}
    back |= {f"operand.{k}": e for k, e in enumerate(reads)}
    forward = forward_exchanges(algebra, derived)
    programs = schedule(algebra, step, forward), schedule(algebra, back, derived.exchanges)
    reduced_to = len(derived.rows)
    reduced_to += sum(len(x.results) for x in (*forward, *derived.exchanges))
    most = max(reduced_to, len(derived.saved), *(program.temporaries for program in programs))
    if most > _MOST_BETWEEN_STAGES:
        raise Underivable(
            f"a step of cell {derived.name!r} has {most} saved values, or values between its "
            f"stages, and the kernels are made for at most {_MOST_BETWEEN_STAGES}; split it into "
            "several cells"
        )
    return programs


# The rules.


def _sum_gates(algebra: Algebra, cell: Cell, whole: Trace) -> tuple[tuple[bool, ...], Trace]:
    """Replace `v` by the sum `a`, and `u` by 0, for each gate where that leaves the cell the
    same."""
    du, dv = whole.gradients[: len(cell.inputs)], whole.gradients[len(cell.inputs) :]
    of_u = dict(zip(cell.inputs, du, strict=True))
    summed = [of_u.get(name) is dv[k] for k, name in enumerate(cell.recurrent)]
    traced = whole.roots()
    for k, name in enumerate(cell.recurrent):
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
    return tuple(summed), whole.with_roots(traced)


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


def _without_zero_gradients(algebra: Algebra, gradients: Sequence[Expr]) -> tuple[Expr, ...]:
    """Drop products with a gradient that is zero by construction, as behind `sign` or `floor`.

    If the other factor depends on a gradient, the zero is the cell's own and the product stays.
    """

    def rule(node: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if node.op in ("mul", "div"):
            for zero, other in (args, args[::-1])[: 2 if node.op == "mul" else 1]:
                if zero.constant == 0 and not any(n.startswith(GRADIENTS) for n in uses([other])):
                    return algebra.const(0)
        return None

    return algebra.rebuild(gradients, {}, rule)
