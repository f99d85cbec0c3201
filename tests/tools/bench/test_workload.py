"""The counts of a workload, and invalid workloads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastrnn.tools.bench.workload import Workload


def test_flops_and_weight_reads_by_hand() -> None:
    work = Workload("w", steps=10, batch=3, inputs=5, hidden=7, layers=2, bidirectional=True)
    first, second = 2 * (4 * 7) * (5 + 7) * 2, 2 * (4 * 7) * (14 + 7) * 2
    assert work.flops("lstm", "inference") == 30 * (first + second)
    assert work.flops("lstm", "training") == 3 * 30 * (first + second)
    assert work.weight_reads("gru", "inference") == (20, 2 * 3 * 7 * 7 * 4)
    assert work.weight_reads("gru", "training") == (40, 2 * 3 * 7 * 7 * 4)
    step = replace(work, steps=1, layers=1, bidirectional=False, dtype="bfloat16")
    assert step.weight_reads("rnn", "step") == (1, 7 * (5 + 7) * 2)


def test_packed_rows_count_without_padding() -> None:
    work = Workload("w", 5, 3, 4, 8, lengths=(5, 2, 1))
    assert work.rows == 8
    assert work.flops("rnn", "inference") == 8 * 2 * 8 * 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"layers": 0},
        {"dtype": "int8"},
        {"modes": ("train",)},
        {"lengths": (5, 5)},
        {"lengths": (2, 5, 1)},
        {"lengths": (4, 2, 1)},
    ],
)
def test_impossible_workloads_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Workload("w", 5, 3, 4, 8).changed(wrong)
