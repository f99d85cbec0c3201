"""The ninja file of the extension; nothing is compiled."""

from __future__ import annotations

import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
from building import cpu, ninja
from building.torches import Torch

TORCH = Torch("2.13.0+cpu", ("/torch/include",), ("/torch/lib",))


def objects(ninja: str) -> dict[str, str]:
    """Each object's own flags, in the order of compiling."""
    lines = ninja.splitlines()
    return {
        line.split()[1].rstrip(":"): flags
        for line, flags in pairwise(lines)
        if line.startswith("build ") and ": compile " in line
    }


def linked(ninja: str, target: str = cpu.LIBRARY) -> list[str]:
    """The objects in the order of linking."""
    (line,) = (line for line in ninja.splitlines() if line.startswith(f"build {target}: link "))
    return line.split()[3:]


def ninja_file(folder: str = "/build", torch: Torch = TORCH) -> str:
    return cpu.ninja_file(Path(folder), torch)


def test_each_instruction_set_has_its_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-x86_64")
    text = ninja_file()
    made = objects(text)
    of = "baseline", "avx2", "avx2.formats", "avx512", "avx512.formats", "avx512_vnni.formats"
    kernels = [f"cpu/kernels.{each}.o" for each in of]
    assert " -m" not in made["cpu/kernels.baseline.o"]
    assert list(made)[:6] == kernels[::-1], "what takes longest is compiled first"
    in_order = linked(text)
    assert sorted(in_order) == sorted(name for name in made if name.startswith("cpu/"))
    assert [name for name in in_order if name.startswith("cpu/kernels.")] == kernels
    assert in_order[-6:] == kernels, "what every machine can run is linked first"

    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-aarch64")
    made = objects(ninja_file())
    assert [name for name in made if name.startswith("cpu/kernels.")] == ["cpu/kernels.baseline.o"]


def test_kernels_are_compiled_without_torch() -> None:
    made = objects(ninja_file())
    with_torch = {n for n, flags in made.items() if "-isystem" in flags}
    assert len(with_torch) > 3
    assert with_torch == {n for n in made if n.startswith(f"{TORCH.folder}/binding/")}


def test_bindings_to_several_torches_share_the_kernels() -> None:
    other = Torch("2.14.0", ("/other/include",), ("/other/lib",))
    one, two = ninja_file(), ninja_file(torch=other)
    shared = objects(one).items() & objects(two).items()
    assert {name for name, _ in shared} == set(linked(one)) == set(linked(two))
    assert "/other" not in one and "/torch/" not in two
    for torch, text in ((TORCH, one), (other, two)):
        objects_of_binding = linked(text, f"{torch.folder}/_C.so")
        assert objects_of_binding.pop() == cpu.LIBRARY
        assert {name.split("/")[0] for name in objects_of_binding} == {torch.folder}
    assert "-rpath,'$$ORIGIN'" in one and f"-soname,{cpu.LIBRARY}" in one


def test_a_wheel_differs_in_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ninja_file()
    monkeypatch.setenv("FASTRNN_MANYLINUX", "1")
    wheel = ninja_file()
    added = objects(wheel).items() - objects(plain).items()
    assert [name for name, _ in added] == [cpu.MANYLINUX_OBJECT]
    assert objects(plain).items() < objects(wheel).items()
    for target in (cpu.LIBRARY, f"{TORCH.folder}/_C.so"):
        assert cpu.MANYLINUX_OBJECT in linked(wheel, target)
        assert cpu.MANYLINUX_OBJECT not in linked(plain, target)


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-O3" in ninja_file()
    monkeypatch.setenv("FASTRNN_DEBUG", "1")
    monkeypatch.setenv("FASTRNN_CXXFLAGS", "-fsanitize=address")
    monkeypatch.setenv("FASTRNN_LDFLAGS", "-lasan")
    monkeypatch.setenv("CXX", f"{sys.executable} -compiler")
    text = ninja_file()
    assert "-O0 -g" in text and "-DNDEBUG" not in text
    assert "-fsanitize=address" in text and "-lasan" in text
    assert f"command = {sys.executable} -compiler -MMD" in text


def test_folders_with_spaces() -> None:
    assert ninja.escape(Path("/a b/c:d$")) == "/a$ b/c$:d$$"
    assert "-iquote '/a b'" in ninja_file("/a b")


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match=r"no c\+\+, g\+\+ or clang\+\+: install one"):
        cpu.compiler()
    monkeypatch.setenv("CXX", "tcc++")
    with pytest.raises(SystemExit, match=r"no tcc\+\+"):
        cpu.compiler()
