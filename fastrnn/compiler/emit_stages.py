"""Writes the stages of a step as members of a cell's C++ struct (csrc/core/stages.h)."""

from __future__ import annotations

from collections.abc import Iterable

from fastrnn.compiler.cpp import function
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.layout import Layout, site_of
from fastrnn.compiler.stages import Stage

__all__ = ["members"]


def members(derived: Derived) -> str:
    """The members of a cell whose step has stages (csrc/core/stages.h)."""
    products = sum(site.kind == "product" for site in derived.sites)
    forward, backward = (Layout(derived, forward=forward) for forward in (True, False))
    entries = "kGates" if derived.has_all_rows else ""
    sites = _ints(site_of(derived) or [-1])
    return f"""\
  static constexpr int kSites = {products}, kRows = {len(derived.rows)};
  static constexpr int kSiteOf[{entries}] = {sites};  // -1: multiplies state 0
  static constexpr int kOperand[] = {_ints(forward.operands or [0])};  // temporaries
{_program(forward)}
{_program(backward)}"""


def _ints(values: Iterable[int]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def _program(layout: Layout) -> str:
    stages = enumerate(layout.program.stages)
    functions = [
        text for k, stage in stages for text in (_rows(layout, k, stage), _stage(layout, k, stage))
    ]
    return "\n".join([_shape(layout), *functions])


def _name(layout: Layout) -> str:
    return "forward" if layout.forward else "backward"


def _rows(layout: Layout, k: int, stage: Stage) -> str:
    return function(
        f"{_name(layout)}_rows",
        layout.places,
        ("results", "V count"),
        {f"r[{j}]": row for j, row in enumerate(stage.rows)},
        ("r",),
        f"Number<{k}>",
    )


def _stage(layout: Layout, k: int, stage: Stage) -> str:
    if layout.forward:
        inputs: tuple[str, ...] = ("u", "v", "s", "p", "x", "r")
        outputs: tuple[str, ...] = ("next", "saved")
    else:
        inputs = ("saved", "s", "p", "next", "dnext", "x", "back", "r")
        outputs = ("du", "dv", "ds", "dp", "operand")
    return function(
        _name(layout),
        layout.places | layout.row_places,
        inputs,
        layout.targets(stage),
        (*outputs, "x_out", "part"),
        f"Number<{k}>",
    )


def _shape(layout: Layout) -> str:
    stages = [_ints(written) for written in layout.written]
    moments: list[str] = []
    sources: list[int] = []
    for each in layout.moments:
        moments.append(_ints([each.stage, each.result, len(each.sources), len(sources)]))
        sources += each.sources
    name = "kForward" if layout.forward else "kBackward"
    shape = f"Program<{len(stages)}, {len(moments)}, {len(sources)}>"
    sizes = f"{layout.program.temporaries}, {len(layout.results)}, {layout.rows}"
    fields = [sizes, "{" + ", ".join(stages) + "}", str(len(moments))]
    fields += ["{" + ", ".join(moments or ["{}"]) + "}", _ints(sources or [0])]
    return f"  static constexpr {shape} {name} = {{\n      {', '.join(fields)}}};"
