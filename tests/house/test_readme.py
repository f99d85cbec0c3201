"""The README is one page, its code runs, and the things that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets_run_in_order(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        # A file, because the source of a cell must be found, as in a program.
        file = tmp_path / f"snippet_{number}.py"
        file.write_text(block)
        exec(compile(block, str(file), "exec"), names)
    promised = re.findall(r"^print\(.*#\s*(.*)$", README, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/contributing.md"])
def test_commands_and_files_exist(page: str) -> None:
    file = ROOT / page
    text = file.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)", text))
    assert named and named <= targets
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (file.parent / path).exists(), path


def test_the_first_lines_say_what_is_measured_and_what_is_not() -> None:
    first = " ".join(README.splitlines()[:10])
    assert "CPU" in first and "x86-64" in first and "Linux" in first
    assert "no GPU kernel has ever run on a GPU" in first


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 100
    assert len(README.split()) <= 900
    assert len(README.split("\n## ")[0].splitlines()) <= 50


def test_every_folder_of_the_package_tells_what_is_in_it() -> None:
    folders = {path.parent for path in (ROOT / "fastrnn").rglob("*.py")}
    assert ROOT / "fastrnn" / "kernels" / "gpu" / "triton" in folders
    for folder in folders:
        text = (folder / "README.md").read_text()
        assert len(text.splitlines()) <= 40, folder
        files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        inside = {f"{path.name}/" for path in folder.iterdir() if path in folders}
        assert [name for name in sorted(files | inside) if f"`{name}`" not in text] == [], folder
        named = set(re.findall(r"^- `([\w/.]+)`", text, re.MULTILINE))
        assert [name for name in named if not (folder / name).exists()] == [], folder
