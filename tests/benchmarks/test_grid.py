"""The grid beside torch.nn: its points, repeated measurements, summary and heat map. No test
asserts a time."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn
from benchmarks.grid import __main__ as command
from benchmarks.grid import heatmap, summary, timing
from benchmarks.grid.points import (
    ALL,
    KINDS,
    MOST_WORK,
    OURS,
    QUICK,
    Loop,
    Point,
    Sizes,
    is_left_out,
    points,
)
from benchmarks.grid.timing import LONGER, Pair, Row
from fastrnn.tools.bench import machine
from fastrnn.tools.bench.implementation import TorchLayer
from tests.support.bench import Scaled, here
from tests.support.paths import ROOT

SVG = "{http://www.w3.org/2000/svg}"
POINT = Point("lstm", "inference", 4, 2, 16)


def row(*ratios: float, point: Point = POINT, wrong: str | None = None) -> Row:
    """A row whose measurements have these ratios; ours always takes 100 µs."""
    return Row(point, 2, tuple(Pair(100.0, 100.0 * ratio) for ratio in ratios), 1e-7, wrong)


def rows_of(ratios: Iterable[float]) -> list[Row]:
    """Rows of different points with these ratios."""
    return [row(ratio, point=replace(POINT, batch=n)) for n, ratio in enumerate(ratios, 1)]


# Points


def test_the_grid_has_every_size_once_except_those_with_too_much_work() -> None:
    every = points()
    assert len({point.name for point in every}) == len(every) == 3 * 2 * 5 * 7 * (5 + 1)
    timed = [point for point in every if not is_left_out(point)]
    assert len(timed) >= 1200
    assert max(point.work for point in timed) <= MOST_WORK
    assert sum(point.work for point in timed) < 1e12  # some seconds of each implementation
    assert {point.kind for point in timed} == set(KINDS)
    assert {point.hidden for point in timed} == set(ALL.hidden)
    assert is_left_out(Point("lstm", "training", 64, 128, 1024))
    assert not is_left_out(Point("lstm", "inference", 64, 1, 1024))


def test_work_is_that_of_the_products() -> None:
    # Four gates of 16 units, which read 16 inputs and 16 states, in 4 steps of 2 rows.
    assert POINT.work == 2 * (4 * 16) * (16 + 16) * 4 * 2
    assert replace(POINT, mode="training").work == 3 * POINT.work
    assert replace(POINT, kind="lstm_cell").work == POINT.work


def test_some_points_can_be_chosen() -> None:
    chosen = points(["gru_cell"], ["training"], Sizes((1, 64), (2, 8), (16,)))
    assert chosen == [Point("gru_cell", "training", 4, batch, 16) for batch in (2, 8)]
    layers = points(["gru"], ["training"], Sizes((1, 64), (2,), (16,)))
    assert [point.steps for point in layers] == [1, 64]
    assert set(points(sizes=QUICK)) < set(points())


def test_a_loop_over_a_cell_carries_the_state() -> None:
    layer, cell = nn.LSTM(3, 5), nn.LSTMCell(3, 5)
    for name, parameter in cell.named_parameters():
        parameter.data = getattr(layer, f"{name}_l0").data
    x = torch.randn(4, 2, 3)
    expected, (h, c) = layer(x)
    output, states = Loop(cell)(x)
    torch.testing.assert_close(output, expected[-1])
    torch.testing.assert_close(states, (h[0], c[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_ours_computes_all_gradients_with_our_class(kind: str) -> None:
    case = Point(kind, "training", 4, 2, 16).case(1)
    prepared = OURS.prepare(case)
    with prepared.around():
        results = prepared.read(prepared.call())
    wanted = {f"gradient of {name}" for name, _ in case.module.named_parameters()}
    assert len(wanted) == 4
    assert wanted | {"gradient of x"} == {name for name in results if name.startswith("gradient")}
    assert results["gradient of x"].shape == (4, 2, 16)
    module = OURS._convert(case.module)
    inner = module.cell if isinstance(module, Loop) else module
    assert type(inner).__module__.startswith("fastrnn."), type(inner)


# Timing


@pytest.mark.parametrize(
    ("ratios", "counts", "ratio"),
    [
        ([1.2], 1, 1.2),
        ([0.97], 1, 0.97),
        ([0.9, 1.1, 1.0], 3, 1.05),
        ([0.9, 0.8, 0.6], 3, 0.7),
        ([0.5, 0.8, 1.3, 0.9], 4, 0.9),
        ([0.5, 1.1, 0.6, 1.0], 4, 1.0),
    ],
)
def test_a_suspicious_point_is_measured_again_and_longer(
    ratios: list[float], counts: int, ratio: float
) -> None:
    left, spans = list(ratios), []

    def time(seconds: float) -> Pair:
        spans.append(seconds)
        return Pair(10.0, 10.0 * left.pop(0))

    pairs = timing.enough(time, 0.5)
    assert not left and len(pairs) == counts
    assert spans == [0.5] + [0.5 * LONGER] * (counts - 1)
    assert Row(POINT, 2, pairs).ratio == pytest.approx(ratio)
    assert Row(POINT, 2, pairs).as_json()["measured"] == counts


def test_a_wrong_point_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Pair:
        raise AssertionError("a wrong point was timed")

    wrong = TorchLayer("fastrnn", lambda layer: Scaled(fastrnn.from_torch(layer), 1.001))
    monkeypatch.setattr(timing, "OURS", wrong)
    monkeypatch.setattr(timing, "timed", fail)
    found = timing.measured(POINT, torch.get_num_threads(), 1e-4)
    assert found.wrong is not None and "output of fastrnn is off" in found.wrong
    assert found.pairs == () and math.isnan(found.ratio)


@pytest.mark.parametrize("kept", [row(1.5), row(0.9, 1.1, 1.0), row(wrong="off")])
def test_rows_survive_being_stored(kept: Row) -> None:
    assert Row.from_json(kept.as_json()) == kept


# Summary


def test_the_summary_counts() -> None:
    wrong = row(wrong="off", point=replace(POINT, batch=9))
    again = row(0.5, 1.3, 1.3, point=replace(POINT, batch=8))
    rows = [*rows_of([0.5, 0.969, 0.97, 2.0]), wrong, again]
    assert summary.counts(rows) == (
        "6 points: 2 below 0.97, 1 wrong; 1 were below 0.97 at first and measured again."
    )


def test_the_table_has_a_line_for_each_kind_and_mode() -> None:
    training = [
        replace(each, point=replace(each.point, mode="training")) for each in rows_of([0.5, 2, 8])
    ]
    wrong = row(wrong="off", point=replace(POINT, kind="gru_cell"))
    lines = summary.by_kind([*rows_of([1.5]), *training, wrong]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2:] == [
        ["LSTM", "inference", "1", "0", "1.500", "1.500", "1.500"],
        ["LSTM", "training", "3", "1", "0.500", "2.000", "2.000"],
        ["GRUCell", "inference", "1", "0", "–", "–", "–"],
        ["all", "", "5", "1", "0.500", "1.750", "1.861"],
    ]
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"


def test_the_ten_worst_come_lowest_first() -> None:
    ratios = [1 + (7 * n % 12) / 10 for n in range(12)]
    rows = [*rows_of(ratios), row(wrong="off")]
    assert [each.ratio for each in summary.worst(rows)] == pytest.approx(sorted(ratios)[:10])


def test_left_out_points_are_named_with_the_reason() -> None:
    large = [Point("lstm", "training", 64, batch, 1024) for batch in (32, 128)]
    text = summary.left_out([*large, Point("gru_cell", "training", 4, 128, 1024)])
    assert text.startswith("3 points were left out, because a call has more than 20 GFLOP")
    assert text.endswith(
        "LSTM training (64, 32, 1024), (64, 128, 1024); GRUCell training (4, 128, 1024)."
    )


def test_the_page_has_the_grid_of_the_results() -> None:
    folder = (ROOT / "docs" / "img" / command.IMAGE).resolve().parent
    without = [point for point in points() if is_left_out(point)]
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert summary.docs(text, command.load(folder), without) == text


# Heat map


@pytest.mark.parametrize(
    ("ratio", "level", "text"),
    [
        (0.5, "slower", "0.50"),
        (0.9699, "slower", "0.96"),
        (0.97, "even", "0.97"),
        (1.0499, "even", "1.04"),
        (1.15, "faster", "1.15"),
        (1.5, "fast", "1.50"),
        (2.999, "fast", "2.99"),
        (3.0, "fastest", "3.00"),
        (12.39, "fastest", "12.3"),
        (5323.3, "fastest", "5323"),
    ],
)
def test_a_ratio_has_a_colour_and_is_never_rounded_up(ratio: float, level: str, text: str) -> None:
    assert heatmap.level(row(ratio)) == level
    assert heatmap.figure(ratio) == text


def cells_of(svg: str) -> dict[str, tuple[str, str, tuple[int, int]]]:
    """Class, text and place of each cell, by the point that its title names."""
    found = {}
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        title, text, box = (group.find(SVG + name) for name in ("title", "text", "rect"))
        if title is not None:
            assert text is not None and box is not None and title.text and text.text
            place = (int(box.attrib["x"]), int(box.attrib["y"]))
            found[title.text.split(":")[0]] = (group.attrib["class"], text.text, place)
    return found


def test_every_point_has_a_cell_of_its_colour() -> None:
    ratios = (0.4, 0.98, 1.2, 2.0, 7.0)
    every = points(KINDS, sizes=Sizes((1, 4), (1, 2, 8), (16, 64)))
    rows = [row(ratios[n % 5], point=point) for n, point in enumerate(every)]
    rows[7] = row(wrong="a < b", point=every[7])
    cells = cells_of(heatmap.draw(rows, "a machine"))
    assert len(cells) == len(rows) == len({place for _, _, place in cells.values()})
    for each in rows:
        level, text, _ = cells[each.point.title]
        assert level == heatmap.level(each)
        assert text == ("wrong" if each.wrong else heatmap.figure(each.ratio))
    assert {level for level, _, _ in cells.values()} == set(heatmap.LEGEND) - {"empty"}


def test_columns_are_steps_and_lines_are_batches() -> None:
    rows = [row(1.0, point=point) for point in points(["gru"], ["inference"])]
    cells = cells_of(heatmap.draw(rows, "a machine"))
    x, y = cells["GRU, inference, (1, 1, 16)"][2]
    assert cells["GRU, inference, (2, 1, 16)"][2] == (x + heatmap.WIDTH, y)
    assert cells["GRU, inference, (1, 2, 16)"][2] == (x, y + heatmap.HEIGHT)
    assert cells["GRU, inference, (1, 1, 64)"][2] == (x, y + 7 * heatmap.HEIGHT + heatmap.GAP)


def test_a_point_without_a_row_is_an_empty_cell() -> None:
    rows = [row(1.0, point=replace(POINT, steps=n, batch=n)) for n in (1, 2)]
    root = ET.fromstring(heatmap.draw(rows, "a machine"))
    kinds = [group.attrib["class"] for group in root.iter(f"{SVG}g") if len(group) > 1]
    assert sorted(kinds) == ["empty", "empty", "even", "even"]


# The command


def test_two_points_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK", Sizes((1,), (1, 3), (8,)))
    monkeypatch.setattr(machine, "measure", here)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{summary.BEGIN}\nold\n<!-- end -->\nafter\n")
    common = ["--quick", "--seconds", "1e-4", "--save", "--results", str(tmp_path / "results")]
    arguments = [*common, "--only", "rnn_cell", "--mode", "inference", "--docs", str(page)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "RNNCell, inference, H = 8: 2 points" in printed
    assert "2 points: " in printed and "No point was left out." in printed

    (folder,) = (tmp_path / "results").iterdir()
    results = command.load(folder)
    found = [each for each, _ in results.rows]
    assert [each.point.batch for each in found] == [1, 3]
    for each in found:
        assert each.pairs and each.ours > 0 and each.theirs > 0 and each.wrong is None
        assert each.error is not None and each.error < 1e-5
    (run,) = results.runs
    assert run.command.startswith("python -m benchmarks.grid --quick")
    assert run.machine.threads == torch.get_num_threads() and run.commit
    assert set(run.versions) >= {"fastrnn", "torch"}

    drawing = page.parent / "img" / command.IMAGE
    assert drawing.resolve() == folder / command.IMAGE
    assert set(cells_of(drawing.read_text())) == {each.point.title for each in found}
    text = page.read_text()
    assert f"](img/{command.IMAGE})" in text and f"`{run.command}`" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text

    assert command.main([*common, "--only", "rnn,rnn_cell", "--mode", "training"]) == 0
    assert len(command.load(folder).rows) == 2 + 4, "earlier points were lost"
    capsys.readouterr()
    assert command.main(["--saved", str(folder)]) == 0
    assert "\n6 points: " in capsys.readouterr().out


def test_a_wrong_point_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_if_three(point: Point, *_: object) -> Row:
        return row(wrong="off by 1", point=point) if point.batch == 3 else row(1.5, point=point)

    monkeypatch.setattr(timing, "measured", wrong_if_three)
    monkeypatch.setattr(command, "QUICK", Sizes((1,), (1, 3), (8,)))
    assert command.main(["--quick", "--only", "gru", "--mode", "training"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: GRU, training, (1, 3, 8): off by 1" in printed
    assert "2 points: 0 below 0.97, 1 wrong" in printed


def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, reason in (
        (["--only", "lstm,mlp"], "no kind mlp; there are: lstm, gru"),
        (["--docs", "page.md"], "--docs needs --save or --saved"),
        (["--saved", str(tmp_path)], "has no grid.json with points"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert reason in capsys.readouterr().err
