"""Writes a cell as a C++ struct, for CPUs and for CUDA."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastrnn.cells import Cell, get, names
from fastrnn.compiler.derive import Derived, derive
from fastrnn.compiler.expression import MASKS, Expr, ordered, uses, write

__all__ = ["header", "key", "struct", "struct_name", "write_header"]


def struct_name(name: str) -> str:
    """The C++ name of a cell: `gru` becomes `Gru`, `my_cell-1f` becomes `MyCell1f`."""
    words = [w for w in re.split(r"[^0-9A-Za-z]+", name) if w]
    camel = "".join(w[0].upper() + w[1:] for w in words)
    return camel if camel and not camel[0].isdigit() else f"Cell{camel}"


def struct(derived: Derived, name: str | None = None) -> str:
    """The C++ struct of a cell, known to the kernels as `name` (the cell's own by default)."""
    name = name or derived.name
    gates, states, saved = len(derived.gates), len(derived.states), len(derived.saved)
    params = ("p",) if derived.params else ()
    forward = _function(
        derived,
        "forward",
        ("u", "v", "s", *params),
        {"next": derived.step[:states], "saved": derived.step[states:]},
    )
    du, dv, ds, dp = derived.grouped(derived.gradients)
    outputs = {"du": du, "dv": dv, "ds": ds} | ({"dp": dp} if params else {})
    backward = _function(derived, "backward", ("saved", "s", *params, "next", "dnext"), outputs)
    shared = sum(shared << k for k, shared in enumerate(derived.shared))
    return f"""\
// {derived.summary}
struct {struct_name(name)} {{
  static constexpr const char* kName = {json.dumps(name)};
  static constexpr int kGates = {gates}, kStates = {states}, kSaved = {saved};
  static constexpr int kParams = {len(derived.params)};
  static constexpr unsigned kSharedParams = {shared};  // bit k: parameter k is one for all units
  static constexpr bool kSummed[kGates] = {_bools(derived.summed)};
  // Whether state 0 comes in through v alone.
  static constexpr bool kProjectable = {"true" if derived.projectable else "false"};
  // For a summed gate v[g] is the sum of both projections, u[g] is not read, du[g] equals dv[g].
  // All reads come before the first write, so that outputs may lie where inputs did.
{forward}
{backward}
}};
"""


def _bools(values: Iterable[bool]) -> str:
    return "{" + ", ".join("true" if v else "false" for v in values) + "}"


def _function(
    derived: Derived, name: str, inputs: Sequence[str], outputs: Mapping[str, Sequence[Expr]]
) -> str:
    places = derived.places()

    def leaf(node: Expr) -> str:
        return places[node.label] if node.op == "input" else f"splat<V>({_number(node.label)})"

    roots = _fused([root for group in outputs.values() for root in group])
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


def _fused(roots: Sequence[Expr]) -> list[Expr]:
    """The roots with every sum of a product that nothing else uses as one multiply-add.

    Compilers may fuse no other (`-ffp-contract=off`), so a cell gives the same bits in every kernel
    that it is inlined into.
    """
    count = Counter(roots)
    order = ordered(roots)
    count.update(arg for node in order for arg in node.args)
    new: dict[Expr, Expr] = {}
    for node in order:
        args = tuple(new[arg] for arg in node.args)
        products = [k for k, arg in enumerate(node.args) if arg.op == "mul" and count[arg] == 1]
        if node.op in _FUSED and products:
            k = products[-1]
            new[node] = Expr(_FUSED[node.op][k], (*args[k].args, args[1 - k]))
        else:
            new[node] = Expr(node.op, args, node.label) if args else node
    return [new[root] for root in roots]


# The function of csrc/core/vec.h for a sum whose first or second term is a product.
_FUSED = {
    "add": ("multiply_add", "multiply_add"),
    "sub": ("multiply_subtract", "subtract_product"),
}


def _number(label: str) -> str:
    value = float(label)
    if value != value:
        return "std::numeric_limits<double>::quiet_NaN()"
    if value in (float("inf"), float("-inf")):
        return ("-" if value < 0 else "") + "std::numeric_limits<double>::infinity()"
    return label


def header(deriveds: Sequence[Derived], keys: Sequence[str] | None = None) -> str:
    """The header that `csrc/core/cell.h` includes: structs, and their list `FASTRNN_CELLS(X)`."""
    keys = list(keys or (d.name for d in deriveds))
    structs = [struct_name(k) for k in keys]
    if len(set(structs)) != len(structs):
        raise ValueError(f"cells need different names in C++, got {', '.join(structs)}")
    body = "\n".join(struct(d, k) for d, k in zip(deriveds, keys, strict=True))
    return f"""\
// Generated from fastrnn/cells by fastrnn/compiler.
#ifndef FASTRNN_CELLS_GEN_H_
#define FASTRNN_CELLS_GEN_H_

#include <limits>

#include "core/math.h"

namespace fastrnn {{
inline namespace FASTRNN_ISA {{

{body}
}}  // namespace FASTRNN_ISA
}}  // namespace fastrnn

#define FASTRNN_CELLS(X) {" ".join(f"X({s})" for s in structs)}

#endif  // FASTRNN_CELLS_GEN_H_
"""


def write_header(path: str | Path) -> bool:
    """Write the header of the built-in cells to `path`, unless the file has this content already.

    Returns:
        Whether it was written. An unchanged header causes no rebuild.
    """
    text = header([derive(cell) for cell in map(get, names()) if cell.is_built_in])
    target = Path(path)
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return True


@functools.cache
def key(cell: Cell) -> str:
    """The name under which the kernels know a cell.

    A built-in cell keeps its own name. A custom cell's name gets a digest of its C++ struct, so
    that a cell that is declared again never runs old code.

    Raises:
        Underivable: see `derive`.
    """
    if cell.is_built_in:
        return cell.name
    return f"{cell.name}-{hashlib.sha256(struct(derive(cell)).encode()).hexdigest()[:8]}"
