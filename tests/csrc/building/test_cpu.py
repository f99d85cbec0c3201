"""The ninja file of the extension; nothing is compiled."""

from __future__ import annotations

import platform
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from building import cpu, ninja


def objects(ninja: str) -> dict[str, str]:
    """Each object's own flags, in the order of compiling."""
    lines = ninja.splitlines()
    return {
        line.split()[1].rstrip(":"): flags
        for line, flags in pairwise(lines)
        if line.startswith("build ") and ": compile " in line
    }


def linked(ninja: str) -> list[str]:
    """The objects in the order of linking."""
    (line,) = (line for line in ninja.splitlines() if line.startswith("build _C.so: link "))
    return line.split()[3:]


def test_each_instruction_set_has_its_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    text = cpu.ninja_file(Path("/build"))
    made = objects(text)
    isas = "baseline", "avx2", "avx512", "avx512_vnni"
    kernels = [f"cpu/kernels.{isa}.o" for isa in isas]
    assert " -m" not in made["cpu/kernels.baseline.o"]
    assert list(made)[:4] == kernels[::-1], "what takes longest is compiled first"
    in_order = linked(text)
    assert sorted(in_order) == sorted(made)
    assert [name for name in in_order if name.startswith("cpu/kernels.")] == kernels
    assert in_order[-4:] == kernels, "what every machine can run is linked first"

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    made = objects(cpu.ninja_file(Path("/build")))
    assert [name for name in made if name.startswith("cpu/kernels.")] == ["cpu/kernels.baseline.o"]


def test_kernels_are_compiled_without_torch() -> None:
    made = objects(cpu.ninja_file(Path("/build")))
    with_torch = {n for n, flags in made.items() if "-isystem" in flags}
    assert len(with_torch) > 3
    assert with_torch == {n for n in made if n.startswith("binding/")}


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-O3" in cpu.ninja_file(Path("/build"))
    monkeypatch.setenv("FASTRNN_DEBUG", "1")
    monkeypatch.setenv("FASTRNN_CXXFLAGS", "-fsanitize=address")
    monkeypatch.setenv("FASTRNN_LDFLAGS", "-lasan")
    monkeypatch.setenv("CXX", f"{sys.executable} -compiler")
    text = cpu.ninja_file(Path("/build"))
    assert "-O0 -g" in text and "-DNDEBUG" not in text
    assert "-fsanitize=address" in text and "-lasan" in text
    assert f"command = {sys.executable} -compiler -MMD" in text


def test_folders_with_spaces() -> None:
    assert ninja.escape(Path("/a b/c:d$")) == "/a$ b/c$:d$$"
    assert "-iquote '/a b'" in cpu.ninja_file(Path("/a b"))


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match=r"no c\+\+, g\+\+ or clang\+\+: install one"):
        cpu.compiler()
    monkeypatch.setenv("CXX", "tcc++")
    with pytest.raises(SystemExit, match=r"no tcc\+\+"):
        cpu.compiler()
