"""The pages under docs/ are true: their code runs in the order of the page, their links lead
somewhere, and shown outputs of commands are what they print. Examples of docstrings run as well.

`python -m tests.house.test_docs` writes the shown outputs anew.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import fastrnn
from fastrnn import cells
from fastrnn.__main__ import main
from fastrnn.cells.published import MODULES
from fastrnn.compiler.derive import derive
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Packages that a page or an integration may use although the tests do not install them.
FOREIGN = {
    "transformers",
    "opacus",
    "torchrl",
    "tensordict",
    "jax",
    "onnx",
    "onnxruntime",
    "onnxscript",
}
SHOWN = re.compile(
    r"(<!-- python -m fastrnn (?P<command>.*?) -->\n)(?P<text>.*?)(\n?<!-- end -->)", re.DOTALL
)


def pages(pattern: re.Pattern[str] | None = None) -> pytest.MarkDecorator:
    """A test for each page, or for each page that contains the pattern."""
    chosen = [p for p in PAGES if pattern is None or pattern.search(p.read_text(encoding="utf-8"))]
    return pytest.mark.parametrize("page", chosen, ids=lambda p: str(p.relative_to(DOCS)))


def printed(command: str) -> str:
    """The output of `python -m fastrnn COMMAND`: a table as it is, other text as a block."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(shlex.split(command)) in (0, None)
    text = out.getvalue().strip()
    return text if text.startswith("|") else f"```text\n{text}\n```"


def refreshed(text: str) -> str:
    """A page with its outputs of commands written anew."""
    return SHOWN.sub(lambda found: found[1] + printed(found["command"]) + "\n<!-- end -->", text)


def test_there_are_pages() -> None:
    assert {page.stem for page in PAGES} >= {"index", "tutorial", "architecture", "glossary"}


@pages()
def test_snippets_run_in_order(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": __name__}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
        # A file, because `replace_` and `fastrnn.cell` read the source of functions.
        file = tmp_path / f"snippet_{number}.py"
        file.write_text(block)
        try:
            exec(compile(block, str(file), "exec"), names)
        except ModuleNotFoundError as error:
            assert error.name in FOREIGN, error


@pages()
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\(([^)#:\s]+)(?:#([^)]*))?\)", text):
        file = page.parent / target
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w]+", "-", h.lower()).strip("-") for h in heads}, anchor
    for included in re.findall(r'^--8<-- "(.*)"$', text, re.M):
        assert (ROOT / included).exists(), included


def test_paths_exist() -> None:
    if not (ROOT / "csrc" / "core").is_dir() or not (ROOT / "fastrnn" / "kernels").is_dir():
        pytest.skip("the folders of docs/architecture.md are not there")
    folders = r"`((?:fastrnn|csrc|tests|benchmarks|docs)/[\w./-]*)`"
    for page in PAGES:
        for path in re.findall(folders, page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


@pages(SHOWN)
def test_shown_output_is_what_the_command_prints(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert refreshed(text) == text, "to write it anew: python -m tests.house.test_docs"


def test_the_support_matrix_is_shown() -> None:
    assert "<!-- python -m fastrnn info --markdown -->" in (DOCS / "support.md").read_text()


def test_the_table_of_cells_is_what_is_derived() -> None:
    page = (DOCS / "cells.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{name}`" for name in (*cells.names()[:4], *MODULES)]
    for name, _, gates, states, saved, _ in rows:
        derived = derive(cells.get(name.strip("`")))
        assert gates == " ".join(derived.gates), name
        assert states == " ".join(derived.states), name
        assert saved == str(len(derived.saved)), name


def test_the_page_lists_the_cells_that_begin_with_published_values() -> None:
    section = (DOCS / "cells.md").read_text(encoding="utf-8").partition("## How they begin")[2]
    rows = re.findall(r"^\| ([a-z0-9_, ]+) \|", section, re.M)
    listed = {name for row in rows for name in row.split(", ")} - {"cell"}
    own = set()
    for name in MODULES:
        cell = cells.get(name)
        if cell.initialize is not None or any(p.init is not None for p in cell.params.values()):
            own.add(name)
        else:
            assert f"`{name}`" in section
    assert listed == own


def test_switches_are_the_ones_read() -> None:
    sources = [ROOT / "setup.py"]
    for folder, kinds in (("fastrnn", ("py",)), ("csrc", ("py", "cpp", "h", "cu", "cuh"))):
        sources += [file for kind in kinds for file in (ROOT / folder).rglob(f"*.{kind}")]
    read = r"(?:environ(?:\.get\(|\[|\.setdefault\()\s*|getenv\()[\"'](\w+)"
    folders = {source.parent.relative_to(ROOT).as_posix() for source in sources}
    assert {"fastrnn", "fastrnn/compiler", "fastrnn/kernels/gpu/triton", "csrc/cpu"} <= folders
    used = {name for s in sources for name in re.findall(read, s.read_text(encoding="utf-8"))}
    page = (DOCS / "switches.md").read_text()
    ours = {name for name in used if name.startswith("FASTRNN_")}
    assert len(ours) >= 10
    assert ours == set(re.findall(r"FASTRNN_[A-Z_]+", page))
    # The benchmark sets these for JAX.
    others = used - ours - {"PATH", "NPROC", "JAX_PLATFORMS"}
    assert others <= set(re.findall(r"`([A-Z_]+)`", page))


def test_make_variables_are_the_ones_there_are() -> None:
    makefile = (ROOT / "Makefile").read_text()
    page = (DOCS / "switches.md").read_text()
    shown = set(re.findall(r"`([A-Z]+)=`", page.partition("## make")[2]))
    assert shown == set(re.findall(r"^([A-Z]+) \?=", makefile, re.M))


def test_every_public_name_has_its_entry() -> None:
    page = (DOCS / "api.md").read_text()
    entries = set(re.findall(r"^::: fastrnn\.(\w+)$", page, re.M))
    assert entries == set(fastrnn.__all__) - {"__version__"}


def test_the_site_has_every_page() -> None:
    yaml = pytest.importorskip("yaml")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w/-]+\.md", str(nav))
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]


# Examples of docstrings


def modules() -> list[str]:
    """Names of all modules of the package whose source has an example."""
    names = ["fastrnn", *(m.name for m in pkgutil.walk_packages(fastrnn.__path__, "fastrnn."))]
    folder = Path(fastrnn.__file__).parent
    found = []
    for name in names:
        stem = folder.joinpath(*name.split(".")[1:])
        file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        if file.exists() and re.search(r"^\s*>>> ", file.read_text(encoding="utf-8"), re.M):
            found.append(name)
    return found


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name in FOREIGN, error
        pytest.skip(f"{error.name} is not installed")
    assert module.__file__ is not None
    written = len(re.findall(r"^\s*>>> ", Path(module.__file__).read_text(encoding="utf-8"), re.M))
    examples = [e for test in doctest.DocTestFinder().find(module) for e in test.examples]
    assert len(examples) == written, "doctest does not see all examples"
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted == written and outcome.failed == 0


def test_there_are_examples() -> None:
    assert len(modules()) >= 5


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
