"""Writes the stages of a step as members of a cell's C++ struct (csrc/core/stages.h)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastrnn.compiler.cpp import function
from fastrnn.compiler.cut import Site
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import Expr
from fastrnn.compiler.stages import Exchange, Stage

__all__ = ["members"]


def members(derived: Derived) -> str:
    """The members of a cell whose step has stages (csrc/core/stages.h)."""
    assert derived.programs is not None
    products = [site for site in derived.sites if site.kind == "product"]
    site_of = [
        next((j for j, site in enumerate(products) if name in site.gates), -1)
        for name in derived.recurrent
    ]
    entries = "kGates" if derived.has_all_rows else ""
    forward = _Program(derived, "forward", ("u", "v", "s", "p"), ("next", "saved"))
    backward = _Program(
        derived,
        "backward",
        ("saved", "s", "p", "next", "dnext"),
        ("du", "dv", "ds", "dp", "operand"),
    )
    return f"""\
  static constexpr int kSites = {len(products)}, kRows = {len(derived.rows)};
  static constexpr int kSiteOf[{entries}] = {_ints(site_of or [-1])};  // -1: multiplies state 0
  static constexpr int kOperand[] = {_ints(forward.operands() or [0])};  // temporaries
{forward.members()}
{backward.members()}"""


def _ints(values: Iterable[int]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


class _Program:
    """The program of one direction in C++."""

    def __init__(
        self, derived: Derived, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        assert derived.programs is not None
        self.derived, self.name, self.inputs, self.outputs = derived, name, inputs, outputs
        self.forward = name == "forward"
        self.program = derived.programs[not self.forward]
        exchanges: Sequence[Site | Exchange] = derived.sites if self.forward else derived.exchanges
        self.exchanges = exchanges
        labels = [r for x in exchanges if x.kind != "transposed" for r in x.results]
        self.results = [*derived.rows, *(r for r in labels if r not in derived.rows)]
        products = [site.number for site in derived.sites if site.kind == "product"]
        self.site = {f"back.{number}": j for j, number in enumerate(products)}
        self.operand = {f"operand.{j}": j for j in range(len(products))}
        self.places = derived.places() | {
            **{f"temp.{k}": f"x[{k}]" for k in range(self.program.temporaries)},
            **{label: f"back[{j}]" for label, j in self.site.items()},
            **{label: f"results[{k}]" for k, label in enumerate(self.results)},
            "count": "count",
        }
        most = max(len(stage.rows) for stage in self.program.stages)
        self.row_places = {f"row.{k}": f"r[{k}]" for k in range(most)}
        self.most_rows = most

    def operands(self) -> list[int]:
        """The temporaries of the operands of the products."""
        pairs = zip(self.exchanges, self.program.sources, strict=True)
        return [_number_of(labels[0]) for x, labels in pairs if x.kind == "product"]

    def members(self) -> str:
        functions = [
            text
            for k, stage in enumerate(self.program.stages)
            for text in (self._rows(k, stage), self._stage(k, stage))
        ]
        return "\n".join([self._shape(), *functions])

    def _rows(self, k: int, stage: Stage) -> str:
        return function(
            f"{self.name}_rows",
            self.places,
            ("results", "V count"),
            {f"r[{j}]": row for j, row in enumerate(stage.rows)},
            ("r",),
            f"Number<{k}>",
        )

    def _targets(self, stage: Stage) -> dict[str, Expr]:
        places = self.derived.places() | {
            **{f"temp.{k}": f"x_out[{k}]" for k in range(self.program.temporaries)},
            **{f"operand.{j}": f"operand[{j}]" for j in self.operand.values()},
            **{f"part.{label}": f"part[{k}]" for k, label in enumerate(self.results)},
        }
        for kind, owners in (
            ("ds", self.derived.states),
            ("du", self.derived.inputs),
            ("dv", self.derived.recurrent),
            ("dp", self.derived.params),
        ):
            places |= {f"{kind}.{name}": f"{kind}[{k}]" for k, name in enumerate(owners)}
        return {places[label]: expr for label, expr in stage.outputs.items()}

    def _stage(self, k: int, stage: Stage) -> str:
        return function(
            self.name,
            self.places | self.row_places,
            (*self.inputs, "x", *(() if self.forward else ("back",)), "r"),
            self._targets(stage),
            (*self.outputs, "x_out", "part"),
            f"Number<{k}>",
        )

    def _shape(self) -> str:
        stages, moments = [], []
        sources: list[int] = []
        for k, stage in enumerate(self.program.stages):
            bits: dict[str, int] = {}
            for target in self._targets(stage):
                array, at = target[:-1].split("[")
                bits[array] = bits.get(array, 0) | 1 << int(at)
            kinds = {x.results[0]: x.kind for x in self.exchanges if x.kind in ("sum", "amax")}
            parts = [label for label in stage.outputs if label.startswith("part.")]
            totals = {"sum": 0, "amax": 0}
            for label in parts:
                reduced = label.removeprefix("part.")
                totals[kinds[reduced]] |= 1 << self.results.index(reduced)
            state = bits.get("next" if self.forward else "ds", 0)
            rest = [bits.get(n, 0) for n in ("saved", "du", "dv", "dp", "operand")]
            numbers = [self._sites_before(k), totals["sum"], totals["amax"]]
            stages.append(_ints([*numbers, bits.get("x_out", 0), state, *rest]))
        before = zip(self.exchanges, self.program.begins, self.program.sources, strict=True)
        for x, begins, labels in before:
            if x.kind == "moments":
                result = self.results.index(x.results[0])
                moments.append(_ints([begins, result, len(labels), len(sources)]))
                sources += [self._source(label) for label in labels]
        name = "kForward" if self.forward else "kBackward"
        shape = f"Program<{len(stages)}, {len(moments)}, {len(sources)}>"
        sizes = f"{self.program.temporaries}, {len(self.results)}, {self.most_rows}"
        fields = [sizes, "{" + ", ".join(stages) + "}", str(len(moments))]
        fields += ["{" + ", ".join(moments or ["{}"]) + "}", _ints(sources or [0])]
        return f"  static constexpr {shape} {name} = {{\n      {', '.join(fields)}}};"

    def _sites_before(self, stage: int) -> int:
        bits, number = 0, 0
        for x, begins in zip(self.exchanges, self.program.begins, strict=True):
            if x.kind == "product":
                bits |= (begins == stage) << number
                number += 1
            elif x.kind == "transposed":
                bits |= (begins == stage) << self.site[x.results[0]]
        return bits

    def _source(self, label: str) -> int:
        if label.startswith("temp."):
            return _number_of(label)
        array, name = label.split(".", 1)
        inputs, recurrent = self.derived.inputs, self.derived.recurrent
        return ~(len(recurrent) + inputs.index(name) if array == "u" else recurrent.index(name))


def _number_of(label: str) -> int:
    return int(label.split(".")[1])
