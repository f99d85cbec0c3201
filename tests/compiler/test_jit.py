"""Compiling a custom cell at run time: the cache, its safety, and the reasons of a failure."""

from __future__ import annotations

import ctypes
import io
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrnn import cache
from fastrnn.cells import MAX_GATES, Cell
from fastrnn.compiler import flags, jit
from fastrnn.compiler.derive import Derived, derive
from fastrnn.compiler.emit_cpp import key
from fastrnn.compiler.jit import CompilationFailed, compile_cell
from fastrnn.extension import _C
from fastrnn.plan import FORMATS
from tests.support.paths import ROOT

CXX = os.environ.get("CXX") or next(
    (c for c in ("g++", "clang++", "c++") if shutil.which(c)), "no compiler"
)

# Takes the place of the kernels: a library that computes one step of its cell and returns its name.
# It links only if both parts are there.
SOURCE = """
#include "cells.gen.h"
template <class T>
struct Plain {
  using Number = T;
};
using Number = FASTRNN_FORMAT::Number;
Number second_part(Number v, Number s);
#if FASTRNN_PART == 2
#define FASTRNN_STEP(Cell)                           \\
  Number second_part(Number v, Number s) {           \\
    Number next = 0, saved[4] = {};                  \\
    fastrnn::Cell::forward(&v, &v, &s, &next, saved); \\
    return next;                                     \\
  }
FASTRNN_CELLS(FASTRNN_STEP)
#else
#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))
#define FASTRNN_NAME(Cell) \\
  FASTRNN_EXPORT const char* fastrnn_cells_custom() { return fastrnn::Cell::kName; }
FASTRNN_CELLS(FASTRNN_NAME)
FASTRNN_EXPORT double step(double v, double s) { return second_part(v, s); }
#endif
"""
MATH = """
#pragma once
#include <cmath>
#define FASTRNN_HD
#define FASTRNN_INLINE inline
namespace fastrnn {
inline namespace FASTRNN_ISA {
template <class V> V splat(double value) { return V(value); }
template <class V> V multiply_add(V a, V b, V c) { return a * b + c; }
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
    for folder in ("core", "cpu"):
        (sources / folder).mkdir(parents=True)
    (sources / "cpu" / "kernels.cpp").write_text(SOURCE)
    (sources / "core" / "math.h").write_text(MATH)
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
    library = load(compile_cell(leaky(0.5), "leaky-0123abcd", "float64"))
    assert getattr(library, jit.SYMBOL)() == b"leaky-0123abcd"
    want = 0.5 * 3.0 + torch.tanh(torch.tensor(0.25, dtype=torch.float64)).item()
    assert library.step(0.25, 3.0) == pytest.approx(want, rel=1e-15)


def test_in_float_it_is_another_library(runs: Path) -> None:
    double, single = (compile_cell(leaky(0.1), "leaky", n) for n in ("float64", "float32"))
    assert double != single
    assert load(double).step(0.0, 1.0) == 0.1
    assert load(single).step(0.0, 1.0) == torch.tensor(0.1).item() != 0.1


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
    assert compile_cell(leaky(0.5), "leaky").parent == cache.folder() == tmp_path / "cache"


def test_it_is_said_once_what_is_compiled_and_where_it_is_kept(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compile_cell(leaky(0.5), "leaky")
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"fastrnn: compiling cell 'leaky' in float32 for {_C.isa()} with ")
    assert "3 to 8 seconds" in line
    assert line.endswith(f"kept in {tmp_path / 'cache'}")
    compile_cell(leaky(0.5), "leaky")
    assert capfd.readouterr() == ("", "")


def test_it_can_be_silenced(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTRNN_LOG", "quiet")
    compile_cell(leaky(0.5), "leaky")
    monkeypatch.delenv("FASTRNN_LOG")
    closed = io.StringIO()
    closed.close()
    for name, stream in {"none": None, "closed": closed}.items():  # a daemon has such streams
        monkeypatch.setattr(sys, "stderr", stream)
        compile_cell(leaky(0.5), name)
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


# Writes a file when the library is loaded.
POISON = """
#include <cstdio>
__attribute__((constructor)) static void loaded() { std::fclose(std::fopen("TRACE", "w")); }
extern "C" void fastrnn_cells_custom() {}
"""


@pytest.fixture
def poison(tmp_path: Path) -> tuple[Path, Path]:
    """A library, and the file that it writes when it is loaded."""
    made, trace = tmp_path / "poison.so", tmp_path / "loaded"
    made.with_suffix(".cpp").write_text(POISON.replace("TRACE", str(trace)))
    command = [*shlex.split(CXX), "-shared", "-fPIC", str(made.with_suffix(".cpp")), "-o"]
    subprocess.run([*command, str(made)], check=True)
    return made, trace


def test_nothing_is_loaded_from_a_folder_that_others_can_write(
    runs: Path, tmp_path: Path, poison: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attacker who knows the cell knows the name of its library."""
    library, trace = poison
    name = compile_cell(leaky(0.5), "leaky").name
    ctypes.CDLL(str(library))
    assert trace.exists()  # so loading it would show
    trace.unlink()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    shutil.copy(library, tmp_path / "shared" / name)
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "shared"))
    with pytest.warns(UserWarning, match=r"loads no code from .*/shared: others can write to"):
        made = compile_cell(leaky(0.5), "leaky")
    assert made.name == name
    assert tmp_path not in made.parents
    assert load(made).step(0.0, 2.0) == 1.0
    assert not trace.exists()


def change_owner(path: Path) -> None:
    os.chown(path, 54321, -1)


def change_mode(path: Path) -> None:
    path.chmod(0o777)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_mode, "others can write to .*leaky.*, of mode 777"),
        pytest.param(
            change_owner,
            "leaky.* belongs to user number 54321",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away"),
        ),
    ],
)
def test_a_library_that_others_can_change_is_not_loaded_but_compiled_again(
    runs: Path, poison: tuple[Path, Path], change: Callable[[Path], None], reason: str
) -> None:
    path = compile_cell(leaky(0.5), "leaky")
    shutil.copy(poison[0], path)
    change(path)
    with pytest.warns(UserWarning, match=f"loads nothing that was kept: .*{reason}"):
        assert compile_cell(leaky(0.5), "leaky") == path
    assert load(path).step(0.0, 2.0) == 1.0
    assert cache.file_refusal(path) is None
    assert compilations(runs) == 2


def test_a_library_is_for_its_user_alone_whatever_the_umask(runs: Path) -> None:
    before = os.umask(0)
    try:
        path = compile_cell(leaky(0.5), "leaky")
    finally:
        os.umask(before)
    assert cache.file_refusal(path) is None


def test_whatever_code_depends_on_is_part_of_the_cache(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {compile_cell(leaky(0.5), "leaky"), compile_cell(leaky(0.6), "leaky")}
    paths.add(compile_cell(leaky(0.5), "other"))
    (jit.sources() / "core" / "math.h").write_text(MATH + "// changed\n")
    paths.add(compile_cell(leaky(0.5), "leaky"))
    paths.add(compile_cell(leaky(0.5), "leaky", "float64"))
    monkeypatch.setitem(flags.ISA, _C.isa(), f"{flags.ISA[_C.isa()]} -DCHANGED")
    paths.add(compile_cell(leaky(0.5), "leaky"))
    monkeypatch.setenv("CXX", CXX)
    paths.add(compile_cell(leaky(0.5), "leaky"))
    assert len(paths) == 7


def test_it_is_compiled_for_the_instruction_set_in_use(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = jit._options("float32")
    assert set(flags.ISA[_C.isa()].split()) <= set(options)
    assert not any("native" in option for option in options)
    monkeypatch.setattr(jit, "_C", SimpleNamespace(isa=lambda: "baseline"))
    assert not any(option.startswith("-m") for option in jit._options("float32"))


def test_compiling_at_once_gives_one_whole_library(
    runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    derived = leaky(0.5)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: compile_cell(derived, "leaky"), range(4)))
    (path,) = paths
    assert load(path).step(0.0, 2.0) == 1.0
    assert os.listdir(path.parent) == [path.name]
    assert compilations(runs) == 1
    said = capfd.readouterr().err.splitlines()
    assert sum("compiling cell" in line for line in said) == 1
    assert sum("waiting for another process to compile cell 'leaky'" in line for line in said) == 3


PROCESS = """
import sys
from pathlib import Path
from fastrnn import cache
from fastrnn.compiler import flags, jit
from tests.compiler.test_jit import leaky
jit.sources = lambda: Path(sys.argv[1])
jit.compile_cell(leaky(0.5), "leaky")
"""


def test_a_second_process_waits_for_the_first(runs: Path) -> None:
    """It waits until the first is done or killed."""
    hold = runs.parent / "hold"
    hold.touch()
    script = Path(shlex.split(os.environ["CXX"])[0])
    waits = f'#!/bin/sh\nwhile [ -e "{hold}" ] && [ "$1" != --version ]; do sleep 0.05; done\n'
    script.write_text(script.read_text().replace("#!/bin/sh\n", waits))

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROCESS, str(jit.sources())]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def says(process: subprocess.Popen[str]) -> str:
        assert process.stderr is not None
        return process.stderr.readline()

    with start() as killed:
        assert "fastrnn: compiling cell 'leaky'" in says(killed)
        with start() as second:
            assert "fastrnn: waiting for another process" in says(second)
            killed.kill()
            assert "fastrnn: compiling cell 'leaky'" in says(second)
            with start() as third:
                assert "fastrnn: waiting for another process" in says(third)
                hold.unlink()
                assert third.wait(60) == second.wait(60) == 0
                assert says(third) == ""
    assert compilations(runs) <= 2  # the killed process's compiler may have finished too
    (library,) = os.listdir(runs.parent / "cache")
    assert load(runs.parent / "cache" / library).step(0.0, 2.0) == 1.0


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
    source = jit.sources() / "cpu" / "kernels.cpp"
    source.write_text(SOURCE + '#error "no such luck"\n' + '#error "nor this"\n')
    with pytest.raises(CompilationFailed, match=r"'leaky'.*no such luck.*; .*nor this") as failure:
        compile_cell(leaky(0.5), "leaky")
    assert "my cxx" in str(failure.value)
    assert os.listdir(jit.sources().parent / "cache") == []


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


BACKWARD = 1  # the second of the kernels in `CompiledCell`


class CompiledCell(ctypes.Structure):
    """`CompiledCell` of csrc/cpu/contract.h."""

    _fields_ = (
        ("traits", ctypes.c_int32 * 6),
        ("projectable", ctypes.c_bool),
        ("gate_params", ctypes.c_uint32),
        ("stages", ctypes.c_int32 * 3),
        ("site_of", ctypes.c_int8 * MAX_GATES),
        ("draws_and_gates", ctypes.c_int32 * 3),
        ("name", ctypes.c_char_p),
        ("code", ctypes.c_void_p * len(FORMATS) * 6),
    )


class CompiledCells(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.POINTER(CompiledCell)),
        ("count", ctypes.c_int32),
        ("gradients", ctypes.c_void_p * len(FORMATS)),
    )


@pytest.mark.parametrize("format", _C.formats())
def test_the_kernels_compile_with_a_users_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The real sources compile all kernels of the cell in that format, and nothing else. Tests of
    layers check their results."""
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTRNN_CXXFLAGS")
    cell = Cell("vec", ("a",), ("h",), lambda u, v, h: 0.5 * h + torch.tanh(u.a * v.a))
    cells = ctypes.CDLL(str(compile_cell(derive(cell), key(cell), format)))[jit.SYMBOL]
    cells.restype = CompiledCells
    found = cells()
    assert found.count == 1
    (compiled,) = found.first[:1]
    assert compiled.name == key(cell).encode()
    for part, kernel in enumerate(compiled.code):
        there = [name == format for name in FORMATS]
        if part == BACKWARD and format in ("int8", "int16"):  # which are for inference
            there = [False] * len(FORMATS)
        assert [code is not None for code in kernel] == there
    assert list(found.gradients) == [None] * len(FORMATS)
