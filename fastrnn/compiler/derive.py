"""Everything that is derived from a cell's function: its derivative, what back-propagation keeps,
the C++ it compiles to and the text that explains it.

The function and its vector-Jacobian product are traced once (`trace.py`) into pointwise expressions
(`expression.py`). Two rules then shape them:

- **tied**: where the gradients of a gate's `u` and `v` are the same node, the cell depends on their
  sum `a` alone, and one array serves both.
- **keep**: backward is given the states before and after the step. Whatever follows from those is
  recomputed. Of the rest, the fewest values are kept from which backward follows by arithmetic
  alone, without a transcendental function.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrnn import cells
from fastrnn.cells import Cell, declare
from fastrnn.compiler.expression import (
    MASKS,
    TRANSCENDENTAL,
    Algebra,
    Expr,
    evaluate,
    ordered,
    uses,
    write,
)
from fastrnn.compiler.trace import Underivable, trace

__all__ = [
    "Derived",
    "Underivable",
    "cpp",
    "derive",
    "describe",
    "header",
    "key",
    "struct_name",
    "triton",
    "write_header",
]


@dataclass(frozen=True, eq=False)
class Derived:
    """What follows from a cell's function.

    Attributes:
        name, gates, states: the cell's.
        tied: per gate, whether the cell depends on `u + v` alone.
        kept: names of the values kept per unit and step for backward: a gate's name for what its
            nonlinearity gives, `v.n` or `u.n` for a raw projection, `a.n` for their sum.
        projectable: whether state 0 enters a step through `v` alone, so that it may be projected
            to another width between the steps.
        step: expressions of the next states and the kept values.
        gradients: expressions of the gradients of `u`, `v` and the states.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    tied: tuple[bool, ...]
    kept: tuple[str, ...]
    projectable: bool
    step: tuple[Expr, ...]
    gradients: tuple[Expr, ...]

    def forward(
        self, u: Sequence[Tensor], v: Sequence[Tensor], s: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step on tensors of one shape, one per gate and state: `(next, kept)`.

        State 0 of a projectable cell may have any shape.
        """
        inputs = _labelled("s", self.states, s)
        if self.projectable:
            del inputs[f"s.{self.states[0]}"]
        for name, tied, left, right in zip(self.gates, self.tied, u, v, strict=True):
            if tied:
                inputs[f"a.{name}"] = left + right
            else:
                inputs |= {f"u.{name}": left, f"v.{name}": right}
        out = evaluate(self.step, inputs)
        return out[: len(self.states)], out[len(self.states) :]

    def backward(
        self,
        kept: Sequence[Tensor],
        s: Sequence[Tensor],
        next: Sequence[Tensor],
        dnext: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients `(du, dv, ds)` of that step, from `dnext`, those of its next states."""
        inputs = _labelled("s", self.states, s)
        inputs |= _labelled("next", self.states, next)
        inputs |= _labelled("dnext", self.states, dnext)
        inputs |= _labelled("kept", self.kept, kept)
        out = evaluate(self.gradients, inputs)
        count = len(self.gates)
        return out[:count], out[count : 2 * count], out[2 * count :]


def _labelled(kind: str, names: Sequence[str], values: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": value for name, value in zip(names, values, strict=True)}


def derive(cell: Cell) -> Derived:
    """Derive everything from a cell; remembered per cell.

    Raises:
        Underivable: names what the function does that no pointwise formula can.
    """
    found = _derive(cell)
    if isinstance(found, Underivable):
        raise Underivable(*found.args) from found.__cause__
    return found


@functools.cache
def _derive(cell: Cell) -> Derived | Underivable:
    if torch.version.cuda:
        # Without it, a torch 2.11 built for CUDA crashes in the second such thread where no GPU is.
        torch._C._ensureCUDADeviceGuardSet()
    # A new thread has none of the caller's modes: autocast, fake tensors, functorch levels. Random
    # numbers that the cell draws while it is traced are not missing later.
    with ThreadPoolExecutor(1) as alone, torch.random.fork_rng(devices=[]):
        try:
            return alone.submit(_derive_here, cell).result()
        except Underivable as reason:
            return reason


def _derive_here(cell: Cell) -> Derived:
    algebra = Algebra()
    traced = trace(algebra, cell)
    count, states = len(cell.gates), len(cell.states)
    du, dv = traced[states : states + count], traced[states + count : states + 2 * count]
    tied, traced = _tie(algebra, cell, traced, [a is b for a, b in zip(du, dv, strict=True)])
    step, gradients = traced[:states], traced[states:]
    gradients = _without_zero_gradients(algebra, gradients)
    available = {
        node: algebra.input(f"next.{name}")
        for node, name in reversed(list(zip(step, cell.states, strict=True)))
        if node.op != "const" and not node.label.startswith("s.")
    }
    kept = _name(_keep(gradients, available), available, cell.gates)
    known = available | {node: algebra.input(f"kept.{name}") for name, node in kept.items()}
    gradients = algebra.rebuild(gradients, known)
    first = f"s.{cell.states[0]}"
    return Derived(
        name=cell.name,
        gates=cell.gates,
        states=cell.states,
        tied=tied,
        kept=tuple(kept),
        projectable=first not in uses([*gradients, *step, *kept.values()])
        and gradients[2 * count].constant == 0,
        step=(*step, *kept.values()),
        gradients=gradients,
    )


# The rules.


def _tie(
    algebra: Algebra, cell: Cell, traced: tuple[Expr, ...], alike: list[bool]
) -> tuple[tuple[bool, ...], tuple[Expr, ...]]:
    """Replace `v` by the sum `a` and `u` by nothing, for each gate where that is the same cell."""
    tied = list(alike)
    for k, name in enumerate(cell.gates):
        if not tied[k]:
            continue
        u, v, a = (algebra.input(f"{side}.{name}") for side in "uva")
        summed = algebra.rebuild(traced, {u: algebra.const(0), v: a})
        # Equal gradients say nothing about what has none, such as sign(u) or a comparison.
        tied[k] = _agree(algebra, traced, algebra.rebuild(summed, {a: algebra.make("add", u, v)}))
        if tied[k]:
            traced = summed
    return tuple(tied), traced


def _agree(algebra: Algebra, some: tuple[Expr, ...], others: tuple[Expr, ...]) -> bool:
    """Whether two lists of expressions have the same values, at random points of all scales."""
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


def _without_zero_gradients(algebra: Algebra, gradients: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Drop products of a gradient that is zero by construction, as behind `sign` or `floor`.

    Where the other factor depends on a gradient, the zero is the cell's own and stays.
    """

    def rule(node: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if node.op in ("mul", "div"):
            for zero, other in (args, args[::-1])[: 2 if node.op == "mul" else 1]:
                if zero.constant == 0 and not any(n.startswith("dnext.") for n in uses([other])):
                    return algebra.const(0)
        return None

    return algebra.rebuild(gradients, {}, rule)


def _keep(gradients: tuple[Expr, ...], available: Mapping[Expr, Expr]) -> list[Expr]:
    """The fewest nodes from which, with the states, the gradients follow by arithmetic alone.

    That is a minimum vertex cut between what only the forward step knows (the gates, and the
    values of transcendental functions) and what backward reads; of several, the one nearest to
    the former. Masks cannot be kept.
    """
    order = ordered(gradients, stop=available)
    known: set[Expr] = set(available)  # follows from the states
    backward: set[Expr] = set()  # involves a gradient
    for node in order:
        if any(a in backward for a in node.args) or node.label.startswith("dnext."):
            backward.add(node)
        elif all(a in known for a in node.args) and node.label[:2] not in ("u.", "v.", "a."):
            known.add(node)
    origin, goal = ("origin", 0), ("goal", 0)
    edges: dict[Any, dict[Any, float]] = {origin: {}, goal: {}}

    def connect(a: Any, b: Any, capacity: float) -> None:
        edges.setdefault(a, {})[b] = capacity
        edges.setdefault(b, {}).setdefault(a, 0)

    for node in order:
        if node in known:
            continue
        if node in backward:
            for arg in node.args:
                if arg not in backward and arg not in known:
                    connect((arg, 1), goal, float("inf"))
            continue
        connect((node, 0), (node, 1), float("inf") if node.op in MASKS else 1)
        if not node.args or node.op in TRANSCENDENTAL:
            connect(origin, (node, 0), float("inf"))
        else:
            for arg in node.args:
                if arg not in known:
                    connect((arg, 1), (node, 0), float("inf"))
    while goal in (came := _reach(edges, origin)):
        place = goal
        while place != origin:
            before = came[place]
            edges[before][place] -= 1
            edges[place][before] += 1
            place = before
    return [n for n in order if (n, 0) in came and (n, 1) in edges and (n, 1) not in came]


def _reach(edges: Mapping[Any, Mapping[Any, float]], start: Any) -> dict[Any, Any]:
    """Every place with a way of free capacity from the start, and the place before it."""
    came = {start: start}
    queue = [start]
    for place in queue:
        for after, capacity in edges[place].items():
            if capacity > 0 and after not in came:
                came[after] = place
                queue.append(after)
    return came


def _name(
    kept: list[Expr], available: Mapping[Expr, Expr], gates: tuple[str, ...]
) -> dict[str, Expr]:
    """Names for kept values, in the order of the gates they belong to."""
    claims: list[tuple[int, int, str, Expr]] = []
    for place, node in enumerate(kept):
        near = sorted(_near_gates(node, available), key=lambda label: gates.index(label[2:]))
        raw = node.op == "input"
        single = near[0] if near and len({label[2:] for label in near}) == 1 else ""
        name = (single if raw else single[2:]) or ""
        rank = len(gates) * 2 if not name else gates.index(single[2:]) + (len(gates) if raw else 0)
        claims.append((rank, place, name, node))
    names: dict[str, Expr] = {}
    for _, _, name, node in sorted(claims, key=lambda claim: claim[:2]):
        if not name or name in names:
            name = next(f"k{i}" for i in range(len(kept) + 1) if f"k{i}" not in names)
        names[name] = node
    return names


def _near_gates(node: Expr, available: Mapping[Expr, Expr]) -> set[str]:
    """Inputs of gates that a node depends on through the fewest nonlinearities, one at most."""

    @functools.cache
    def within(at: Expr, nonlinearities: int) -> frozenset[str]:
        if at.op == "input" and at.label[:2] in ("u.", "v.", "a."):
            return frozenset({at.label})
        left = nonlinearities - (at.op in TRANSCENDENTAL)
        if left < 0 or at in available:
            return frozenset()
        return frozenset().union(*(within(arg, left) for arg in at.args))

    return set(within(node, 0) or within(node, 1))


# Writing.


def struct_name(name: str) -> str:
    """The C++ name of a cell: `gru` is `Gru`, `my_cell-1f` is `MyCell1f`."""
    words = [w for w in re.split(r"[^0-9A-Za-z]+", name) if w]
    camel = "".join(w[0].upper() + w[1:] for w in words)
    return camel if camel and not camel[0].isdigit() else f"Cell{camel}"


def cpp(derived: Derived, name: str | None = None) -> str:
    """The C++ struct of a cell, known to the kernels as `name` (the cell's own by default)."""
    name = name or derived.name
    gates, states, kept = len(derived.gates), len(derived.states), len(derived.kept)
    forward = _cpp_function(
        derived,
        "forward",
        ("u", "v", "s"),
        {"next": derived.step[:states], "kept": derived.step[states:]},
    )
    backward = _cpp_function(
        derived,
        "backward",
        ("kept", "s", "next", "dnext"),
        {
            "du": derived.gradients[:gates],
            "dv": derived.gradients[gates : 2 * gates],
            "ds": derived.gradients[2 * gates :],
        },
    )
    return f"""\
// {_one_line(derived.name)}: gates {" ".join(derived.gates)}, states {" ".join(derived.states)}; \
keeps {" ".join(derived.kept) or "nothing"}
struct {struct_name(name)} {{
  static constexpr const char* kName = {json.dumps(name)};
  static constexpr int kGates = {gates}, kStates = {states}, kKept = {kept};
  static constexpr bool kTied[kGates] = {_cpp_bools(derived.tied)};
  // Whether state 0 comes in through v alone.
  static constexpr bool kProjectable = {"true" if derived.projectable else "false"};
  // For a tied gate v[g] is the sum of both projections, u[g] is not read, and du[g] equals dv[g].
  // All reads come before the first write, so that outputs may lie where inputs did.
{forward}
{backward}
}};
"""


def _cpp_bools(values: Iterable[bool]) -> str:
    return "{" + ", ".join("true" if v else "false" for v in values) + "}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip("\\")


def _cpp_function(
    derived: Derived, name: str, inputs: Sequence[str], outputs: Mapping[str, tuple[Expr, ...]]
) -> str:
    places = {f"{side}.{g}": f"{side}[{k}]" for side in "uv" for k, g in enumerate(derived.gates)}
    places |= {f"a.{g}": f"v[{k}]" for k, g in enumerate(derived.gates)}
    places |= {
        f"{side}.{s}": f"{side}[{k}]"
        for side in ("s", "next", "dnext")
        for k, s in enumerate(derived.states)
    }
    places |= {f"kept.{n}": f"kept[{k}]" for k, n in enumerate(derived.kept)}

    def leaf(node: Expr) -> str:
        return places[node.label] if node.op == "input" else f"splat<V>({_cpp_number(node.label)})"

    roots = [root for group in outputs.values() for root in group]
    passed = dict.fromkeys(root for root in roots if root.op == "input")
    copies = {root: f"r{k}" for k, root in enumerate(passed)}
    lines, names = write(roots, leaf)
    body = [f"const V {copy} = {leaf(root)};" for root, copy in copies.items()]
    body += [f"const {'auto' if n.op in MASKS else 'V'} {to} = {text};" for n, to, text in lines]
    targets = [f"{array}[{k}]" for array, group in outputs.items() for k in range(len(group))]
    body += [
        f"{target} = {copies.get(root, text)};"
        for target, root, text in zip(targets, roots, names, strict=True)
    ]
    read = {places[label].split("[")[0] for label in uses(roots)}
    parameters = [f"const V* {n if n in read else f'/*{n}*/'}" for n in inputs]
    parameters += [f"V* {n if group else f'/*{n}*/'}" for n, group in outputs.items()]
    opening = f"  FASTRNN_HD FASTRNN_INLINE static void {name}("
    signature = f"{opening}{', '.join(parameters)}) {{"
    if len(signature) > 100:
        half = len(inputs)
        parts = (", ".join(parameters[:half]), ", ".join(parameters[half:]))
        signature = f"{opening}\n      {parts[0]},\n      {parts[1]}) {{"
    return "\n".join(["  template <class V>", signature, *(f"    {line}" for line in body), "  }"])


def _cpp_number(label: str) -> str:
    value = float(label)
    if value != value:
        return "std::numeric_limits<double>::quiet_NaN()"
    if value in (float("inf"), float("-inf")):
        return ("-" if value < 0 else "") + "std::numeric_limits<double>::infinity()"
    return label


def triton(derived: Derived) -> str:
    """The cell's two functions as the source of a Triton module.

    `forward(u, v, s)` gives the next states and then the kept values, and
    `backward(kept, s, after, dafter)` the gradients of `u`, `v` and the states, all as tuples of
    blocks. For a tied gate `v` is the sum of both projections, `u` is not read, and the gradients
    of both are the same.
    """
    forward = _triton_function(derived, "forward", ("u", "v", "s"), derived.step)
    backward = _triton_function(
        derived, "backward", ("kept", "s", "after", "dafter"), derived.gradients
    )
    called = sorted({n.op for n in ordered([*derived.step, *derived.gradients])} - _OPERATORS)
    return f"""\
# {_one_line(derived.name)}: gates {" ".join(derived.gates)}, states {" ".join(derived.states)}; \
keeps {" ".join(derived.kept) or "nothing"}
import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.math import {", ".join([*called, "constant"])}


{forward}

{backward}"""


_OPERATORS = frozenset(
    {"input", "const", "add", "sub", "mul", "div", "neg", "lt", "le", "gt", "ge", "eq", "ne"}
)


def _triton_function(
    derived: Derived, name: str, inputs: Sequence[str], outputs: Sequence[Expr]
) -> str:
    places = {f"{side}.{g}": f"{side}[{k}]" for side in "uv" for k, g in enumerate(derived.gates)}
    places |= {f"a.{g}": f"v[{k}]" for k, g in enumerate(derived.gates)}
    for k, state in enumerate(derived.states):
        places |= {f"s.{state}": f"s[{k}]", f"next.{state}": f"after[{k}]"}
        places[f"dnext.{state}"] = f"dafter[{k}]"
    places |= {f"kept.{n}": f"kept[{k}]" for k, n in enumerate(derived.kept)}
    constants: dict[str, str] = {}

    def leaf(node: Expr) -> str:
        if node.op == "input":
            return places[node.label]
        return constants.setdefault(node.label, f"c{len(constants)}")

    lines, names = write(list(outputs), leaf)
    body = [f"{c} = constant({_triton_number(v)}, s[0].dtype)" for v, c in constants.items()]
    body += [f"{to} = {text}" for _, to, text in lines]
    body += [f"return ({', '.join(names)},)"]
    head = f"@triton.jit\ndef {name}({', '.join(inputs)}):\n"
    return head + "".join(f"    {line}\n" for line in body)


def _triton_number(label: str) -> str:
    return label if math.isfinite(float(label)) else f'float("{float(label)}")'


def header(deriveds: Sequence[Derived], names: Sequence[str] | None = None) -> str:
    """The header that `csrc/cell.h` includes: the structs, and their list as `FASTRNN_CELLS(X)`."""
    keys = list(names or (d.name for d in deriveds))
    structs = [struct_name(k) for k in keys]
    if len(set(structs)) != len(structs):
        raise ValueError(f"cells need different names in C++, got {', '.join(structs)}")
    body = "\n".join(cpp(d, k) for d, k in zip(deriveds, keys, strict=True))
    return f"""\
// Generated from fastrnn/cells by fastrnn/compiler.
#ifndef FASTRNN_CELLS_GEN_H_
#define FASTRNN_CELLS_GEN_H_

#include <limits>

#include "math.h"

namespace fastrnn {{
inline namespace FASTRNN_ISA {{

{body}
}}  // namespace FASTRNN_ISA
}}  // namespace fastrnn

#define FASTRNN_CELLS(X) {" ".join(f"X({s})" for s in structs)}

#endif  // FASTRNN_CELLS_GEN_H_
"""


def write_header(path: str | Path) -> bool:
    """Write the header of the built-in cells where it differs from what is there.

    Returns:
        Whether it was written, so that an unchanged one does not cause a rebuild.
    """
    built_in = [name for name in cells.names() if name in declare._built_in]
    text = header([derive(cells.get(name)) for name in built_in])
    target = Path(path)
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return True


def describe(derived: Derived) -> str:
    """What is derived from a cell, as text: equations, tied gates, kept values and costs.

    A prime marks a state after the step, `dx` the gradient of `x`, and `a` is `u + v`.
    """
    gates, states = len(derived.gates), len(derived.states)
    after = [f"{name}'" for name in derived.states]
    forward = dict(zip(after, derived.step[:states], strict=True))
    backward: dict[str, Expr] = {}
    du, dv = derived.gradients[:gates], derived.gradients[gates : 2 * gates]
    for name, tied, left, right in zip(derived.gates, derived.tied, du, dv, strict=True):
        backward |= {f"da.{name}": left} if tied else {f"du.{name}": left, f"dv.{name}": right}
    ds = derived.gradients[2 * gates :]
    backward |= {f"d{name}": expr for name, expr in zip(derived.states, ds, strict=True)}
    kept = dict(zip(derived.step[states:], derived.kept, strict=True))
    sums = [name for name, tied in zip(derived.gates, derived.tied, strict=True) if tied]
    return "\n".join(
        [
            f"cell {derived.name}",
            f"  gates   {' '.join(derived.gates)}",
            f"  states  {' '.join(derived.states)}",
            f"  tied    {' '.join(sums) or 'none'}",
            f"  keeps   {' '.join(derived.kept) or 'nothing'}: {4 * len(kept)} bytes per unit and "
            "step in float32, besides the states",
            "",
            f"forward: {_cost(derived.step)}",
            *_equations(forward, kept),
            "",
            f"backward: {_cost(derived.gradients)}",
            *_equations(backward, {}),
        ]
    )


def _equations(targets: Mapping[str, Expr], names: Mapping[Expr, str]) -> list[str]:
    def leaf(node: Expr) -> str:
        if node.op == "const":
            return node.label.removesuffix(".0")
        kind, name = node.label.split(".", 1)
        shown = {"s": name, "next": f"{name}'", "dnext": f"d{name}'", "kept": name}
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


def _cost(roots: Sequence[Expr]) -> str:
    done = [node for node in ordered(roots) if node.args]
    dear = sum(node.op in TRANSCENDENTAL for node in done)
    return f"{len(done)} operation{'s' * (len(done) != 1)}, {dear} transcendental"


@functools.cache
def key(cell: Cell) -> str:
    """The name under which the kernels know a cell.

    Built-in cells keep theirs. Others get a digest of what was derived from them, so that a cell
    declared anew never meets old code.

    Raises:
        Underivable: see `derive`.
    """
    if cell.name in declare._built_in and cells.get(cell.name) == cell:
        return cell.name
    return f"{cell.name}-{hashlib.sha256(cpp(derive(cell)).encode()).hexdigest()[:8]}"
