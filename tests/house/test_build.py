"""setup.py apart from compiling, and the contents of wheel and source distribution."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastrnn_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_libraries_go_with_the_extension_into_the_sources(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = build.BuildExt(Distribution())
    command.extensions, command.build_lib = [], str(tmp_path / "lib")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    built, there = tmp_path / "lib" / "fastrnn", tmp_path / "fastrnn"
    libraries = ["_cuda.so", "libfastrnn_cpu.so"]
    for folder in (built, there):
        folder.mkdir(parents=True)
        for name in libraries:
            (folder / name).write_text(f"in {folder}")
    (built / "_C.torch2.13.cpython-311.so").touch()
    for old in ("_C.torch2.13.cpython-310.so", "_C.torch2.11.cpython-311.so", "_C.cpython-311.so"):
        (there / old).touch()
    command.copy_extensions_to_source()
    for name in libraries:
        assert (there / name).read_text() == (built / name).read_text()
    left = sorted(path.name for path in there.iterdir())
    assert left == ["_C.torch2.13.cpython-311.so", *libraries], "others were of other sources"
    (built / "_cuda.so").unlink()
    command.copy_extensions_to_source()
    assert not (there / "_cuda.so").exists(), "it is not of these sources"


def test_the_extension_is_named_after_torch(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = build.BuildExt(Distribution())
    command.ext_map = {}
    plain = super(build.BuildExt, command).get_ext_filename("fastrnn._C")
    monkeypatch.setattr(build.torches, "version", lambda: "2.13.1+cpu")
    named = command.get_ext_filename("fastrnn._C")
    assert named == plain.replace("_C.", "_C.torch2.13.") != plain
    monkeypatch.setattr(build.torches, "version", lambda: None)
    assert command.get_ext_filename("fastrnn._C") == plain


def test_unchanged_cells_keep_their_time(tmp_path: Path) -> None:
    # A process of its own, because the generator puts a bare package in place of fastrnn.
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
assert "fastrnn/cells/declare.py" in made_from and "fastrnn/compiler/derive.py" in made_from
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)


def kernel_sources() -> set[str]:
    """The sources of a custom cell's library: the CPU kernel and all that it includes."""
    csrc, found = ROOT / "csrc", {ROOT / "csrc" / "cpu" / "kernels.cpp"}
    left = set(found)
    while left:
        source = left.pop()
        for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE):
            here = [f / name for f in (source.parent, csrc) if (f / name).is_file()]
            left |= set(here[:1]) - found  # a generated header has no file here
            found |= set(here[:1])
    return {path.relative_to(csrc).as_posix() for path in found}


def test_every_source_is_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    kinds = (".py", ".pyi", ".typed")
    files = [path for path in (ROOT / "fastrnn").rglob("*") if path.suffix in kinds]
    assert len({path.parent for path in files}) > 8
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    kernel = kernel_sources()
    assert len(kernel) > 8
    assert wanted | {f"fastrnn/csrc/{name}" for name in kernel} <= built


def test_every_source_is_in_the_source_distribution(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    listed = set((tmp_path / "fastrnn.egg-info" / "SOURCES.txt").read_text().splitlines())
    kinds = (".py", ".pyi", ".typed", ".md", ".h", ".cpp", ".cu", ".cuh")
    files = [p for part in ("fastrnn", "csrc") for p in (ROOT / part).rglob("*.*")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in kinds}
    assert len(wanted) > 80 and wanted <= listed, sorted(wanted - listed)
