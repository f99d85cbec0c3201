"""Writes a cell as two Triton functions on blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import Expr, ordered, write

__all__ = ["module"]


def module(derived: Derived) -> str:
    """The source of a Triton module with the cell's two functions.

    `forward(u, v, s, p)` returns the next states and then the saved values.
    `backward(saved, s, p, after, dafter)` returns the gradients of `u`, `v`, the states and the
    parameters. Arguments and results are tuples of blocks; parameters have one row. For a summed
    gate `v` is the sum of both projections, `u` is not read, and both have the same gradient.
    """
    forward = _function(derived, "forward", ("u", "v", "s", "p"), derived.step)
    inputs = ("saved", "s", "p", "after", "dafter")
    backward = _function(derived, "backward", inputs, derived.gradients)
    called = sorted({n.op for n in ordered([*derived.step, *derived.gradients])} - _OPERATORS)
    return f"""\
# {derived.summary}
import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.math import {", ".join([*called, "constant"])}


{forward}

{backward}"""


_OPERATORS = frozenset(
    {"input", "const", "add", "sub", "mul", "div", "neg", "lt", "le", "gt", "ge", "eq", "ne"}
)


def _function(derived: Derived, name: str, inputs: Sequence[str], outputs: Sequence[Expr]) -> str:
    places = derived.places("after", "dafter")
    constants: dict[str, str] = {}

    def leaf(node: Expr) -> str:
        if node.op == "input":
            return places[node.label]
        return constants.setdefault(node.label, f"c{len(constants)}")

    lines, names = write(list(outputs), leaf)
    body = [f"{c} = constant({_number(v)}, s[0].dtype)" for v, c in constants.items()]
    body += [f"{to} = {text}" for _, to, text in lines]
    body += [f"return ({', '.join(names)},)"]
    head = f"@triton.jit\ndef {name}({', '.join(inputs)}):\n"
    return head + "".join(f"    {line}\n" for line in body)


def _number(label: str) -> str:
    return label if math.isfinite(float(label)) else f'float("{float(label)}")'
