"""The benchmark of what a call costs, from end to end. No test asserts a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import calls
from benchmarks.calls import CASES, Case, Row

SMALL = ["--shape", "2,1,3,4", "--seconds", "0.0001"]


def test_the_table_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = [*SMALL, "--only", "stack of 2,heads,packed", "--cell", "gru"]
    assert calls.main([*options, "--results", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir()), "it writes only if asked"
    assert calls.main([*options, "--save", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*/calls.md")
    rows = [line for line in file.read_text().splitlines() if "| GRU |" in line]
    names = [row.split(" | ")[0].strip("| ") for row in rows]
    assert names == [
        case.name
        for case in CASES
        if case.name.startswith(("stack of 2", "heads", "packed")) and "GRU" in case.cells
    ]
    assert all(row in printed and len(row.split("|")) == 11 for row in rows)
    assert "--only 'stack of 2,heads,packed'" in file.read_text()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_ours_and_theirs_compute_the_same(case: Case) -> None:
    torch.manual_seed(0)
    for cell in case.cells:
        if case.ours:
            continue
        ours, theirs = calls.modules(case, cell, (3, 2, 5, 16))
        x, leaf = calls.input_of(case, (3, 2, 5, 16))
        results = []
        for module in (ours, theirs):
            y = calls.first(case.call(module, x))
            leaves = [leaf, *module.parameters()]
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_entries_in_which_torch_is_faster_stand_out() -> None:
    row = Row(Case("packed", {}), "LSTM", (1, 1, 2, 2), (4.0, 2.0), (1.0, 3.0))
    assert row.line == "| packed | LSTM | (1, 1, 2, 2) | 4.0 | 2.0 | **0.50** | 1.0 | 3.0 | 3.00 |"
    assert "torch.nn is faster in 1 entries" in calls.page([row], "command")
