"""The benchmark under load, from end to end. No test asserts a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import load
from fastrnn.tools.bench import store


def test_the_table_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--busy", "0,1", "--threads", "2", "--seconds", "0.001", "-k", "rnn-1x1x"]
    assert load.main([*options, "--save", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*/load.md")
    rows = [line for line in file.read_text().splitlines() if line.startswith("| rnn-1x1x")]
    assert len(rows) == 2 * 4  # two modes of the smallest layer, two steppers
    assert all(row in printed for row in rows)
    assert "--busy 0,1" in file.read_text()
    # The folder of the other results: family and model tell machines of one name apart.
    assert file.parent == store.folder(tmp_path)


def test_when_a_row_holds() -> None:
    row = load.Row("row", 1, 2, (15.0, 10.0, 15.0), (1.0, 1.0, 1.0))
    assert row.holds and "| 1.50 | 1.00 |" in load.line(row)
    assert not replace(row, median=(15.1, 10.0, 20.0)).holds
    assert not replace(row, median=(10.0, 10.0, 9.9)).holds
    assert "**no**" in load.line(replace(row, median=(10.0, 10.0, 9.9)))


def test_every_cell_and_mode_is_timed() -> None:
    found = {(cell, mode) for _, cell, mode in load.cases()}
    assert len(found) == 3 * 3
    assert [w.name for w, _, _ in load.cases("gru-1x1x64x64")] == ["gru-1x1x64x64-step"]
