"""What is derived from cells: gradients against autograd and finite differences, the rules of
what is tied and kept, the C++ against the expressions it was written from, and refusals."""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.compiler import emit_cpp, expression
from fastrnn.compiler.derive import Derived, Underivable, derive
from fastrnn.compiler.describe import describe
from tests.support.paths import CSRC
from tests.support.properties import given, settings, st


def make(gates: str, states: str, function: Callable[..., object], name: str = "") -> Cell:
    """A cell outside of the registry, so that no other test meets it."""
    return Cell(name or function.__name__, tuple(gates), tuple(states), function)  # type: ignore[arg-type]


def mgu(u, v, h):
    f = torch.sigmoid(u.f + v.f)
    return (1 - f) * h + f * torch.tanh(u.n + f * v.n)


def slstm(u, v, h, c, n, m):
    """Exponential gating with a stabilizer state (Beck et al. 2024, arXiv:2405.04517)."""
    z, o = torch.tanh(u.z + v.z), torch.sigmoid(u.o + v.o)
    log_f, log_i = F.logsigmoid(u.f + v.f), u.i + v.i
    m_next = torch.maximum(log_f + m, log_i)
    f, i = torch.exp(log_f + m - m_next), torch.exp(log_i - m_next)
    c, n = f * c + i * z, f * n + i
    return o * c / n, c, n, m_next


def peephole(u, v, h, c):
    i, f = torch.sigmoid(u.i + v.i + 0.1 * c), torch.sigmoid(u.f + v.f - 0.2 * c)
    c = f * c + i * torch.tanh(u.g + v.g)
    return torch.sigmoid(u.o + 0.3 * c + v.o) * torch.tanh(c), c


def activations(u, v, h, c):
    a = F.silu(u.a + v.a) + F.gelu(u.b + v.b) + F.gelu(v.a, approximate="tanh")
    b = F.softplus(u.c) + F.elu(v.c) - F.logsigmoid(u.d) + F.leaky_relu(v.d, 0.2)
    return torch.tanh(a) * h + b * c, F.mish(h) + F.selu(c) + F.softsign(a) * F.hardtanh(b)


def choices(u, v, h, c):
    gate = torch.where((u.a > 0) & ~(v.a > h), u.a, v.b * 2)
    low = torch.clamp(u.b, -0.5, 0.7) + torch.clamp(v.c, min=h) + torch.clamp(u.c, max=0.1)
    mask = ((c > 0) | (h < u.d)).to(h.dtype)
    return gate + mask * c, torch.maximum(low, v.d) - torch.minimum(h, c) + torch.abs(gate)


def powers(u, v, h, c):
    a = torch.sqrt(1 + u.a**2) + torch.rsqrt(2 + v.a * v.a) + (1 + h * h) ** -1.5
    b = torch.expm1(u.b / 4) + torch.log1p(v.b.square()) + torch.log2(1.5 + torch.cos(u.c))
    d = torch.sin(v.c) / (1 + torch.exp2(u.d)) + torch.erf(v.d) - (c**3).neg()
    return a - b.reciprocal(), torch.sinh(h / 3) + torch.cosh(c / 3) + torch.log(a + b * b) * d


def steps(u, v, h, c):
    """Written step by step in place, with functions that have no gradient."""
    y = u.a * 1
    y += v.a
    y *= torch.sign(h) + 0.5
    z = y.clone().mul_(torch.floor(u.b * 3) + torch.trunc(v.b))
    z.add_(y.detach(), alpha=0.5)
    return torch.tanh(z) + torch.tensor(0.25), torch.ceil(c) * y + torch.zeros_like(h)


def passing(u, v, h, c):
    """States that are inputs, each other's or constants."""
    return c, h


USERS = [
    make("fn", "h", mgu),
    make("zifo", "hcnm", slstm),
    make("ifgo", "hc", peephole),
    make("abcd", "hc", activations),
    make("abcd", "hc", choices),
    make("abcd", "hc", powers),
    make("ab", "hc", steps),
    make("a", "hc", passing),
]
BUILT_IN = [cells.get(name) for name in ("rnn_tanh", "rnn_relu", "lstm", "gru")]
ALL = BUILT_IN + USERS
every_cell = pytest.mark.parametrize("cell", ALL, ids=lambda c: c.name)


def inputs(cell: Cell, units: int = 64, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Random `u`, `v`, states and gradients of next states."""
    gates, states = len(cell.gates), len(cell.states)
    made = [
        [torch.randn(units, dtype=torch.float64).to(dtype) for _ in range(n)]
        for n in (gates, gates, states, states)
    ]
    if cell.name == "slstm":  # its normalizer is positive
        made[2][2] = made[2][2].abs() + 0.5
    return made


def by_autograd(cell: Cell, u: list[Tensor], v: list[Tensor], s: list[Tensor], dnext: list[Tensor]):
    leaves = [[x.clone().requires_grad_() for x in group] for group in (u, v, s)]
    flat = [x for group in leaves for x in group]
    after = cell.step(*leaves)
    reached = [(a, d) for a, d in zip(after, dnext, strict=True) if a.requires_grad]
    grads = torch.autograd.grad(
        [a for a, _ in reached],
        flat,
        [d for _, d in reached],
        allow_unused=True,
        materialize_grads=True,
    )
    return [a.detach() for a in after], list(grads)


def derived_step(derived: Derived, u, v, s, dnext) -> tuple[list[Tensor], list[Tensor]]:
    after, kept = derived.forward(u, v, s)
    du, dv, ds = derived.backward(kept, s, after, dnext)
    return after, [*du, *dv, *ds]


@every_cell
def test_values_and_gradients_are_those_of_autograd(cell: Cell) -> None:
    u, v, s, dnext = inputs(cell)
    after, grads = derived_step(derive(cell), u, v, s, dnext)
    want_after, want_grads = by_autograd(cell, u, v, s, dnext)
    torch.testing.assert_close(after, want_after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, want_grads, rtol=1e-12, atol=1e-12)


SMOOTH = [c for c in ALL if c.name not in ("rnn_relu", "choices", "steps", "activations")]


@pytest.mark.parametrize("cell", SMOOTH, ids=lambda c: c.name)
def test_gradients_are_those_of_finite_differences(cell: Cell) -> None:
    u, v, s, dnext = inputs(cell)
    _, grads = derived_step(derive(cell), u, v, s, dnext)
    flat, gates = [*u, *v, *s], len(u)
    step = 1e-5

    def loss(moved: list[Tensor]) -> Tensor:
        after = cell.step(moved[:gates], moved[gates : 2 * gates], moved[2 * gates :])
        return sum((a * d for a, d in zip(after, dnext, strict=True)), torch.zeros(()))

    for k, grad in enumerate(grads):
        up, down = ([x + sign * step * (i == k) for i, x in enumerate(flat)] for sign in (1, -1))
        torch.testing.assert_close((loss(up) - loss(down)) / (2 * step), grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cell", BUILT_IN, ids=lambda c: c.name)
def test_special_values_go_the_way_autograd_sends_them(cell: Cell) -> None:
    special = torch.tensor([0.0, -0.0, 1e-40, 1e30, -1e30, math.inf, -math.inf, math.nan])
    special = special.double()
    groups = inputs(cell, units=1)
    for k, group in enumerate(groups):
        for i in range(len(group)):
            changed = [[x.expand(len(special)).clone() for x in g] for g in groups]
            changed[k][i] = special.clone()
            u, v, s, dnext = changed
            got = derived_step(derive(cell), u, v, s, dnext)
            torch.testing.assert_close(got, by_autograd(cell, *changed), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_expressions_compute_in_the_dtype_they_are_given(dtype: torch.dtype) -> None:
    cell = make("abcd", "hc", choices)
    u, v, s, dnext = inputs(cell, dtype=dtype)
    after, grads = derived_step(derive(cell), u, v, s, dnext)
    assert {x.dtype for x in (*after, *grads)} == {dtype}
    want_after, want_grads = by_autograd(cell, u, v, s, dnext)
    torch.testing.assert_close(after, want_after)
    torch.testing.assert_close(grads, want_grads)


# What is tied and kept.


@pytest.mark.parametrize(
    ("name", "tied", "kept"),
    [
        ("rnn_tanh", [True], ""),
        ("rnn_relu", [True], ""),
        ("lstm", [True] * 4, "i f g o"),
        ("gru", [True, True, False], "r z n v.n"),
    ],
)
def test_built_in_cells_keep_what_the_best_kernels_do(
    name: str, tied: list[bool], kept: str
) -> None:
    derived = derive(cells.get(name))
    assert list(derived.tied) == tied
    assert list(derived.kept) == kept.split()


@pytest.mark.parametrize(
    ("function", "tied"),
    [
        (lambda u, v, h: torch.tanh(u.a + v.a), True),
        (lambda u, v, h: torch.tanh(v.a + 1 + u.a), True),
        (lambda u, v, h: torch.tanh(u.a * 2 + v.a * 2), True),
        (lambda u, v, h: h * 2, True),
        (lambda u, v, h: torch.floor(u.a + v.a) * h, True),
        (lambda u, v, h: torch.tanh(u.a - v.a), False),
        (lambda u, v, h: u.a * v.a, False),
        (lambda u, v, h: u.a + v.a + torch.sign(u.a), False),
        (lambda u, v, h: torch.where(u.a > 0, h, 2 * h), False),
        (lambda u, v, h: torch.floor(v.a) * h, False),
    ],
)
def test_a_gate_is_tied_where_only_the_sum_matters(
    function: Callable[..., Tensor], tied: bool
) -> None:
    cell = make("a", "h", function, "tied")
    derived = derive(cell)
    assert derived.tied == (tied,)
    u, v, s, _ = inputs(cell)
    torch.testing.assert_close(derived.forward(u, v, s)[0], cell.step(u, v, s))


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        # Follows from the states: tanh(c) is computed again.
        (lambda u, v, h, c: (torch.tanh(c) * h, c), ""),
        (lambda u, v, h, c: (torch.exp(u.a), c), ""),
        # One product stands for both of its factors, where only it is used.
        (lambda u, v, h, c: ((torch.exp(u.a) * torch.exp(u.b)).detach() * h, c), "k0"),
        (lambda u, v, h, c: (torch.exp(u.a) * torch.exp(u.b) * h, c), "a b"),
        # A mask cannot be kept, so what it compares is.
        (lambda u, v, h, c: (torch.where(u.a > v.a, h, c), c), "u.a v.a"),
        (lambda u, v, h, c: (torch.relu(u.a + v.a) * h, c), "a.a"),
        (lambda u, v, h, c: (F.silu(u.b + v.b) * u.a, h), "b u.a a.b"),
    ],
)
def test_the_fewest_values_are_kept(function: Callable[..., object], kept: str) -> None:
    assert list(derive(make("ab", "hc", function, "kept")).kept) == kept.split()


@every_cell
def test_backward_computes_transcendental_functions_of_states_alone(cell: Cell) -> None:
    nodes = expression.ordered(derive(cell).gradients)
    again = [node for node in nodes if node.op in expression.TRANSCENDENTAL]
    assert {label.split(".")[0] for label in expression.uses(again)} <= {"s", "next"}
    assert bool(again) == (cell.name in ("lstm", "peephole", "activations", "powers"))


# Refusals.

PARAMETER = torch.nn.Parameter(torch.tensor(0.5))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda u, v, h: h - h.mean(-1, keepdim=True), r"aten\.mean\.dim.*mixed"),
        (lambda u, v, h: h.flip(-1), r"aten\.flip"),
        (lambda u, v, h: torch.softmax(h, -1), r"aten\._softmax"),
        (lambda u, v, h: torch.cumsum(h, -1), r"aten\.cumsum"),
        (lambda u, v, h: h[..., :1] * h, r"aten\.slice\.Tensor.*mixed"),
        (lambda u, v, h: F.layer_norm(h, h.shape[-1:]), "native_layer_norm.*mixed"),
        (lambda u, v, h: torch.atan(h), r"aten\.atan.*not among"),
        (lambda u, v, h: h * torch.rand_like(h), r"aten\.rand_like.*random"),
        (lambda u, v, h: F.dropout(h, 0.5, training=True), "random"),
        (lambda u, v, h: h if h.sum() > 0 else u.a, "reads the value.*torch.where"),
        (lambda u, v, h: h if h > 0 else u.a, "reads the value.*torch.where"),
        (lambda u, v, h: h * h.mean().item(), "reads the value.*torch.where"),
        (lambda u, v, h: h * PARAMETER, "not one of its arguments"),
        (lambda u, v, h: h * PARAMETER.detach().expand(h.shape), "not one of its arguments"),
        (lambda u, v, h: h * h.size(-1) ** -0.5, "depends on the shape"),
        (lambda u, v, h: h * random.random(), "another formula each time"),
        (lambda u, v, h: h.mul_(2), "writes into one of its arguments"),
        (lambda u, v, h: h.detach().mul_(2) + u.a, "writes into one of its arguments"),
        (lambda u, v, h: h.float().double(), "converts torch.float64 to torch.float32"),
        (lambda u, v, h: torch.relu(h) ** u.a, "constant exponent"),
        (lambda u, v, h: h.sum(), r"state 'h' of shape \[\]"),
        (lambda u, v, h: h.float(), "state 'h' of shape .* and torch.float32"),
        (lambda u, v, h: [1.0], "state 'h' a float"),
    ],
)
def test_what_is_no_pointwise_formula_is_refused_by_name(
    function: Callable[..., object], message: str
) -> None:
    with pytest.raises(Underivable, match=message) as refusal:
        derive(make("a", "h", function, "refused"))
    assert "'refused'" in str(refusal.value)


def test_an_error_of_the_function_itself_stays_that_error() -> None:
    with pytest.raises(AttributeError, match="'q'"):
        derive(make("a", "h", lambda u, v, h: u.q, "wrong"))
    with pytest.raises(ValueError, match="returned 2 states, but was declared with 1"):
        derive(make("a", "h", lambda u, v, h: (h, h), "wrong"))


def test_deriving_does_not_see_the_modes_of_the_caller() -> None:
    def fresh() -> Cell:
        return make("fn", "h", lambda u, v, h: mgu(u, v, h), "mode")

    want = emit_cpp.struct(derive(fresh()))
    with FakeTensorMode():
        assert emit_cpp.struct(derive(fresh())) == want
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert emit_cpp.struct(derive(fresh())) == want

    def inside(x: Tensor) -> Tensor:
        assert emit_cpp.struct(derive(fresh())) == want
        return x.sum()

    torch.func.vmap(torch.func.grad(inside))(torch.ones(2, 3))


# Names and text.


def test_key_follows_what_a_cell_does() -> None:
    assert emit_cpp.key(cells.get("gru")) == "gru"
    assert emit_cpp.key(make("h", "h", cells.get("rnn_tanh").function, "rnn_tanh")) == "rnn_tanh"
    twin = make("fn", "h", lambda u, v, h: mgu(u, v, h), "mgu")
    first = emit_cpp.key(make("fn", "h", mgu))
    assert first.startswith("mgu-") and len(first) == len("mgu-") + 8
    assert emit_cpp.key(twin) == first
    other = make("fn", "h", lambda u, v, h: mgu(u, v, h) * 2, "mgu")
    assert emit_cpp.key(other) != first
    impostor = make("h", "h", lambda u, v, h: torch.tanh(u.h + v.h) * 2, "rnn_tanh")
    assert emit_cpp.key(impostor).startswith("rnn_tanh-")


def test_a_cell_that_cannot_be_derived_has_no_key() -> None:
    with pytest.raises(Underivable, match="cumsum"):
        emit_cpp.key(make("a", "h", lambda u, v, h: torch.cumsum(h, -1), "cumulative"))


def test_description_of_gru() -> None:
    assert describe(derive(cells.get("gru"))) == (
        "cell gru\n"
        "  gates   r z n\n"
        "  states  h\n"
        "  tied    r z\n"
        "  keeps   r z n v.n: 16 bytes per unit and step in float32, besides the states\n"
        "\n"
        "forward: 8 operations, 3 transcendental\n"
        "  r  = sigmoid(a.r)\n"
        "  n  = tanh(u.n + r * v.n)\n"
        "  z  = sigmoid(a.z)\n"
        "  h' = n + z * (h - n)\n"
        "\n"
        "backward: 15 operations, 0 transcendental\n"
        "  dh   = dh' * z\n"
        "  du.n = (dh' - dh) * (1 - n * n)\n"
        "  da.r = du.n * v.n * (r * (1 - r))\n"
        "  da.z = dh' * (h - n) * (z * (1 - z))\n"
        "  dv.n = du.n * r"
    )


def test_header_is_written_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.gen.h"
    assert emit_cpp.write_header(path)
    os.utime(path, (1, 1))
    assert not emit_cpp.write_header(path)
    assert path.stat().st_mtime == 1
    text = path.read_text()
    assert "#define FASTRNN_CELLS(X) X(RnnTanh) X(RnnRelu) X(Lstm) X(Gru)\n" in text
    path.write_text(text + "// old\n")
    assert emit_cpp.write_header(path) and path.read_text() == text


def test_header_refuses_two_cells_of_one_name() -> None:
    derived = derive(cells.get("gru"))
    with pytest.raises(ValueError, match="Gru, Gru"):
        emit_cpp.header([derived, derived])


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("lstm", "Lstm"),
        ("rnn_tanh", "RnnTanh"),
        ("my cell-0a1b", "MyCell0a1b"),
        ("2x", "Cell2x"),
        ("ü", "Cell"),
    ],
)
def test_struct_names(name: str, struct: str) -> None:
    assert emit_cpp.struct_name(name) == struct


# C++.

HARNESS = """
#include "cells.gen.h"
namespace fastrnn {
inline namespace FASTRNN_ISA {
template <class V, class T, int N>
struct Rows {
  V row[N > 0 ? N : 1];
  void read(const T* from, long units, long at) {
    for (int k = 0; k < N; ++k) memcpy(&row[k], from + k * units + at, sizeof(V));
  }
  void write(T* to, long units, long at) const {
    for (int k = 0; k < N; ++k) memcpy(to + k * units + at, &row[k], sizeof(V));
  }
};
template <class C, class V, class T>
void forward(const T* const* in, T* const* out, long units) {
  for (long at = 0; at < units; at += sizeof(V) / sizeof(T)) {
    Rows<V, T, C::kGates> u, v;
    Rows<V, T, C::kStates> s, next;
    Rows<V, T, C::kKept> kept;
    u.read(in[0], units, at), v.read(in[1], units, at), s.read(in[2], units, at);
    C::forward(u.row, v.row, s.row, next.row, kept.row);
    next.write(out[0], units, at), kept.write(out[1], units, at);
  }
}
// Gradients of the states lie where the gradients of the next states did.
template <class C, class V, class T>
void backward(const T* const* in, T* const* out, long units) {
  for (long at = 0; at < units; at += sizeof(V) / sizeof(T)) {
    Rows<V, T, C::kGates> du, dv;
    Rows<V, T, C::kStates> s, next, ds;
    Rows<V, T, C::kKept> kept;
    kept.read(in[0], units, at), s.read(in[1], units, at), next.read(in[2], units, at);
    ds.read(in[3], units, at);
    C::backward(kept.row, s.row, next.row, ds.row, du.row, dv.row, ds.row);
    du.write(out[0], units, at), dv.write(out[1], units, at), ds.write(out[2], units, at);
  }
}
}
}
using namespace fastrnn;
#define ENTRY(C, V, T, suffix)                                                             \\
  extern "C" void C##_forward_##suffix(const T* const* in, T* const* out, long units) {    \\
    forward<C, V, T>(in, out, units);                                                      \\
  }                                                                                        \\
  extern "C" void C##_backward_##suffix(const T* const* in, T* const* out, long units) {   \\
    backward<C, V, T>(in, out, units);                                                     \\
  }
#define ENTRIES(C)                    \\
  ENTRY(C, float, float, f)           \\
  ENTRY(C, double, double, d)         \\
  ENTRY(C, Vec<float>, float, fv)     \\
  ENTRY(C, Vec<double>, double, dv)
FASTRNN_CELLS(ENTRIES)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cells in C++, one unit at a time and in vectors."""
    folder = tmp_path_factory.mktemp("cells")
    (folder / "cells.gen.h").write_text(emit_cpp.header([derive(c) for c in ALL]))
    (folder / "cells.cpp").write_text("#include <cstring>\n" + HARNESS)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-DFASTRNN_ISA=test", "-Werror"]
    command += ["-Wall", "-iquote", str(folder), "-iquote", str(CSRC), "-Wno-psabi"]
    subprocess.run(
        [*command, str(folder / "cells.cpp"), "-o", str(folder / "cells.so")], check=True
    )
    return ctypes.CDLL(str(folder / "cells.so"))


def call(function: Callable[..., None], given: Sequence[list[Tensor]], sizes: Sequence[int]):
    """Pass groups of tensors as arrays [k, units]; get groups of the given sizes back."""
    units = given[-1][0].numel()
    like = given[-1][0]
    arrays = [torch.stack(group) if group else like.new_empty(0) for group in given]
    out = [like.new_empty(size, units) for size in sizes]
    pointers = [(ctypes.c_void_p * len(g))(*(x.data_ptr() for x in g)) for g in (arrays, out)]
    function(*pointers, ctypes.c_long(units))
    return [list(x) for x in out]


@every_cell
@pytest.mark.parametrize("lanes", ["f", "d", "fv", "dv"])
def test_cpp_computes_what_the_expressions_say(
    compiled: ctypes.CDLL, cell: Cell, lanes: str
) -> None:
    dtype = torch.float32 if lanes[0] == "f" else torch.float64
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if lanes[0] == "f" else {"rtol": 1e-12, "atol": 1e-12}
    derived, name = derive(cell), emit_cpp.struct_name(cell.name)
    u, v, s, dnext = inputs(cell, dtype=dtype)
    after, kept = derived.forward(u, v, s)
    gates, states = len(cell.gates), len(cell.states)
    summed = [a + b if tied else b for a, b, tied in zip(u, v, derived.tied, strict=True)]
    unread = [
        torch.full_like(a, math.nan) if t else a for a, t in zip(u, derived.tied, strict=True)
    ]
    forward, backward = (compiled[f"{name}_{way}_{lanes}"] for way in ("forward", "backward"))
    got = call(forward, [unread, summed, s], [states, len(kept)])
    torch.testing.assert_close(got, [after, kept], **tolerance)
    want = derived.backward(kept, s, after, dnext)
    got = call(backward, [kept, s, after, dnext], [gates, gates, states])
    torch.testing.assert_close(got, list(want), **tolerance)


# Random cells.

LEAVES: dict[str, Callable[..., Tensor]] = {
    "u.a": lambda u, v, h, c: u.a,
    "u.b": lambda u, v, h, c: u.b,
    "v.a": lambda u, v, h, c: v.a,
    "v.b": lambda u, v, h, c: v.b,
    "h": lambda u, v, h, c: h,
    "c": lambda u, v, h, c: c,
    "0.5": lambda u, v, h, c: torch.full_like(h, 0.5),
    "-1": lambda u, v, h, c: torch.full_like(h, -1.0),
    "0": lambda u, v, h, c: torch.zeros_like(h),
}
OPERATIONS: list[tuple[int, Callable[..., Tensor]]] = [
    (1, torch.neg),
    (1, torch.tanh),
    (1, torch.sigmoid),
    (1, torch.relu),
    (1, torch.abs),
    (1, torch.sin),
    (1, lambda x: torch.exp(torch.clamp(x, -3, 2))),
    (1, lambda x: torch.sqrt(1 + x * x)),
    (1, lambda x: torch.log1p(torch.abs(x))),
    (1, lambda x: x**3 / 4),
    (1, torch.floor),
    (1, F.softplus),
    (2, torch.add),
    (2, torch.add),
    (2, torch.sub),
    (2, torch.mul),
    (2, torch.mul),
    (2, lambda x, y: x / (2 + y * y)),
    (2, torch.maximum),
    (2, torch.minimum),
    (3, lambda x, y, z: torch.where(x > y, y, z)),
    (3, lambda x, y, z: torch.lerp(x, y, torch.sigmoid(z))),
]


def formula(
    arity_and_function: tuple[int, Callable[..., Tensor]], parts: list
) -> Callable[..., Tensor]:
    arity, function = arity_and_function
    return lambda *given: function(*(part(*given) for part in parts[:arity]))


formulas = st.recursive(
    st.sampled_from(sorted(LEAVES)).map(LEAVES.__getitem__),
    lambda inner: st.builds(
        formula, st.sampled_from(OPERATIONS), st.lists(inner, min_size=3, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=20)
@given(formulas, formulas)
def test_random_cells_agree_with_autograd(
    first: Callable[..., Tensor], second: Callable[..., Tensor]
) -> None:
    cell = make("ab", "hc", lambda *given: (first(*given), second(*given)), "random")
    u, v, s, dnext = inputs(cell, units=16)
    after, grads = derived_step(derive(cell), u, v, s, dnext)
    want_after, want_grads = by_autograd(cell, u, v, s, dnext)
    torch.testing.assert_close(after, want_after, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(grads, want_grads, rtol=1e-9, atol=1e-9, equal_nan=True)
