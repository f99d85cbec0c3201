"""The progress bar, without rich."""

from __future__ import annotations

import sys

import pytest

from fastrnn.tools.progress import bar
from tests.support.imports import without


def test_bar_of_our_own_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("rich", monkeypatch)
    with bar() as show:
        show(0.5, "on no terminal")
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        show(0.5, "half")
        show(1.0, "all")
    halves = capsys.readouterr().out.split("\r")[1:]
    assert [h.count("#") for h in halves] == [15, 30]
    assert halves[1].endswith("\n")
