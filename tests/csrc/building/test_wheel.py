"""One wheel of several: fakes of wheels, as they are when unpacked."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from building import wheel
from building.cpu import MANYLINUX

from fastrnn.extension import CPU_KERNELS, bindings

METADATA = "Name: fastrnn\nRequires-Dist: torch>=2.11\nRequires-Dist: rich>=13; extra == 'demo'\n"


def tree(folder: Path, torch: str) -> Path:
    files = {
        "fastrnn/__init__.py": "",
        "fastrnn/libfastrnn_cpu.so": "kernels",
        f"fastrnn/_C.torch{torch}.cpython-311-x86_64-linux-gnu.so": torch,
        "fastrnn-1.dist-info/METADATA": METADATA,
        "fastrnn-1.dist-info/RECORD": torch,
    }
    for name, text in files.items():
        path = folder / "fastrnn-1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "fastrnn-1"


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two wheels; `wheel unpack` copies them, and `wheel pack` copies the merged one."""

    def run(module: str, command: str, option: str, to: Path, what: Path) -> None:
        assert module == "wheel" and command in ("pack", "unpack") and option.startswith("--dest")
        shutil.copytree(what, to / what.name)

    monkeypatch.setattr(wheel, "run", run)
    return [tree(tmp_path / torch, torch) for torch in ("2.13", "2.14")]


def test_a_merged_wheel_has_the_bindings_of_all(unpacked: list[Path], tmp_path: Path) -> None:
    merged = wheel.merge(unpacked, tmp_path / "work")
    names = wheel.files(merged)
    assert names == wheel.files(unpacked[0]) | wheel.files(unpacked[1])
    for torch in ("2.13", "2.14"):
        name = f"fastrnn/_C.torch{torch}.cpython-311-x86_64-linux-gnu.so"
        assert (merged / name).read_text() == torch
    needs = (merged / "fastrnn-1.dist-info" / "METADATA").read_text()
    assert needs == METADATA.replace("torch>=2.11", "torch>=2.13,<2.15")


@pytest.mark.parametrize("change", ["changed", None])
def test_wheels_of_other_sources_are_not_merged(
    unpacked: list[Path], tmp_path: Path, change: str | None
) -> None:
    library = unpacked[1] / "fastrnn" / "libfastrnn_cpu.so"
    if change is None:
        library.unlink()
    else:
        library.write_text(change)
    with pytest.raises(SystemExit, match=r"differ in fastrnn/libfastrnn_cpu\.so"):
        wheel.merge(unpacked, tmp_path / "work")


def test_a_wheel_for_newer_systems_is_refused() -> None:
    wheel.check_platform("fastrnn-1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl")
    for platform in ("manylinux_2_29_aarch64", "manylinux_2_34_x86_64", "linux_x86_64"):
        with pytest.raises(SystemExit, match=r"for glibc 2\.28 or older.*auditwheel show"):
            wheel.check_platform(f"fastrnn-1-cp311-cp311-{platform}.whl")


def test_a_wheel_requires_a_torch_that_it_has_a_binding_to() -> None:
    assert wheel.requirement([(2, 13)]) == "torch>=2.13,<2.14"
    assert wheel.requirement([(2, 10), (2, 9)]) == "torch>=2.9,<2.11"
    assert wheel.requirement([(2, 11), (2, 14)]) == "torch>=2.11,<2.15,!=2.12.*,!=2.13.*"


@pytest.mark.parametrize("library", [CPU_KERNELS, *bindings().values()], ids=lambda p: p.name)
def test_symbols_of_a_newer_glibc_have_stand_ins(library: Path) -> None:
    """Only a wheel has them; the build in place shows which are needed."""
    if shutil.which("nm") is None:
        pytest.skip("nm lists symbols, and is not installed")
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = re.findall(r" U (\w+)@+GLIBC_2\.(\d+)", listed)
    assert needed
    newer = {name for name, minor in needed if int(minor) > 28}
    there = set(
        re.findall(r"^(?:char|void\*|int|char\*) (\w+)(?:\(| =)", MANYLINUX.read_text(), re.M)
    )
    assert newer <= there, f"add these to {MANYLINUX.name}: {sorted(newer - there)}"
