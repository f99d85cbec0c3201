"""The build's decisions and the explanations of a build that does not fit; nothing is compiled."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastrnn import extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastrnn_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "MAX_JOBS", "FASTRNN_CXXFLAGS", "FASTRNN_LDFLAGS", "FASTRNN_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def objects(ninja: str) -> dict[str, str]:
    """Object -> its own flags, in the order of linking."""
    lines = ninja.splitlines()
    return {
        line.split()[1].rstrip(":"): flags
        for line, flags in pairwise(lines)
        if line.startswith("build ") and ": compile " in line
    }


def test_each_instruction_set_has_its_object(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    made = objects(build.ninja_file(Path("/build")))
    kernels = [name for name in made if name.startswith("cpu_scan")]
    assert kernels == ["cpu_scan.baseline.o", "cpu_scan.avx2.o", "cpu_scan.avx512.o"]
    assert " -m" not in made["cpu_scan.baseline.o"]
    assert list(made)[-3:] == kernels, "what every machine can run is linked first"

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    made = objects(build.ninja_file(Path("/build")))
    assert [name for name in made if name.startswith("cpu_scan")] == ["cpu_scan.baseline.o"]


def test_kernels_are_compiled_without_torch(build: ModuleType) -> None:
    made = objects(build.ninja_file(Path("/build")))
    assert {n for n, flags in made.items() if "-isystem" in flags} == {
        f"{Path(n).stem}.o" for n in build.BINDING
    }


def test_switches(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-O3" in build.ninja_file(Path("/build"))
    monkeypatch.setenv("FASTRNN_DEBUG", "1")
    monkeypatch.setenv("FASTRNN_CXXFLAGS", "-fsanitize=address")
    monkeypatch.setenv("FASTRNN_LDFLAGS", "-lasan")
    monkeypatch.setenv("CXX", f"{sys.executable} -compiler")
    ninja = build.ninja_file(Path("/build"))
    assert "-O0 -g" in ninja and "-DNDEBUG" not in ninja
    assert "-fsanitize=address" in ninja and "-lasan" in ninja
    assert f"command = {sys.executable} -compiler -MMD" in ninja


def test_folders_with_spaces(build: ModuleType) -> None:
    assert build.escape(Path("/a b/c:d$")) == "/a$ b/c$:d$$"
    assert "-iquote '/a b'" in build.ninja_file(Path("/a b"))


def test_missing_compiler(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match=r"no c\+\+, g\+\+ or clang\+\+: install one"):
        build.compiler()
    monkeypatch.setenv("CXX", "tcc++")
    with pytest.raises(SystemExit, match=r"no tcc\+\+"):
        build.compiler()


def test_unchanged_cells_keep_their_time(tmp_path: Path) -> None:
    # In a process of its own: generating puts a bare package in place of fastrnn.
    script = f"""
import importlib.util, os, pathlib
spec = importlib.util.spec_from_file_location("fastrnn_setup", {str(ROOT / "setup.py")!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
header = pathlib.Path({str(tmp_path)!r}, "cells.gen.h")
build.write_cells(header)
assert "struct" in header.read_text()
os.utime(header, (1, 1))
build.write_cells(header)
assert header.stat().st_mtime == 1, "rewritten though nothing changed"
header.write_text("stale")
build.write_cells(header)
assert "struct" in header.read_text()
assert sorted(p.name for p in header.parent.iterdir()) == ["cells.gen.h", "cells.gen.h.d"]
made_from = pathlib.Path(f"{{header}}.d").read_text()
assert "fastrnn/cells.py" in made_from and "fastrnn/codegen.py" in made_from
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastrnn._C", None)
    with pytest.raises(ImportError, match=r"was not built.*--no-build-isolation"):
        extension.load()


def test_built_with_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    older: object = SimpleNamespace(built_for="2.3.1+cpu")
    monkeypatch.setitem(sys.modules, "fastrnn._C", older)
    with pytest.raises(ImportError, match=r"built with torch 2\.3\.1\+cpu, but torch "):
        extension.load()


def test_a_patch_release_of_torch_is_no_other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    newer: object = SimpleNamespace(built_for=f"{minor}.97+rocm")
    monkeypatch.setitem(sys.modules, "fastrnn._C", newer)
    assert extension.load() is newer
