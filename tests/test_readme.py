import re
from pathlib import Path

import pytest

from fastrnn.tools import info

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_snippets_run_in_order(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        # In a file, because the source of a cell must be found as it is in a program.
        file = tmp_path / f"snippet_{number}.py"
        file.write_text(block)
        exec(compile(block, str(file), "exec"), names)
    promised = re.findall(r"^print\(.*#\s*(.*)$", README, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised


def test_support_matrix_is_what_the_command_prints() -> None:
    marked = r"<!-- python -m fastrnn info --markdown -->\n(.*?)\n?<!-- end -->"
    (table,) = re.findall(marked, README, re.DOTALL)
    assert table.strip() == info.support_markdown().strip()


def test_switches_are_the_ones_read() -> None:
    python, cpp = (ROOT / "fastrnn").rglob("*.py"), (ROOT / "csrc").rglob("*.cpp")
    sources = [ROOT / "setup.py", *python, *cpp]
    folders = {source.parent.relative_to(ROOT).as_posix() for source in sources}
    assert {"fastrnn", "fastrnn/compiler", "fastrnn/kernels/gpu/triton", "csrc"} <= folders
    # What is assigned is told to another package.
    read = r"(?:environ(?:\.get\(|\[)\s*|getenv\()[\"'](\w+)[\"'](?!\] = )"
    used = {name for s in sources for name in re.findall(read, s.read_text())}
    ours = {name for name in used if name.startswith("FASTRNN_")}
    assert ours == set(re.findall(r"FASTRNN_[A-Z_]+", README))
    assert used - ours - {"PATH"} <= set(re.findall(r"`([A-Z_]+)`", README))


def test_commands_and_files_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)(?: ARGS|    )", README)) <= targets
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


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


def test_first_screen_is_short() -> None:
    assert len(README.split("\n## ")[0].splitlines()) <= 40
