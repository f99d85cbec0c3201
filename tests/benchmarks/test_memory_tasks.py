"""The comparison of what cells remember and cost, from end to end. No test asserts a time."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

import fastrnn
from benchmarks import memory_tasks as benchmark

BUDGET = benchmark.Budget(updates=600, hidden=16, batch=32, seeds=1, rate=1e-2, lags=(2, 4))
NONE = {task.name: (0,) for task in benchmark.TASKS}


def test_the_table_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "cells.md"
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n<!-- end -->\nafter\n")
    options = ["--quick", "--only", "gru,lstm chrono", "--updates", "3", "--hidden", "4"]
    options += ["--batch", "2", "--shape", "5,2,3", "--seconds", "0.001", "--save"]
    options += ["--results", str(tmp_path / "results"), "--docs", str(page)]
    assert benchmark.main(options) == 0
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "results").glob("*/memory_tasks.md")
    rows = [line for line in file.read_text().splitlines() if line.startswith(("| gru", "| lstm"))]
    assert len(rows) == 2 and all(row in printed for row in rows)
    assert all(row.count("|") == benchmark.HEAD.splitlines()[0].count("|") for row in rows)
    assert "--only 'gru,lstm chrono' --updates 3" in file.read_text()
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert all(row in text for row in rows)


def test_rows_are_added_to_a_saved_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lags = {"gru": (2, 4, 2), "mgu": (0, 0, 0), "lstm": (4, 4, 4)}

    def run(chosen: list[benchmark.Network], *rest: object) -> list[benchmark.Row]:
        cost = benchmark.Cost(10, 1230.0, 1.5, 2**19)
        tasks = [task.name for task in benchmark.TASKS]
        return [benchmark.Row(n.name, dict.fromkeys(tasks, lags[n.name]), cost) for n in chosen]

    monkeypatch.setattr(benchmark, "run", run)

    def table(*options: str) -> tuple[list[str], list[str]]:
        results = ["--save", "--results", str(tmp_path)]
        assert benchmark.main([*options, "--lags", "2,4", *results]) == 0
        (file,) = tmp_path.glob("*/memory_tasks.md")
        lines = file.read_text().splitlines()
        return [each for each in lines if each.startswith("| ")][1:], [
            each for each in lines if each.startswith("*")
        ]

    rows, about = table("--only", "gru,mgu")
    assert [benchmark.line(benchmark.parsed(row), 4) for row in rows] == rows
    lags["mgu"] = (2, 2, 2)
    more, told = table("--only", "mgu,lstm")
    assert more[0] == rows[0] and "2 (2 to 4)" in rows[0]
    assert [row.split()[1] for row in more] == ["gru", "mgu", "lstm"]
    assert "| – |" in rows[1] and "| 2 |" in more[1] and "≥ 4" in more[2]
    assert told[0] == about[0] and told[1].startswith("*mgu, lstm: ") and len(told) == 2
    assert len(table("--only", "mgu,lstm")[1]) == 2, "one paragraph for the same rows"
    for other in (["--updates", "7"], ["--threads", "2"]):
        with pytest.raises(SystemExit):
            table("--only", "lstm", *other)
        assert "made on other terms" in capsys.readouterr().err


def test_the_image_is_drawn_twice_alike(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cost = benchmark.Cost(10, 1000.0, 1.0, 2**20)
    rows = [benchmark.Row("gru", NONE, cost), benchmark.Row("lstm", NONE, cost)]
    for name in ("a.svg", "b.svg"):
        assert benchmark.draw(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_copy_asks_for_what_was_shown() -> None:
    x, target = benchmark.copy(10, 6)
    assert x.shape == (10 + benchmark.SHOWN, 6, benchmark.SYMBOLS + 1)
    assert torch.equal(x[: len(target), :, :-1].argmax(-1), target)
    (marked,) = set(x[..., -1].nonzero()[:, 0].tolist())
    assert marked == len(x) - len(target) - 1, "the step before the first answer"
    assert x.sum() == target.numel() + 6


def test_adding_marks_two_numbers() -> None:
    x, target = benchmark.adding(40, 6)
    assert x.shape == (41, 6, 2) and target.shape == (1, 6)
    numbers, marks = x.unbind(-1)
    assert torch.equal(marks.sum(0), torch.full((6,), 2.0))
    assert marks[-1].all() and marks[4:-1].sum() == 0
    torch.testing.assert_close((numbers * marks).sum(0), target[0])
    constant = statistics.fmean(
        benchmark.added(torch.ones(1, 500, 1), benchmark.adding(5, 500).target)[0].item()
        for _ in range(20)
    )
    assert constant == pytest.approx(benchmark.CONSTANT, rel=0.05)


def test_one_bit_is_in_the_first_step_alone() -> None:
    x, target = benchmark.one_bit(20, 5)
    assert x.shape == (21, 5, 1) and target.shape == (1, 5)
    assert torch.equal(x[0, :, 0] > 0, target[0].bool())
    assert x[1:].std() < 2 * benchmark.NOISE


def test_answers_are_judged() -> None:
    target = torch.tensor([[0, 1, 1, 0]])
    right = torch.nn.functional.one_hot(target, 2).float()
    assert benchmark.named(right, target)[1] and not benchmark.named(-right, target)[1]
    numbers = torch.rand(1, 9)
    assert benchmark.added(numbers.unsqueeze(-1) + 0.1, numbers)[1]
    assert not benchmark.added(numbers.unsqueeze(-1) + 0.2, numbers)[1]


@pytest.mark.parametrize("task", benchmark.TASKS, ids=lambda task: task.name)
def test_short_lags_are_learned(task: benchmark.Task) -> None:
    (gru,) = benchmark.networks("gru")
    assert benchmark.longest(gru, task, 0, BUDGET) in BUDGET.lags


def test_the_ladder_ends_at_the_first_lag_that_is_not_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (gru,) = benchmark.networks("gru")
    tried: list[int] = []

    def solves(network: object, task: object, lag: int, *rest: object) -> bool:
        tried.append(lag)
        return lag != 40

    monkeypatch.setattr(benchmark, "solves", solves)
    budget = benchmark.Budget(1, 1, 1, 1, 1.0, benchmark.LAGS)
    assert benchmark.longest(gru, benchmark.TASKS[0], 0, budget) == 20
    assert tried == [5, 10, 20, 40]


def test_lags_are_shown_with_their_range() -> None:
    shown = [benchmark.lag_of(lags, 40) for lags in ((10, 10, 10), (5, 20, 10), (0, 0), (40, 40))]
    assert shown == ["10", "10 (5 to 20)", "–", "≥ 40"]


def test_saved_bytes_are_those_of_the_backward_pass() -> None:
    layer, x = fastrnn.LSTM(3, 5), torch.randn(7, 2, 3)
    whole = benchmark.saved_bytes(layer, x)
    # h, c and four values of each unit and step
    assert whole == 6 * 7 * 2 * 5 * x.element_size()
    assert benchmark.saved_bytes(fastrnn.LSTM(3, 5, recompute=True), x) < whole


def test_other_initial_values_are_those_of_the_network() -> None:
    plain, chrono = benchmark.networks("lstm,lstm chrono")
    assert plain.cell == chrono.cell == "lstm"
    task = benchmark.TASKS[0]
    biases = [
        benchmark.Model(network, task, 64).layer.bias_ih_l0[64:128].detach()
        for network in (plain, chrono)
    ]
    assert biases[0].max() < 0.2 < 1 < biases[1].max()
    assert [network.name for network in benchmark.networks("janet")] == ["janet"]


def test_the_networks_are_the_ones_that_are_asked_for() -> None:
    names = {network.cell for network in benchmark.NETWORKS}
    assert names >= {
        "rnn_tanh",
        "lstm",
        "gru",
        "mgu",
        "ligru",
        "peephole_lstm",
        "slstm",
        "layer_norm_lstm",
    }


@pytest.mark.parametrize(
    "options", [["--docs", "page.md"], ["--lags", "20,10"], ["--lags", "1,2"], ["--seeds", "0"]]
)
def test_impossible_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(options)
