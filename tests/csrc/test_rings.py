"""The folders of csrc/ include downwards only: binding stands on cpu and cuda, those on core."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import CSRC

SOURCES = sorted(
    path
    for path in CSRC.rglob("*")
    if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.parent != CSRC / "building"
)
# A folder, and those whose headers it may include.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "binding": {"core", "cpu", "cuda", "binding"},
}
GENERATED = {"cells.gen.h"}  # the build generates it from fastrnn/cells
SIMULATOR = {"cudasim.h"}  # in tests/cudasim, in place of a GPU
TORCH = re.compile(r"(torch|ATen|c10|pybind11)/")


def folder(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def includes(path: Path, brackets: str) -> set[str]:
    opening, closing = tuple(brackets)
    text = path.read_text(encoding="utf-8")
    return set(re.findall(rf"^\s*#\s*include {opening}([^{closing}]+){closing}", text, re.M))


def test_every_source_is_in_a_ring() -> None:
    assert len(SOURCES) > 30
    assert {folder(path) for path in SOURCES} == set(MAY_INCLUDE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_a_source_includes_downwards_only(path: Path) -> None:
    own = includes(path, '""') - GENERATED - SIMULATOR
    for name in own:
        assert (CSRC / name).is_file(), f"{name}: named from csrc/, as all of them"
        assert name.split("/")[0] in MAY_INCLUDE[folder(path)], name
    if folder(path) != "binding":
        assert [name for name in includes(path, "<>") if TORCH.match(name)] == []


def test_no_circle() -> None:
    """A header and its source count as one file: a source may include what a header may not."""

    def unit(name: str) -> str:
        return str(Path(name).with_suffix(""))

    needs: dict[str, set[str]] = {}
    for path in SOURCES:
        name = unit(str(path.relative_to(CSRC)))
        needs.setdefault(name, set()).update(
            unit(each) for each in includes(path, '""') - GENERATED - SIMULATOR
        )
        needs[name].discard(name)
    left = dict(needs)
    while left:
        done = [name for name, below in left.items() if not below & left.keys()]
        assert done, f"in a circle: {', '.join(sorted(left))}"
        for name in done:
            del left[name]


def test_each_ring_says_what_it_is() -> None:
    for name in MAY_INCLUDE:
        text = (CSRC / name / "README.md").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40
