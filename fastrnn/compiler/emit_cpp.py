"""Writes a cell as a C++ struct, for CPUs and for CUDA."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastrnn.cells import Cell, get, names
from fastrnn.compiler import emit_stages
from fastrnn.compiler.cpp import function
from fastrnn.compiler.derive import Derived, derive
from fastrnn.compiler.expression import Expr

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
    shared = sum(shared << k for k, shared in enumerate(derived.shared))
    entries = "kGates" if derived.has_all_rows else ""
    functions = emit_stages.members(derived) if derived.programs else _pointwise(derived)
    return f"""\
// {derived.summary}
struct {struct_name(name)} {{
  static constexpr const char* kName = {json.dumps(name)};
  static constexpr int kGates = {gates}, kStates = {states}, kSaved = {saved};
  static constexpr int kParams = {len(derived.params)};
  static constexpr unsigned kSharedParams = {shared};  // bit k: parameter k is one for all units
{_gate_params(derived)}{_same_gradients(derived)}{_draws(derived)}{_rows(derived)}{_limit(derived)}\
  static constexpr bool kSummed[{entries}] = {_bools(derived.summed or (False,))};
  // Whether state 0 comes in through v alone.
  static constexpr bool kProjectable = {"true" if derived.projectable else "false"};
  // For a summed gate v[g] is the sum of both projections, u[g] is not read, du[g] equals dv[g].
  // All reads come before the first write, so that outputs may lie where inputs did.
{functions}
}};
"""


def _bools(values: Iterable[bool]) -> str:
    return "{" + ", ".join("true" if v else "false" for v in values) + "}"


def _gate_params(derived: Derived) -> str:
    bits = derived.gate_params()
    return f"  static constexpr unsigned kGateParams = {bits};  // bit k: G rows from k\n" * bool(
        bits
    )


def _same_gradients(derived: Derived) -> str:
    dp = derived.grouped(derived.gradients)[3]
    first = [dp.index(gradient) for gradient in dp]
    if first == list(range(len(dp))):
        return ""
    numbers = ", ".join(map(str, first))
    return f"  static constexpr int kSameGradient[] = {{{numbers}}};  // the first like each of p\n"


def _rows(derived: Derived) -> str:
    if derived.has_all_rows:
        return ""
    inputs, recurrent = derived.inputs, derived.recurrent
    places = [inputs.index(name) if name in inputs else -1 for name in recurrent]
    return (
        f"  static constexpr int kInputGates = {len(inputs)}, kRecurrentGates = {len(recurrent)};\n"
        f"  static constexpr int kInputOf[] = {{{', '.join(map(str, places or [-1]))}}};  "
        "// for each of v its place in u\n"
    )


def _draws(derived: Derived) -> str:
    draws = derived.draws
    if not draws:
        return ""
    per_sequence = sum((d.per == "sequence") << k for k, d in enumerate(draws))
    scaled = sum(d.scaled << k for k, d in enumerate(draws))
    return (
        f"  static constexpr int kDraws = {len(draws)};  // random numbers, in p\n"
        f"  static constexpr unsigned kSequenceDraws = {per_sequence}, kScaledDraws = {scaled};\n"
    )


def _limit(derived: Derived) -> str:
    if derived.limit is None:
        return ""
    return f"  static constexpr double kLimit = {derived.limit!r};  // of the gradients dnext\n"


def _pointwise(derived: Derived) -> str:
    states, places = len(derived.states), derived.places()
    params = ("p",) if derived.params or derived.draws else ()
    step = _elements(next=derived.step[:states], saved=derived.step[states:])
    forward = function("forward", places, ("u", "v", "s", *params), step, ("next", "saved"))
    du, dv, ds, dp = derived.grouped(derived.gradients)
    back = _elements(du=du, dv=dv, ds=ds, dp=dp)
    inputs, outputs = ("saved", "s", *params, "next", "dnext"), ("du", "dv", "ds", "dp")
    backward = function("backward", places, inputs, back, outputs[: 3 + len(params)])
    return f"{forward}\n{backward}"


def _elements(**arrays: Sequence[Expr]) -> dict[str, Expr]:
    """The expressions by the elements of the arrays that they are assigned to."""
    return {f"{name}[{k}]": e for name, group in arrays.items() for k, e in enumerate(group)}


def header(deriveds: Sequence[Derived], keys: Sequence[str] | None = None) -> str:
    """The header that `csrc/core/cell.h` includes: structs, and their list `FASTRNN_CELLS(X)`."""
    keys = list(keys or (d.name for d in deriveds))
    structs = [struct_name(k) for k in keys]
    if len(set(structs)) != len(structs):
        raise ValueError(f"cells need different names in C++, got {', '.join(structs)}")
    body = "\n".join(struct(d, k) for d, k in zip(deriveds, keys, strict=True))
    includes = ["core/math.h", *(["core/stages.h"] if any(d.programs for d in deriveds) else [])]
    included = "\n".join(f'#include "{name}"' for name in includes)
    return f"""\
// Generated from fastrnn/cells by fastrnn/compiler.
#ifndef FASTRNN_CELLS_GEN_H_
#define FASTRNN_CELLS_GEN_H_

#include <limits>

{included}

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
