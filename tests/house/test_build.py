"""The decisions of setup.py; nothing is compiled."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastrnn_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CXX", "MAX_JOBS", "FASTRNN_CXXFLAGS", "FASTRNN_LDFLAGS", "FASTRNN_DEBUG")
    cuda = ("FASTRNN_CUDA", "NVCC", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    for name in (*names, *cuda):
        monkeypatch.delenv(name, raising=False)


def objects(ninja: str) -> dict[str, str]:
    """Each object's own flags, in the order of linking."""
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
    kernels = [name for name in made if name.startswith("cpu/kernels.")]
    assert kernels == [f"cpu/kernels.{isa}.o" for isa in ("baseline", "avx2", "avx512")]
    assert " -m" not in made["cpu/kernels.baseline.o"]
    assert list(made)[-3:] == kernels, "what every machine can run is linked first"

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    made = objects(build.ninja_file(Path("/build")))
    assert [name for name in made if name.startswith("cpu/kernels.")] == ["cpu/kernels.baseline.o"]


def test_kernels_are_compiled_without_torch(build: ModuleType) -> None:
    made = objects(build.ninja_file(Path("/build")))
    with_torch = {n for n, flags in made.items() if "-isystem" in flags}
    assert len(with_torch) > 3
    assert with_torch == {n for n in made if n.startswith("binding/")}


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


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The path of a fake nvcc, the only one to be found."""
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return str(fake)


def test_cuda_kernels_are_built_where_nvcc_is_and_torch_has_use_for_them(
    build: ModuleType, toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ROOT / "build" / "any"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert build.cuda_ninja_file(folder) == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    ninja = build.cuda_ninja_file(folder)
    assert f"command = {toolkit} " in ninja
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    linked = " ".join(build.object_of(path, ".cu.o") for path in sources)
    assert len(set(linked.split())) == len(sources) > 4
    assert f"build _cuda.so: cuda_link {linked}\n" in ninja
    assert "-cudart static" in ninja and "-fPIC" in ninja
    monkeypatch.setenv("FASTRNN_CUDA", "0")
    assert build.cuda_ninja_file(folder) == ""
    monkeypatch.setenv("FASTRNN_CUDA", "yes")
    with pytest.raises(SystemExit, match="auto, 0 or 1, not 'yes'"):
        build.cuda_ninja_file(folder)


def test_cuda_kernels_that_are_asked_for_need_nvcc(
    build: ModuleType, toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ROOT / "build" / "any"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    assert toolkit in build.cuda_ninja_file(folder)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"there is no nvcc: .* nvidia-cuda-nvcc"):
        build.cuda_ninja_file(folder)
    monkeypatch.setenv("FASTRNN_CUDA", "auto")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert build.cuda_ninja_file(folder) == ""


def test_cuda_kernels_go_with_the_extension_into_the_sources(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = build.BuildExt(Distribution())
    command.extensions, command.build_lib = [], str(tmp_path / "lib")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    built, there = (tmp_path / part / "fastrnn" / "_cuda.so" for part in ("lib", "."))
    for path in (built, there):
        path.parent.mkdir(parents=True)
        path.write_text(f"in {path.parent}")
    command.copy_extensions_to_source()
    assert there.read_text() == built.read_text()
    built.unlink()
    command.copy_extensions_to_source()
    assert not there.exists(), "they are not of these sources"


def test_gpus_to_build_for(
    build: ModuleType, toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def codes(architectures: str) -> list[str]:
        return [t.rpartition("code=")[2] for t in build.cuda_targets(architectures)]

    assert codes(build.CUDA_ARCHITECTURES) == [
        *("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100f", "sm_120", "compute_120"),
    ]
    assert codes("7.5 8.0, 9.0+PTX") == ["sm_80", "sm_90a", "compute_90a"]
    for wrong, reason in (("7.0;7.5", "need compute capability 8.0"), ("Hopper", "has 'Hopper'")):
        with pytest.raises(SystemExit, match=reason):
            build.cuda_targets(wrong)
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    monkeypatch.setenv("MAX_JOBS", "1")
    ninja = build.cuda_ninja_file(ROOT / "build" / "any")
    assert "code=sm_89 " in ninja and "code=sm_80" not in ninja and "--threads 1 " in ninja


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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


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
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
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
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    listed = set((tmp_path / "fastrnn.egg-info" / "SOURCES.txt").read_text().splitlines())
    kinds = (".py", ".pyi", ".typed", ".md", ".h", ".cpp", ".cu", ".cuh")
    files = [p for part in ("fastrnn", "csrc") for p in (ROOT / part).rglob("*.*")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in kinds}
    assert len(wanted) > 80 and wanted <= listed, sorted(wanted - listed)
