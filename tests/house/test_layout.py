"""The tests mirror the tree, so that the name of a module leads to its tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
# tests/house is about the whole repository, and tests/clients has a file for each package.
UNMIRRORED = ("house", "clients")
MIRRORS = [
    file
    for file in FILES
    if file.name.startswith("test_") and file.relative_to(TESTS).parts[0] not in UNMIRRORED
]
# Tests that are not named after one module, and their subject.
OWN = {
    "csrc/binding/test_aoti.py": "the operator, compiled ahead of time by torch",
    "csrc/cuda/test_compile.py": "all sources of the folder, compiled for their GPUs",
    "csrc/cuda/test_faults.py": "mistakes planted in the kernels",
    "csrc/cuda/test_kernels.py": "all kernels of the folder",
    "csrc/cuda/test_machine_code.py": "machine_code.py beside it",
    "csrc/test_rings.py": "which folder may include which",
    "examples/test_examples.py": "all scripts of the folder",
    "kernels/gpu/test_on_a_gpu.py": "all that only a GPU can show",
    "kernels/gpu/triton/test_compile.py": "all kernels of the folder, compiled for their GPUs",
    "kernels/gpu/triton/test_kernels.py": "all kernels of the folder",
    "plan/test_choose.py": "`choose` of the package",
}


def name_of(file: Path) -> str:
    return file.relative_to(TESTS).as_posix()


def modules(folder: Path) -> set[str]:
    """Names of the modules that a folder of tests mirrors."""
    places = [ROOT / "fastrnn" / folder, ROOT / folder] if folder.parts else [ROOT / "fastrnn"]
    files = [file for place in places for file in place.glob("*.*")]
    files += (TESTS / folder).glob("*.cpp")  # the simulator
    files += [file.parent for place in places for file in place.glob("*/__init__.py")]
    found = {file.stem for file in files if file.suffix in ("", ".py", ".h", ".cpp", ".cu", ".cuh")}
    return {name.strip("_").removeprefix("test_") for name in found}


@pytest.mark.parametrize("file", MIRRORS, ids=name_of)
def test_a_test_is_named_after_what_it_tests(file: Path) -> None:
    """Such as test_freeze.py for freeze.py, or test_layers_weights.py and others for layers.py."""
    if name_of(file) in OWN:
        return
    stem, known = file.stem.removeprefix("test_"), modules(file.parent.relative_to(TESTS))
    assert any(stem == module or stem.startswith(f"{module}_") for module in known), sorted(known)


def test_what_has_a_name_of_its_own_is_there_and_needs_it() -> None:
    assert set(OWN) <= set(map(name_of, MIRRORS))
    for name in OWN:
        assert Path(name).stem.removeprefix("test_") not in modules(Path(name).parent), name


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(file)} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_test_is_imported(file: Path) -> None:
    """Tests share the modules of tests/support, and no others."""
    tests = [name for name in imported(file) if re.match(r"tests\..*\btest_", name)]
    assert not tests, f"{name_of(file)} imports {tests}: move what is shared to tests/support"
