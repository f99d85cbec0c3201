"""Writes a cell as two Triton functions on blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import Expr, ordered, write
from fastrnn.compiler.layout import Layout
from fastrnn.compiler.stages import Stage

__all__ = ["module"]


def module(derived: Derived) -> str:
    """The source of a Triton module with the cell's two functions.

    `forward(u, v, s, p)` returns the next states and then the saved values.
    `backward(saved, s, p, after, dafter)` returns the gradients of `u`, `v`, the states and the
    parameters. Arguments and results are tuples of blocks; parameters have one row, and the numbers
    of the cell's draws follow them. For a summed gate `v` is the sum of both projections, `u` is
    not read, and both have the same gradient.

    For a cell whose step has stages the functions compute the stage STAGE:

        forward(STAGE, u, v, s, p, x, results, count, out)
        backward(STAGE, saved, s, p, after, dafter, x, back, results, count, out)

    `x` are the temporaries, `back` the transposed products, `results` those of reductions, a block
    with one column each, and `count` is H. They return `out` (the results listed above, and
    backward then the operands of the products) with what the stage computes in its place, then the
    temporaries likewise, then for each result what the stage has to reduce.
    """
    if derived.programs:
        functions = [_stages(derived, Layout(derived, forward=f)) for f in (True, False)]
        roots = [e for p in derived.programs for stage in p.stages for e in _formulas(stage)]
    else:
        inputs = ("saved", "s", "p", "after", "dafter")
        functions = [
            _function(derived, "forward", ("u", "v", "s", "p"), derived.step),
            _function(derived, "backward", inputs, derived.gradients),
        ]
        roots = [*derived.step, *derived.gradients]
    called = sorted({n.op for n in ordered(roots)} - _OPERATORS)
    text = "\n".join(functions)
    return f"""\
# {derived.summary}
import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.math import {", ".join([*called, "constant"])}


{text}"""


_OPERATORS = frozenset(
    {"input", "const", "add", "sub", "mul", "div", "neg", "lt", "le", "gt", "ge", "eq", "ne"}
)


def _function(derived: Derived, name: str, inputs: Sequence[str], outputs: Sequence[Expr]) -> str:
    leaves = _Leaves(derived.places("after", "dafter"))
    lines, names = write(list(outputs), leaves)
    body = [*leaves.lines(), *(f"{to} = {text}" for _, to, text in lines)]
    body += [f"return ({', '.join(names)},)"]
    head = f"@triton.jit\ndef {name}({', '.join(inputs)}):\n"
    return head + "".join(f"    {line}\n" for line in body)


class _Leaves:
    """The texts of inputs and constants; `lines` make the constants."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places, self.constants = places, dict[str, str]()

    def __call__(self, node: Expr) -> str:
        if node.op == "input":
            return self.places[node.label]
        return self.constants.setdefault(node.label, f"c{len(self.constants)}")

    def lines(self) -> list[str]:
        return [f"{c} = constant({_number(v)}, s[0].dtype)" for v, c in self.constants.items()]


def _number(label: str) -> str:
    return label if math.isfinite(float(label)) else f'float("{float(label)}")'


def _formulas(stage: Stage) -> list[Expr]:
    return [*stage.rows, *stage.outputs.values()]


def _stages(derived: Derived, layout: Layout) -> str:
    """The function of a direction whose program has stages."""
    if layout.forward:
        name, inputs = "forward", "u, v, s, p, x, results, count, out"
        sizes = {"next": len(derived.states), "saved": len(derived.saved)}
    else:
        name, inputs = "backward", "saved, s, p, after, dafter, x, back, results, count, out"
        sizes = {"du": len(derived.inputs), "dv": len(derived.recurrent)}
        sizes |= {"ds": len(derived.states), "dp": len(derived.params)}
        sizes["operand"] = sum(site.kind == "product" for site in derived.sites)
    elements = [f"{array}[{k}]" for array, size in sizes.items() for k in range(size)]
    as_before = {element: f"out[{k}]" for k, element in enumerate(elements)}
    as_before |= {f"x_out[{k}]": f"x[{k}]" for k in range(layout.program.temporaries)}
    as_before |= {f"part[{k}]": "count" for k in range(len(layout.results))}
    lines = [f"@triton.jit\ndef {name}(STAGE: tl.constexpr, {inputs}):"]
    for k, stage in enumerate(layout.program.stages):
        lines += [f"    {'if' if k == 0 else 'elif'} STAGE == {k}:"]
        lines += [f"        {line}" for line in _stage(derived, layout, stage, as_before)]
    return "".join(f"{line}\n" for line in lines)


def _stage(
    derived: Derived, layout: Layout, stage: Stage, as_before: Mapping[str, str]
) -> list[str]:
    leaves = _Leaves(layout.places | derived.places("after", "dafter"))
    rows, row_names = write(list(stage.rows), leaves)
    row_lines = [f"{to} = {text}" for _, to, text in rows]
    row_lines += [f"r{j} = {name}" for j, name in enumerate(row_names)]
    leaves.places = {**leaves.places, **{f"row.{j}": f"r{j}" for j in range(len(stage.rows))}}
    targets = layout.targets(stage)
    lines, names = write(list(targets.values()), leaves)
    made = {**as_before, **dict(zip(targets, names, strict=True))}
    return [
        *leaves.lines(),
        *row_lines,
        *(f"{to} = {text}" for _, to, text in lines),
        f"return ({', '.join(made.values())},)",
    ]
