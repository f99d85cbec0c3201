"""Writes a stack of layers as a stepper in plain C99: one source with its weights, and its header.

Products run over all gates of a row of weights at once, so weights lie transposed, [I, gates*H] and
[Q, gates*H], and compilers vectorise without reordering a sum. `c_plan.py` says which columns there
are and what a step consists of, `emit_c_step.py` writes the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrnn.compiler.c import array, comment, filled
from fastrnn.compiler.c import identifier as identifier
from fastrnn.compiler.c_functions import definitions
from fastrnn.compiler.c_plan import Plan, Weights, plan_of
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.emit_c_step import step_function
from fastrnn.compiler.expression import Expr, evaluate, uses

__all__ = ["identifier", "stepper"]


def stepper(
    derived: Derived,
    layers: Sequence[Weights],
    name: str,
    title: str,
    header: str,
    scales: Sequence[Sequence[Tensor | None]] = (),
    heads: int = 1,
) -> tuple[str, str]:
    """The texts of the source and of the header for layers of one cell in one direction.

    Args:
        layers: the weights of every layer, dense on the CPU; of all heads of the first, then of the
            second and so on.
        name: prefix of all public names, an identifier.
        title: says what the files are, for their first line.
        header: the header's file name.
        scales: for each of `layers` with int8 matrices, what the rows of `w_ih`, `w_hh` and `w_hr`
            are multiplied by, float32.
        heads: of a layer.
    """
    plan = plan_of(derived, layers, heads)
    arrays = [
        _operands(derived, plan, weights, scales[k] if scales else ())
        for k, weights in enumerate(layers)
    ]
    return _source(derived, plan, arrays, name, title, header), _header(plan, name, title)


# The header.


def _header(plan: Plan, name: str, title: str) -> str:
    upper = name.upper()
    members = "\n".join(
        f"  float {member}[{upper}_NUM_LAYERS][{upper}_{'HIDDEN' if k else 'OUTPUT'}_SIZE];"
        for k, member in enumerate(plan.members)
    )
    return f"""\
/* {comment(title)} */
#ifndef {upper}_H_
#define {upper}_H_

#define {upper}_INPUT_SIZE {plan.inputs}
#define {upper}_HIDDEN_SIZE {plan.hidden * plan.heads}
#define {upper}_OUTPUT_SIZE {plan.output * plan.heads}
#define {upper}_NUM_LAYERS {plan.layers}

#ifdef __cplusplus
extern "C" {{
#endif

/* One stream. It may be copied, and its members may be read and written between steps. */
struct {name}_state {{
{members}
}};

/* Set all states to zero, as before the first step of a sequence. */
void {name}_reset(struct {name}_state *state);

/* Run one step from x, {upper}_INPUT_SIZE numbers, to y, {upper}_OUTPUT_SIZE numbers.
   Both may be the same array. Different streams may run in different threads.
   A step needs {plan.stack} bytes of stack for its numbers. */
void {name}_step(struct {name}_state *state, const float *x, float *y);

#ifdef __cplusplus
}}
#endif

#endif
"""


# The source.


def _source(
    derived: Derived,
    plan: Plan,
    arrays: Sequence[Mapping[str, Tensor]],
    name: str,
    title: str,
    header: str,
) -> str:
    upper = name.upper()
    step, called = step_function(derived, plan, arrays[0], name)
    texts, calls = [], []
    for k, operands in enumerate(arrays):
        layer, head = divmod(k, plan.heads)
        suffix = f"l{layer}" + (f"_head{head}" if plan.heads > 1 else "")
        texts += [array(f"{kind}_{suffix}", numbers) for kind, numbers in operands.items()]
        h = f"state->{plan.members[0]}[{layer - 1}]"
        x = f"{h}, {upper}_OUTPUT_SIZE" if layer else f"x, {upper}_INPUT_SIZE"
        given = [str(layer), *([str(head)] if plan.heads > 1 else [])]
        given += [*([x] if plan.from_x else []), *(f"{kind}_{suffix}" for kind in operands)]
        calls.append(filled("  step_layer(", ["state", *given], ");"))
    sizes = []
    if plan.heads > 1:
        sizes = [f"#define {upper}_HEAD_SIZE ({upper}_HIDDEN_SIZE / {plan.heads})", ""]
    unused = [] if plan.from_x else ["  (void)x;"]
    return "\n".join(
        [
            f"/* {comment(title)} */",
            f"/* The cell {comment(derived.name)}: gates {comment(' '.join(derived.gates))}, "
            f"states {comment(' '.join(derived.states))}. */",
            "/* Compile it with -O3 -fno-trapping-math: GCC vectorises all loops then. */",
            f'#include "{header}"',
            "",
            "#include <float.h>",
            "#include <math.h>",
            "#include <stdint.h>",
            "#include <string.h>",
            "",
            *sizes,
            *(f"{text}\n" for text in (*texts, *definitions(called), step)),
            f"void {name}_reset(struct {name}_state *state) {{",
            "  memset(state, 0, sizeof *state);",
            "}",
            "",
            f"void {name}_step(struct {name}_state *state, const float *x, float *y) {{",
            *unused,
            *calls,
            f"  for (int i = 0; i < {upper}_OUTPUT_SIZE; ++i) {{",
            f"    y[i] = state->{plan.members[0]}[{upper}_NUM_LAYERS - 1][i];",
            "  }",
            "}",
            "",
        ]
    )


def _operands(
    derived: Derived, plan: Plan, weights: Weights, scales: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """The arrays of one layer, in the order of `step_layer`'s arguments. Gates of a matrix are
    chosen and transposed; those of its scales are chosen."""

    def blocks(weight: Tensor, gates: Sequence[int], rows: tuple[str, ...]) -> Tensor:
        parts = weight.split(plan.hidden)
        return torch.cat([weight[:0], *(parts[rows.index(derived.gates[g])] for g in gates)])

    of_ih, of_hh, of_hr = scales or (None, None, None)
    found: dict[str, Tensor] = {}
    matrices = [("ih", weights.w_ih, of_ih, plan.from_x, derived.inputs)]
    matrices += [(p.name, weights.w_hh, of_hh, p.gates, derived.recurrent) for p in plan.products]
    for side, matrix, scale, gates, rows in matrices:
        if gates:
            found[f"w_{side}"] = blocks(matrix, gates, rows).T
            if scale is not None:
                found[f"scale_{side}"] = blocks(scale, gates, rows)
    b_ih, b_hh = weights.b_ih, weights.b_hh
    if b_ih is not None and b_hh is not None and plan.labels:
        own: list[Tensor] = []
        for kind, gate in (label.split(".", 1) for label in plan.labels):
            place = [derived.gates.index(gate)]
            of_x = [blocks(b_ih, place, derived.inputs)] if kind != "v" else []
            of_h = [blocks(b_hh, place, derived.recurrent)] if kind != "u" else []
            own.append(torch.stack([*of_x, *of_h]).sum(0))
        found["bias"] = torch.cat(own)
    if weights.w_hr is not None:
        found["w_hr"] = weights.w_hr.T
        if of_hr is not None:
            found["scale_hr"] = of_hr
    learned_rows = [row for param in weights.params for row in param.split(plan.hidden)]
    values = {f"p.{n}": row for n, row in zip(derived.params, learned_rows, strict=True)}
    learned = [*_values(plan.units, values), *_values(plan.shared, values)]
    if learned:
        found["learned"] = torch.cat(learned)
    return found


def _values(roots: Sequence[Expr], values: Mapping[str, Tensor]) -> list[Tensor]:
    """The roots in float32, computed in float64; [H] for those with a number for each unit."""
    if not roots:
        return []
    read = {label: values[label].double() for label in uses(roots)}
    return [value.float() for value in evaluate(roots, read)]
