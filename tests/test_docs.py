"""The code of every page under docs/ runs, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Of these a page may show the use without them being needed by the tests.
FOREIGN = {"transformers"}


def test_there_are_pages() -> None:
    assert len(PAGES) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_snippets_run_in_order(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": __name__}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
        # A file, as `replace_` and `fastrnn.cell` read the source of functions.
        file = tmp_path / f"snippet_{number}.py"
        file.write_text(block)
        try:
            exec(compile(block, str(file), "exec"), names)
        except ModuleNotFoundError as error:
            assert error.name in FOREIGN, error


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
