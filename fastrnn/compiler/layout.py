"""Where the values of a step in stages lie in generated code, whether C++ or Triton: as elements of
arrays, by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastrnn.compiler.cut import Site
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import Expr
from fastrnn.compiler.stages import Exchange, Stage

__all__ = ["Layout", "Moments", "Shape", "Written", "shape", "site_of", "values"]


def site_of(derived: Derived) -> list[int]:
    """For each gate with recurrent rows, the number of their product among those of other values
    than state 0; -1 for a gate whose rows multiply state 0."""
    products = [site for site in derived.sites if site.kind == "product"]
    return [
        next((j for j, site in enumerate(products) if name in site.gates), -1)
        for name in derived.recurrent
    ]


class Written(NamedTuple):
    """Bits of what comes before a stage and of what it writes, by number.

    Attributes:
        sites: the sites whose products, or transposed products, come before it.
        sums, maxima: the results that sums and maxima of its parts give.
        temporaries, states, saved, du, dv, dp, operands: what it writes; states are the next ones,
            or in the backward pass the gradients of those before the step.
    """

    sites: int
    sums: int
    maxima: int
    temporaries: int
    states: int
    saved: int
    du: int
    dv: int
    dp: int
    operands: int


class Moments(NamedTuple):
    """A mean, and a sum of squared deviations from it, of values side by side.

    Attributes:
        stage: the stage before which they are complete.
        result: the number of the mean; that of the deviations is the next.
        sources: of each value, the number of a temporary, or -1 - g for v[g], or, with GV gates in
            v, -1 - GV - g for u[g].
    """

    stage: int
    result: int
    sources: tuple[int, ...]


class Shape(NamedTuple):
    """The numbers of a program, as Triton's kernels are compiled for them.

    Attributes:
        written, moments: as in `Layout`; there are none for a step without stages.
        temporaries, results: their numbers.
        saved_results: how many of the results, the first, a step saves.
        sites: the number of products of other values than state 0.
        gates: for each stage, bits of the gates whose products, or transposed products, come before
            it; those of state 0 come before the first stage of a step.
        site_of: as the function `site_of` gives it.
        operands: as in `Layout`.
    """

    written: tuple[Written, ...] = ()
    moments: tuple[Moments, ...] = ()
    temporaries: int = 0
    results: int = 0
    saved_results: int = 0
    sites: int = 0
    gates: tuple[int, ...] = ()
    site_of: tuple[int, ...] = ()
    operands: tuple[int, ...] = ()


def shape(derived: Derived, forward: bool) -> Shape:
    """The shape of the program of a direction."""
    sites = tuple(site_of(derived))
    if not derived.programs:
        return Shape(site_of=sites)
    layout = Layout(derived, forward)
    return Shape(
        written=tuple(layout.written),
        moments=tuple(layout.moments),
        temporaries=layout.program.temporaries,
        results=len(layout.results),
        saved_results=len(derived.rows),
        sites=len(set(sites) - {-1}),
        gates=tuple(
            sum(
                (written.sites >> site & 1 if site >= 0 else forward and k == 0) << g
                for g, site in enumerate(sites)
            )
            for k, written in enumerate(layout.written)
        ),
        site_of=sites,
        operands=tuple(layout.operands),
    )


def values(derived: Derived, forward: bool) -> int:
    """How many values of a unit the kernels hold in a step besides gates and states: random
    numbers, parameters, in the backward pass their gradients and saved values in excess of gates,
    and, of a step with stages, temporaries, products of other values and results of reductions."""
    count = len(derived.draws) + len(derived.params)
    if not forward:
        count += len(derived.params) + max(0, len(derived.saved) - len(derived.gates))
    if not derived.programs:
        return count
    sizes = shape(derived, forward)
    return count + sizes.temporaries + sizes.sites + sizes.results


class Layout:
    """The places of the program of one direction.

    Attributes:
        results: labels of the results of reductions by number; those that a step saves come first.
        places: the text of each value that a formula reads, except row formulas.
        row_places: the text of each row formula.
        operands: of each product, the number of the temporary that it multiplies.
        moments: all that the program needs.
        written: for each stage.
    """

    def __init__(self, derived: Derived, forward: bool) -> None:
        assert derived.programs is not None
        self.derived, self.forward = derived, forward
        self.program = derived.programs[not forward]
        exchanges: Sequence[Site | Exchange] = derived.sites if forward else derived.exchanges
        self.exchanges = exchanges
        labels = [r for x in exchanges if x.kind != "transposed" for r in x.results]
        self.results = [*derived.rows, *(r for r in labels if r not in derived.rows)]
        products = [site.number for site in derived.sites if site.kind == "product"]
        self._site = {f"back.{number}": j for j, number in enumerate(products)}
        self.places = derived.places() | {
            **{f"temp.{k}": f"x[{k}]" for k in range(self.program.temporaries)},
            **{label: f"back[{j}]" for label, j in self._site.items()},
            **{label: f"results[{k}]" for k, label in enumerate(self.results)},
            "count": "count",
        }
        self.rows = max(len(stage.rows) for stage in self.program.stages)
        self.row_places = {f"row.{k}": f"r[{k}]" for k in range(self.rows)}
        before = list(zip(exchanges, self.program.begins, self.program.sources, strict=True))
        self.operands = [_number_of(labels[0]) for x, _, labels in before if x.kind == "product"]
        self.moments = [
            Moments(begins, self.results.index(x.results[0]), tuple(map(self._source, labels)))
            for x, begins, labels in before
            if x.kind == "moments"
        ]
        self.written = [self._written(k) for k in range(len(self.program.stages))]

    def targets(self, stage: Stage) -> dict[str, Expr]:
        """The formulas of a stage by the element that they are assigned to."""
        derived = self.derived
        places = derived.places() | {
            **{f"temp.{k}": f"x_out[{k}]" for k in range(self.program.temporaries)},
            **{f"operand.{j}": f"operand[{j}]" for j in range(len(self._site))},
            **{f"part.{label}": f"part[{k}]" for k, label in enumerate(self.results)},
        }
        for kind, owners in (
            ("ds", derived.states),
            ("du", derived.inputs),
            ("dv", derived.recurrent),
            ("dp", derived.params),
        ):
            places |= {f"{kind}.{name}": f"{kind}[{k}]" for k, name in enumerate(owners)}
        return {places[label]: expr for label, expr in stage.outputs.items()}

    def _written(self, k: int) -> Written:
        stage = self.program.stages[k]
        bits: dict[str, int] = {}
        for target in self.targets(stage):
            array, at = target[:-1].split("[")
            bits[array] = bits.get(array, 0) | 1 << int(at)
        kinds = {x.results[0]: x.kind for x in self.exchanges if x.kind in ("sum", "amax")}
        totals = {"sum": 0, "amax": 0}
        for label in (label for label in stage.outputs if label.startswith("part.")):
            reduced = label.removeprefix("part.")
            totals[kinds[reduced]] |= 1 << self.results.index(reduced)
        return Written(
            sites=self._sites_before(k),
            sums=totals["sum"],
            maxima=totals["amax"],
            temporaries=bits.get("x_out", 0),
            states=bits.get("next" if self.forward else "ds", 0),
            saved=bits.get("saved", 0),
            du=bits.get("du", 0),
            dv=bits.get("dv", 0),
            dp=bits.get("dp", 0),
            operands=bits.get("operand", 0),
        )

    def _sites_before(self, stage: int) -> int:
        bits, number = 0, 0
        for x, begins in zip(self.exchanges, self.program.begins, strict=True):
            if x.kind == "product":
                bits |= (begins == stage) << number
                number += 1
            elif x.kind == "transposed":
                bits |= (begins == stage) << self._site[x.results[0]]
        return bits

    def _source(self, label: str) -> int:
        if label.startswith("temp."):
            return _number_of(label)
        array, name = label.split(".", 1)
        inputs, recurrent = self.derived.inputs, self.derived.recurrent
        return ~(len(recurrent) + inputs.index(name) if array == "u" else recurrent.index(name))


def _number_of(label: str) -> int:
    return int(label.split(".")[1])
