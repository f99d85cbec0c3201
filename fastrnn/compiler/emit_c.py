"""Writes a stack of layers as a stepper in plain C99: one source with its weights, and its header.

Products run over all gates of a row of weights at once, so weights lie transposed, [I, gates*H] and
[Q, gates*H], and compilers vectorise without reordering a sum. One array holds the gates of a step:
`u` of the gates that are not summed, the summed gates, and `v` of the gates that are not summed. So
both products write into contiguous columns, and columns that a cell does not read are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import MASKS, Expr, evaluate, ordered, uses, write

__all__ = ["Weights", "identifier", "stepper"]


class Weights(Protocol):
    """The weights of one layer in torch's layout, as `kernels.operands.Weights`: float32, or int8
    matrices."""

    @property
    def w_ih(self) -> Tensor: ...
    @property
    def w_hh(self) -> Tensor: ...
    @property
    def b_ih(self) -> Tensor | None: ...
    @property
    def b_hh(self) -> Tensor | None: ...
    @property
    def w_hr(self) -> Tensor | None: ...
    @property
    def params(self) -> Sequence[Tensor]: ...


def identifier(text: str) -> str:
    """`text` as an identifier that C and C++ accept: `my gru-2` becomes `my_gru_2`.

    Raises:
        ValueError: if there is none.
    """
    name = re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_")
    if not name or name[0].isdigit() or name in _RESERVED:
        raise ValueError(f"{text!r} gives no name in C; a name begins with a letter, as 'my_gru'")
    return name


def stepper(
    derived: Derived,
    layers: Sequence[Weights],
    name: str,
    title: str,
    header: str,
    scales: Sequence[Sequence[Tensor | None]] = (),
) -> tuple[str, str]:
    """The texts of the source and of the header for layers of one cell in one direction.

    Args:
        layers: the weights of every layer, dense on the CPU.
        name: prefix of all public names, an identifier.
        title: says what the files are, for their first line.
        header: the header's file name.
        scales: for every layer with int8 matrices, what the rows of `w_ih`, `w_hh` and `w_hr` are
            multiplied by, float32.
    """
    plan = _plan(derived, layers)
    arrays = [
        _operands(derived, plan, weights, scales[k] if scales else ())
        for k, weights in enumerate(layers)
    ]
    return _source(derived, plan, arrays, name, title, header), _header(plan, name, title)


@dataclass(frozen=True)
class _Plan:
    """What the C of a cell looks like.

    Attributes:
        layers, inputs, hidden, output: the number of layers, `I` of the first, `H` and `Q`.
        biased, rounded: whether there are biases, and whether matrices are int8 with scales.
        projected: whether state 0 is projected to `Q` numbers.
        u, summed, v: indices of the gates in the three parts of the array of gates.
        units, shared: expressions of the learned parameters alone, which export computes: those
            with a number for each unit, and those with one for all.
        step: the next states, from gates, states and the values of those expressions.
        members: names of the states in the public struct.
    """

    layers: int
    inputs: int
    hidden: int
    output: int
    biased: bool
    rounded: bool
    projected: bool
    u: tuple[int, ...]
    summed: tuple[int, ...]
    v: tuple[int, ...]
    units: tuple[Expr, ...]
    shared: tuple[Expr, ...]
    step: tuple[Expr, ...]
    members: tuple[str, ...]

    @property
    def from_x(self) -> tuple[int, ...]:
        """The gates in a row of the input weights."""
        return self.u + self.summed

    @property
    def from_h(self) -> tuple[int, ...]:
        """The gates in a row of the recurrent weights."""
        return self.summed + self.v

    @property
    def columns(self) -> int:
        """The most columns of a matrix, in blocks of `H`, if sums of int8 need an array."""
        return max(len(self.from_x), len(self.from_h), self.projected) if self.rounded else 0

    @property
    def gates(self) -> int:
        """Blocks of `H` numbers in the array of gates."""
        return len(self.u + self.summed + self.v)


def _plan(derived: Derived, layers: Sequence[Weights]) -> _Plan:
    first = layers[0]
    units, shared, step = _without_params(derived)
    read = uses(step)
    every = range(len(derived.gates))
    return _Plan(
        layers=len(layers),
        inputs=first.w_ih.size(1),
        hidden=first.w_ih.size(0) // len(derived.inputs),
        output=first.w_hh.size(1),
        biased=first.b_ih is not None,
        rounded=first.w_ih.dtype == torch.int8,
        projected=first.w_hr is not None,
        u=tuple(g for g in every if f"u.{derived.gates[g]}" in read),
        summed=tuple(g for g in every if f"a.{derived.gates[g]}" in read),
        v=tuple(g for g in every if f"v.{derived.gates[g]}" in read),
        units=units,
        shared=shared,
        step=step,
        members=tuple(
            state if _can_be_a_member(state) else f"state_{k}"
            for k, state in enumerate(derived.states)
        ),
    )


def _can_be_a_member(name: str) -> bool:
    return bool(re.fullmatch(r"[a-z][a-z0-9_]*", name)) and name not in _RESERVED


def _without_params(
    derived: Derived,
) -> tuple[tuple[Expr, ...], tuple[Expr, ...], tuple[Expr, ...]]:
    """The largest expressions of learned parameters alone, of those with a number for each unit and
    of those without, and the step in which they are the inputs `unit.k` and `shared.k`."""
    roots = derived.step[: len(derived.states)]
    kinds = {f"p.{n}": one for n, one in zip(derived.params, derived.shared, strict=True)}
    order = ordered(roots)
    below = {node: uses([node]) for node in order}

    def is_learned(node: Expr) -> bool:
        return bool(below[node]) and below[node] <= set(kinds) and node.op not in MASKS

    wanted = [a for node in order if not is_learned(node) for a in node.args if is_learned(a)]
    chosen = dict.fromkeys([*wanted, *(root for root in roots if is_learned(root))])
    shared = [node for node in chosen if all(kinds[label] for label in below[node])]
    units = [node for node in chosen if node not in shared]
    new = {node: Expr("input", (), f"unit.{k}") for k, node in enumerate(units)}
    new |= {node: Expr("input", (), f"shared.{k}") for k, node in enumerate(shared)}
    for node in ordered(roots, stop=new.copy()):
        new[node] = Expr(node.op, tuple(new[a] for a in node.args), node.label)
    return tuple(units), tuple(shared), tuple(new[root] for root in roots)


# The header.


def _header(plan: _Plan, name: str, title: str) -> str:
    upper = name.upper()
    members = "\n".join(
        f"  float {member}[{upper}_NUM_LAYERS][{upper}_{'HIDDEN' if k else 'OUTPUT'}_SIZE];"
        for k, member in enumerate(plan.members)
    )
    stack = 4 * plan.hidden * (plan.gates + plan.projected + plan.columns)
    return f"""\
/* {_comment(title)} */
#ifndef {upper}_H_
#define {upper}_H_

#define {upper}_INPUT_SIZE {plan.inputs}
#define {upper}_HIDDEN_SIZE {plan.hidden}
#define {upper}_OUTPUT_SIZE {plan.output}
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
   A step needs {stack} bytes of stack for its numbers. */
void {name}_step(struct {name}_state *state, const float *x, float *y);

#ifdef __cplusplus
}}
#endif

#endif
"""


# The source.


def _source(
    derived: Derived,
    plan: _Plan,
    arrays: Sequence[Mapping[str, Tensor]],
    name: str,
    title: str,
    header: str,
) -> str:
    upper = name.upper()
    step = _step_layer(derived, plan, arrays[0], name)
    texts, calls = [], []
    for k, operands in enumerate(arrays):
        texts += [_array(f"{kind}_l{k}", numbers) for kind, numbers in operands.items()]
        h = f"state->{plan.members[0]}[{k - 1}]"
        x = f"{h}, {upper}_OUTPUT_SIZE" if k else f"x, {upper}_INPUT_SIZE"
        given = [str(k), *([x] if plan.from_x else []), *(f"{kind}_l{k}" for kind in operands)]
        calls.append(_filled("  step_layer(", ["state", *given], ");"))
    unused = [] if plan.from_x else ["  (void)x;"]
    helpers = _helpers(plan)
    return "\n".join(
        [
            f"/* {_comment(title)} */",
            f"/* The cell {_comment(derived.name)}: gates {_comment(' '.join(derived.gates))}, "
            f"states {_comment(' '.join(derived.states))}. */",
            "/* Compile it with -O3 -fno-trapping-math: GCC vectorises all loops then. */",
            f'#include "{header}"',
            "",
            "#include <float.h>",
            "#include <math.h>",
            "#include <stdint.h>",
            "#include <string.h>",
            "",
            *(f"{text}\n" for text in (*texts, *helpers, step)),
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
    derived: Derived, plan: _Plan, weights: Weights, scales: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """The arrays of one layer, in the order of `step_layer`'s arguments. Gates of a matrix are
    chosen and transposed; those of its scales are chosen."""

    def blocks(weight: Tensor, gates: Sequence[int], rows: tuple[str, ...]) -> Tensor:
        parts = weight.split(plan.hidden)
        return torch.cat([weight[:0], *(parts[rows.index(derived.gates[g])] for g in gates)])

    of_ih, of_hh, of_hr = scales or (None, None, None)
    found: dict[str, Tensor] = {}
    for side, matrix, scale, gates, rows in (
        ("ih", weights.w_ih, of_ih, plan.from_x, derived.inputs),
        ("hh", weights.w_hh, of_hh, plan.from_h, derived.recurrent),
    ):
        if gates:
            found[f"w_{side}"] = blocks(matrix, gates, rows).T
            if scale is not None:
                found[f"scale_{side}"] = blocks(scale, gates, rows)
    if weights.b_ih is not None and weights.b_hh is not None and plan.gates:
        of_x = blocks(weights.b_ih, plan.from_x, derived.inputs)
        of_h = blocks(weights.b_hh, plan.from_h, derived.recurrent)
        own, both = len(plan.u) * plan.hidden, len(plan.summed) * plan.hidden
        found["bias"] = torch.cat([of_x[:own], of_x[own:] + of_h[:both], of_h[both:]])
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


def _array(name: str, numbers: Tensor) -> str:
    """The definition of an array."""
    values = numbers.flatten().tolist()
    texts = [str(v) if numbers.dtype == torch.int8 else _number(v) for v in values]
    width = 18 if numbers.dtype == torch.int8 else 6
    rows = "".join(f"  {', '.join(texts[k : k + width])},\n" for k in range(0, len(texts), width))
    return f"static const {_type(numbers)} {name}[{len(texts)}] = {{\n{rows}}};"


def _type(numbers: Tensor) -> str:
    return "int8_t" if numbers.dtype == torch.int8 else "float"


def _number(value: float) -> str:
    """A literal of type float, exact if the value has that type."""
    if not math.isfinite(value):
        return "NAN" if value != value else "INFINITY" if value > 0 else "-INFINITY"
    text = f"{value:.9g}"
    return f"{text if set(text) & set('.e') else text + '.0'}f"


def _step_layer(derived: Derived, plan: _Plan, arrays: Mapping[str, Tensor], name: str) -> str:
    """The function that runs one step of one layer, with the arrays as its last arguments."""
    upper = name.upper()
    hidden, output = f"{upper}_HIDDEN_SIZE", f"{upper}_OUTPUT_SIZE"
    arguments = [f"struct {name}_state *state", "int layer"]
    if plan.from_x:
        arguments += ["const float *x", "int inputs"]
    arguments += [f"const {_type(numbers)} *{kind}" for kind, numbers in arrays.items()]

    def product(side: str, rows: str, columns: str, x: str, to: str) -> str:
        scaled = f", scale_{side}" if plan.rounded else ""
        part = ", part" if plan.rounded else ""
        function = "add_rounded_product" if plan.rounded else "add_product"
        return f"{function}({rows}, {columns}, w_{side}{scaled}, {x}{part}, {to});"

    body = [f"float *restrict s{k} = state->{m}[layer];" for k, m in enumerate(plan.members)]
    if plan.projected:
        body.append(f"float h[{hidden}];")
    if plan.columns:
        body.append(f"float part[{plan.columns} * {hidden}];")
    if plan.gates:
        body += [
            f"float gates[{plan.gates} * {hidden}];",
            f"for (int i = 0; i < {plan.gates} * {hidden}; ++i) {{",
            f"  gates[i] = {'bias[i]' if plan.biased else '0.0f'};",
            "}",
        ]
    if plan.from_x:
        body.append(product("ih", "inputs", f"{len(plan.from_x)} * {hidden}", "x", "gates"))
    if plan.from_h:
        to = f"gates + {len(plan.u)} * {hidden}" if plan.u else "gates"
        body.append(product("hh", output, f"{len(plan.from_h)} * {hidden}", "s0", to))
    body += [
        f"for (int i = 0; i < {hidden}; ++i) {{",
        *(f"  {line}" for line in _pointwise(derived, plan, hidden)),
        "}",
    ]
    if plan.projected:
        body += [
            f"for (int i = 0; i < {output}; ++i) {{",
            "  s0[i] = 0.0f;",
            "}",
            product("hr", hidden, output, "h", "s0"),
        ]
    head = _filled("static void step_layer(", arguments, ") {")
    return "\n".join([head, *(f"  {line}" for line in body), "}"])


def _filled(opening: str, arguments: Sequence[str], closing: str, width: int = 100) -> str:
    """Code with a list of arguments, in lines of at most `width` columns."""
    lines = [opening]
    for k, argument in enumerate(arguments):
        text = argument + (closing if k == len(arguments) - 1 else ",")
        if len(lines[-1]) + len(text) + 1 > width:
            lines.append(" " * len(opening) + text)
        else:
            lines[-1] += text if lines[-1] == opening else f" {text}"
    return "\n".join(lines)


def _pointwise(derived: Derived, plan: _Plan, hidden: str) -> list[str]:
    """The statements that compute the next states of unit `i`."""
    places: dict[str, str] = {}

    def add(label: str, array: str, block: int) -> None:
        places[label] = f"{array}[{f'{block} * {hidden} + ' if block else ''}i]"

    parts = [("u", g) for g in plan.u] + [("a", g) for g in plan.summed]
    for block, (kind, gate) in enumerate([*parts, *(("v", g) for g in plan.v)]):
        add(f"{kind}.{derived.gates[gate]}", "gates", block)
    for k, state in enumerate(derived.states):
        add(f"s.{state}", f"s{k}", 0)
    for k in range(len(plan.units)):
        add(f"unit.{k}", "learned", k)
    for k in range(len(plan.shared)):
        after = f"{len(plan.units)} * {hidden} + " if plan.units else ""
        places[f"shared.{k}"] = f"learned[{after}{k}]"

    # Everything is read before the first state is written.
    used = uses(plan.step)
    local = {label: _local(label, k) for k, label in enumerate(places) if label in used}

    def leaf(node: Expr) -> str:
        return local[node.label] if node.op == "input" else _number(_rounded(node.label))

    lines, results = write(_in_c(plan.step), leaf)
    body = [f"const float {to} = {places[label]};" for label, to in local.items()]
    body += [
        f"const {'int' if node.op in MASKS else 'float'} {to} = {text};" for node, to, text in lines
    ]
    targets = [f"s{k}[i]" for k in range(len(plan.step))]
    if plan.projected:
        targets[0] = "h[i]"
    return body + [f"{to} = {text};" for to, text in zip(targets, results, strict=True)]


def _local(label: str, place: int) -> str:
    """A variable for an input: `u.f` becomes `u_f`."""
    kind, name = label.split(".", 1)
    return f"{kind}_{name if name.isascii() else place}"


def _rounded(label: str) -> float:
    """A constant as float32."""
    return torch.tensor(float(label), dtype=torch.float32, device="cpu").item()


def _in_c(roots: Sequence[Expr]) -> list[Expr]:
    """The roots with C's names of their functions."""
    new: dict[Expr, Expr] = {}
    for node in ordered(roots):
        args = tuple(new[a] for a in node.args)
        if node.op == "pow":
            args += (Expr("const", (), node.label),)
        label = "" if node.op == "pow" else node.label
        new[node] = Expr(_NAMES.get(node.op, node.op), args, label) if args else node
    return [new[root] for root in roots]


# Names of functions in C, where they differ from those of `expression.py`.
_NAMES = {
    "abs": "fabsf",
    "floor": "floorf",
    "sqrt": "sqrtf",
    "expm1": "expm1f",
    "log": "logf",
    "log1p": "log1pf",
    "sin": "sinf",
    "cos": "cosf",
    "erf": "erff",
    "pow": "powf",
    "exp": "exponential",
    "tanh": "hyperbolic_tangent",
}


def _helpers(plan: _Plan) -> list[str]:
    """The functions that the source calls, callees first."""
    called = {node.op for node in ordered(_in_c(plan.step))}
    if plan.gates or plan.projected:
        called.add("add_rounded_product" if plan.rounded else "add_product")
    others = [text for name, text in _FUNCTIONS.items() if name in called]
    exponentials = [name for name in _SIMPLE if name in called]
    if not exponentials:
        return others
    for name, text in reversed(_EXPONENTIALS.items()):
        if name in called:
            called |= {callee for callee in _EXPONENTIALS if re.search(rf"\b{callee}\(", text)}
    simple = [
        f"static float {name}(float x) {{ return {_SIMPLE[name]}; }}" for name in exponentials
    ]
    return [
        *others,
        "#if FLT_EVAL_METHOD == 0 && !defined(__FAST_MATH__)",
        *(text for name, text in _EXPONENTIALS.items() if name in called),
        "#else",
        *simple,
        "#endif",
    ]


def _comment(text: str) -> str:
    """Text of one line that neither ends nor begins a comment."""
    return " ".join(text.replace("*/", "* /").replace("/*", "/ *").split())


# The functions of a source.
_FUNCTIONS = {
    "add_product": """\
/* sum += x * weight, with weight [rows, columns]. */
static void add_product(int rows, int columns, const float *restrict weight,
                        const float *restrict x, float *restrict sum) {
  int k = 0;
  for (; k + 4 <= rows; k += 4) {
    const float *restrict w0 = weight, *restrict w1 = w0 + columns;
    const float *restrict w2 = w1 + columns, *restrict w3 = w2 + columns;
    const float x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];
    for (int j = 0; j < columns; ++j) {
      sum[j] += (w0[j] * x0 + w1[j] * x1) + (w2[j] * x2 + w3[j] * x3);
    }
    weight = w3 + columns;
  }
  for (; k < rows; ++k) {
    for (int j = 0; j < columns; ++j) {
      sum[j] += weight[j] * x[k];
    }
    weight += columns;
  }
}""",
    "add_rounded_product": """\
/* sum += x * weight * scale, with weight [rows, columns] and scale [columns]. */
static void add_rounded_product(int rows, int columns, const int8_t *restrict weight,
                                const float *restrict scale, const float *restrict x,
                                float *restrict part, float *restrict sum) {
  for (int j = 0; j < columns; ++j) {
    part[j] = 0.0f;
  }
  int k = 0;
  for (; k + 4 <= rows; k += 4) {
    const int8_t *restrict w0 = weight, *restrict w1 = w0 + columns;
    const int8_t *restrict w2 = w1 + columns, *restrict w3 = w2 + columns;
    const float x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];
    for (int j = 0; j < columns; ++j) {
      part[j] += (w0[j] * x0 + w1[j] * x1) + (w2[j] * x2 + w3[j] * x3);
    }
    weight = w3 + columns;
  }
  for (; k < rows; ++k) {
    for (int j = 0; j < columns; ++j) {
      part[j] += weight[j] * x[k];
    }
    weight += columns;
  }
  for (int j = 0; j < columns; ++j) {
    sum[j] += scale[j] * part[j];
  }
}""",
    "both": "static int both(int a, int b) { return a & b; }",
    "either": "static int either(int a, int b) { return a | b; }",
    "negate": "static int negate(int a) { return !a; }",
    "where": "static float where(int mask, float yes, float no) { return mask ? yes : no; }",
    "maximum": """\
/* NaN if either is. */
static float maximum(float a, float b) { return a != a || a > b ? a : b; }""",
    "minimum": """\
/* NaN if either is. */
static float minimum(float a, float b) { return a != a || a < b ? a : b; }""",
    "relu": "static float relu(float x) { return 0.0f > x ? 0.0f : x; }",
    "sign": """\
static float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }""",
    "reciprocal": "static float reciprocal(float x) { return 1.0f / x; }",
    "rsqrt": "static float rsqrt(float x) { return 1.0f / sqrtf(x); }",
}
# Exponentials, callees first. They are those of csrc/core/math.h, within 2.7 ULP, because compilers
# vectorise them.
_EXPONENTIALS = {
    "float_of": """\
static float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}""",
    "bits_of": """\
static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}""",
    "limited": """\
/* x between low and high; NaN stays. */
static float limited(float x, float low, float high) {
  const float above = low > x ? low : x;
  return high < above ? high : above;
}""",
    "expm1_reduced": """\
/* e^r - 1 for |r| <= ln 2 / 2. */
static float expm1_reduced(float r) {
  const float r2 = r * r;
  const float even = (0x1.6ac686p-10f * r2 + 0x1.555798p-5f) * r2 + 0x1.fffffep-2f;
  const float odd = 0x1.122bfep-7f * r2 + 0x1.5554aap-3f;
  return (odd * r + even) * r2 + r;
}""",
    "reduced": """\
/* r with x = n ln 2 + r, and n + bias in the low bits of *n: adding 1.5 * 2^23 rounds. */
static float reduced(float x, float bias, uint32_t *n) {
  const float shifted = x * 0x1.715476p0f + (0x1.8p23f + bias);
  const float whole = shifted - (0x1.8p23f + bias);
  *n = bits_of(shifted);
  return (x - whole * 0x1.63p-1f) - whole * -0x1.bd0106p-13f;
}""",
    "exponential": """\
static float exponential(float x) {
  uint32_t n;
  const float r = reduced(limited(x, -104.0f, 89.0f), 254.0f, &n);
  const uint32_t half = n >> 1; /* 2^n has two factors, as it may be out of range */
  return (expm1_reduced(r) + 1.0f) * float_of(half << 23) * float_of((n - half) << 23);
}""",
    "sigmoid": """\
static float sigmoid(float x) {
  uint32_t n;
  const float r = reduced(-limited(x, -89.0f, 88.0f), 127.0f, &n);
  return 1.0f / ((expm1_reduced(r) + 1.0f) * float_of(n << 23) + 1.0f);
}""",
    "hyperbolic_tangent": """\
static float hyperbolic_tangent(float x) {
  /* E / (E + 2) with E = e^(2|x|) - 1 keeps all digits near 0. */
  uint32_t n;
  const float size = fabsf(x) * 2.0f, y = 19.0f < size ? 19.0f : size;
  const float r = reduced(y, 127.0f, &n), scale = float_of(n << 23);
  const float e = scale * expm1_reduced(r) + (scale - 1.0f);
  return copysignf(e / (e + 2.0f), x);
}""",
}
# Extended precision and -ffast-math break the rounding of those, and the C library takes their
# place.
_SIMPLE = {
    "exponential": "expf(x)",
    "sigmoid": "1.0f / (1.0f + expf(-x))",
    "hyperbolic_tangent": "tanhf(x)",
}

# Words that C, C++ or their headers reserve.
_RESERVED_WORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
    char32_t class compl concept const const_cast consteval constexpr constinit continue co_await
    co_return co_yield decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
    nullptr operator or or_eq private protected public register reinterpret_cast requires restrict
    return short signed sizeof static static_assert static_cast struct switch template this
    thread_local throw true try typedef typeid typename typeof typeof_unqual union unsigned using
    virtual void volatile wchar_t while xor xor_eq linux unix
"""
_RESERVED = frozenset(_RESERVED_WORDS.split())
