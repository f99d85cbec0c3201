"""Compiling a user's cell at run time: the cache, its safety, and reasons when it fails."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastrnn import jit
from fastrnn.cells import Cell
from fastrnn.codegen import Derived, derive, key
from fastrnn.jit import CompilationFailed, compile_cell

CXX = os.environ.get("CXX") or next(
    (c for c in ("g++", "clang++", "c++") if shutil.which(c)), "no compiler"
)

# In place of the kernels: a library that computes one step of its cell, and tells its name.
SOURCE = """
#include "cells.gen.h"
#define FASTRNN_JOIN_(a, b) a##b
#define FASTRNN_JOIN(a, b) FASTRNN_JOIN_(a, b)
#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))
#define FASTRNN_ENTRY(Cell)                                            \\
  FASTRNN_EXPORT const char* FASTRNN_JOIN(fastrnn_cells_, FASTRNN_ISA)() { \\
    return fastrnn::Cell::kName;                                       \\
  }                                                                    \\
  FASTRNN_EXPORT double step(double v, double s) {                     \\
    double next = 0, kept[4] = {};                                     \\
    fastrnn::Cell::forward(&v, &v, &s, &next, kept);                   \\
    return next;                                                       \\
  }
FASTRNN_CELLS(FASTRNN_ENTRY)
"""
MATH = """
#pragma once
#include <cmath>
#define FASTRNN_HD
#define FASTRNN_INLINE inline
namespace fastrnn {
inline namespace FASTRNN_ISA {
template <class V> V splat(double value) { return V(value); }
inline double tanh(double x) { return std::tanh(x); }
}
}
"""


def leaky(rate: float, name: str = "leaky") -> Derived:
    def function(u, v, h):
        return rate * h + torch.tanh(u.a + v.a)

    return derive(Cell(name, ("a",), ("h",), function))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sources, an empty cache, and a compiler that lists its runs in the returned file."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "cpu_scan.cpp").write_text(SOURCE)
    (sources / "math.h").write_text(MATH)
    monkeypatch.setattr(jit, "sources", lambda: sources)
    log, script = tmp_path / "runs", tmp_path / "my cxx"
    log.touch()
    script.write_text(
        f'#!/bin/sh\nfor a in "$@"; do last=$a; done\necho "$last" >>"{log}"\nexec {CXX} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", f"'{script}'")
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "cache"))
    return log


def compilations(log: Path) -> int:
    return sum(line.endswith(".so") for line in log.read_text().splitlines())


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    getattr(library, jit.SYMBOL).restype = ctypes.c_char_p
    library.step.restype = ctypes.c_double
    library.step.argtypes = [ctypes.c_double, ctypes.c_double]
    return library


def test_a_compiled_cell_has_its_key_and_computes(runs: Path) -> None:
    library = load(compile_cell(leaky(0.5), "leaky-0123abcd"))
    assert getattr(library, jit.SYMBOL)() == b"leaky-0123abcd"
    want = 0.5 * 3.0 + torch.tanh(torch.tensor(0.25, dtype=torch.float64)).item()
    assert library.step(0.25, 3.0) == pytest.approx(want, rel=1e-15)


def test_the_same_cell_is_compiled_once(runs: Path) -> None:
    first = compile_cell(leaky(0.5), "leaky")
    assert compile_cell(leaky(0.5), "leaky") == first
    assert compilations(runs) == 1


def test_a_damaged_library_is_replaced_on_request(runs: Path) -> None:
    path = compile_cell(leaky(0.5), "leaky")
    path.write_bytes(b"damaged")
    assert compile_cell(leaky(0.5), "leaky").read_bytes() == b"damaged"
    assert compile_cell(leaky(0.5), "leaky", fresh=True) == path
    assert load(path).step(0.0, 2.0) == 1.0
    assert os.listdir(path.parent) == [path.name]


def test_the_cache_is_where_libraries_are(runs: Path, tmp_path: Path) -> None:
    assert jit.cache_folder() == tmp_path / "cache"
    assert compile_cell(leaky(0.5), "leaky").parent == jit.cache_folder()


def test_whatever_code_depends_on_is_part_of_the_cache(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {compile_cell(leaky(0.5), "leaky"), compile_cell(leaky(0.6), "leaky")}
    paths.add(compile_cell(leaky(0.5), "other"))
    (jit.sources() / "math.h").write_text(MATH + "// changed\n")
    paths.add(compile_cell(leaky(0.5), "leaky"))
    monkeypatch.setattr(jit, "_processor", lambda: "another")
    paths.add(compile_cell(leaky(0.5), "leaky"))
    monkeypatch.setenv("CXX", CXX)
    paths.add(compile_cell(leaky(0.5), "leaky"))
    assert len(paths) == 6


def test_compiling_at_once_gives_one_whole_library(runs: Path) -> None:
    derived = leaky(0.5)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: compile_cell(derived, "leaky"), range(4)))
    (path,) = paths
    assert load(path).step(0.0, 2.0) == 1.0
    assert os.listdir(path.parent) == [path.name]


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "file" / "cache"))
    path = compile_cell(leaky(0.5), "leaky")
    assert tmp_path not in path.parents
    assert load(path).step(0.0, 2.0) == 1.0
    assert compile_cell(leaky(0.5), "leaky") == path
    assert compilations(runs) == 1


def test_a_failure_carries_the_compilers_first_errors_and_leaves_nothing(runs: Path) -> None:
    source = jit.sources() / "cpu_scan.cpp"
    source.write_text(SOURCE + '#error "no such luck"\n' + '#error "nor this"\n')
    with pytest.raises(CompilationFailed, match=r"'leaky'.*no such luck.*; .*nor this") as failure:
        compile_cell(leaky(0.5), "leaky")
    assert "my cxx" in str(failure.value)
    assert os.listdir(source.parent.parent / "cache") == []


@pytest.mark.parametrize(
    ("cxx", "path", "message"),
    [
        ("", "", "no C.. compiler on the path; install"),
        ("no-such-compiler -O2", None, "'no-such-compiler -O2', is not on the path"),
        ("false", None, "`false --version` failed: exit status 1"),
    ],
)
def test_without_a_compiler_the_reason_says_what_to_do(
    runs: Path, monkeypatch: pytest.MonkeyPatch, cxx: str, path: str | None, message: str
) -> None:
    monkeypatch.setenv("CXX", cxx)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    with pytest.raises(CompilationFailed, match=message):
        compile_cell(leaky(0.5), "leaky")


def test_the_kernels_compile_with_a_users_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real sources; what they compute is tested with the layers that use them."""
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))

    class Cells(ctypes.Structure):
        _fields_ = (
            ("first", ctypes.POINTER(ctypes.c_char_p)),
            ("count", ctypes.c_int32),
            ("gradients", ctypes.c_void_p * 2),
        )

    cell = Cell("vec", ("a",), ("h",), lambda u, v, h: 0.5 * h + torch.tanh(u.a * v.a))
    cells = ctypes.CDLL(str(compile_cell(derive(cell), key(cell))))[jit.SYMBOL]
    cells.restype = Cells
    found = cells()
    assert found.count == 1
    assert found.first[0] == key(cell).encode()
