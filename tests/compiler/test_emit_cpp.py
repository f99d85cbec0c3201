"""The C++ of cells: names, the header, and the compiled code against the expressions."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import Underivable, derive
from tests.support.derivations import ALL, every_cell, inputs, make, mgu
from tests.support.paths import CSRC


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


HARNESS = """
#include "core/cell.h"
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
    Rows<V, T, kInputGates<C>> u;
    Rows<V, T, kRecurrentGates<C>> v;
    Rows<V, T, C::kStates> s, next;
    Rows<V, T, C::kSaved> saved;
    Rows<V, T, C::kParams> p;
    u.read(in[0], units, at), v.read(in[1], units, at), s.read(in[2], units, at);
    p.read(in[3], units, at);
    step_forward<C>(u.row, v.row, s.row, p.row, next.row, saved.row);
    next.write(out[0], units, at), saved.write(out[1], units, at);
  }
}
// Gradients of the states lie where the gradients of the next states did.
template <class C, class V, class T>
void backward(const T* const* in, T* const* out, long units) {
  for (long at = 0; at < units; at += sizeof(V) / sizeof(T)) {
    Rows<V, T, kInputGates<C>> du;
    Rows<V, T, kRecurrentGates<C>> dv;
    Rows<V, T, C::kStates> s, next, ds;
    Rows<V, T, C::kSaved> saved;
    Rows<V, T, C::kParams> p, dp;
    saved.read(in[0], units, at), s.read(in[1], units, at), next.read(in[2], units, at);
    ds.read(in[3], units, at), p.read(in[4], units, at);
    step_backward<C>(saved.row, s.row, p.row, next.row, ds.row, du.row, dv.row, ds.row, dp.row);
    du.write(out[0], units, at), dv.write(out[1], units, at), ds.write(out[2], units, at);
    dp.write(out[3], units, at);
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
    """Passes groups of tensors as arrays [k, units]; returns groups of the given sizes."""
    like = next(group[0] for group in given if group)
    units = like.numel()
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
    near: dict[str, Any] = (
        {"rtol": 2e-5, "atol": 2e-5} if lanes[0] == "f" else {"rtol": 1e-12, "atol": 1e-12}
    )
    derived, struct = derive(cell), emit_cpp.struct_name(cell.name)
    u, v, s, dnext, p = inputs(cell, dtype=dtype)
    after, saved = derived.forward(u, v, s, p)
    states = len(cell.states)
    of_u = dict(zip(cell.inputs, u, strict=True))
    sums, unread = [], dict(of_u)
    for name, b, summed in zip(cell.recurrent, v, derived.summed, strict=True):
        sums.append(of_u[name] + b if summed else b)
        if summed:
            unread[name] = torch.full_like(b, math.nan)
    forward, backward = (compiled[f"{struct}_{way}_{lanes}"] for way in ("forward", "backward"))
    got = call(forward, [list(unread.values()), sums, s, p], [states, len(saved)])
    torch.testing.assert_close(got, [after, saved], **near)
    want = derived.backward(saved, s, after, dnext, p)
    got = call(backward, [saved, s, after, dnext, p], [len(u), len(v), states, len(p)])
    torch.testing.assert_close(got, list(want), **near)
