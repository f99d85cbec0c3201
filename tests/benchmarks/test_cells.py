"""The benchmark of published cells, from end to end. No test asserts a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import cells as benchmark


def test_the_table_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--only",
        "lstm,gru,lstm+zoneout",
        "--shape",
        "3,2,4,5",
        "--shape",
        "2,1,3,7",
        "--seconds",
        "0.001",
        "--no-compiled",
    ]
    assert benchmark.main([*options, "--save", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*/cells.md")
    rows = [line for line in file.read_text().splitlines() if line.startswith(("| lstm", "| gru"))]
    assert len(rows) == 2 * 3
    assert "(2, 1, 3, 7)" in printed and "(2, 1, 3, 7)" in file.read_text()
    assert rows[0] in printed and len(rows[0].split("|")) == 9
    assert "--only lstm,gru,lstm+zoneout" in file.read_text()


def test_other_results_are_not_timed() -> None:
    right = torch.randn(3, 4)
    benchmark.gate("lstm, ours", right + 1e-5, right, right)
    benchmark.gate("lstm, ours", right + 0.01, right + 0.01, right)
    benchmark.gate("lstm, ours", None, None, None)
    for wrong in (right + 0.01, right * torch.nan):
        with pytest.raises(AssertionError, match="lstm, ours: an error of"):
            benchmark.gate("lstm, ours", wrong, right + 1e-4, right)
