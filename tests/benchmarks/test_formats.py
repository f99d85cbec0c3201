"""The table of int8 and bfloat16, from end to end. No test asserts a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import fastrnn
from benchmarks import formats as command
from benchmarks import report, workloads
from fastrnn.tools import tolerance
from fastrnn.tools.bench import formats, machine, measure, store
from fastrnn.tools.bench.comparison import Row, Verdict
from fastrnn.tools.bench.implementation import OURS, TorchLayer
from fastrnn.tools.bench.workload import BEST_BASELINE
from tests.support.bench import Scaled, entry, here, results_of, row
from tests.support.paths import ROOT

TINY = (
    replace(workloads.of_formats(3, 2, 8, None), cells=("gru",), quick=True),
    replace(workloads.trained(3, 2, 8, 1.0), quick=True),
    workloads.of_formats(1, 1, 512, None),
)

LSTM = row(
    entry("fastrnn float32", "ours", 100.0),
    entry("fastrnn int8", "ours", 40.0),
    entry("fastrnn bfloat16", "ours", 50.0),
    entry("torch.ao int8", "baseline", 80.0),
    entry("OpenVINO bfloat16", "baseline", 30.0),
    steps=100,
)
TRAINED = row(
    entry("fastrnn", "ours", 100.0),
    entry("fastrnn float32", "variant", 150.0),
    entry("torch.nn", "baseline", 90.0),
    mode="training",
    dtype="bfloat16",
)


def cells(table: str) -> list[list[str]]:
    """The cells of a table without its rule."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_targets_are_of_implementations_that_exist() -> None:
    ours = {each.name for each in formats.OURS} | {each.name for each in OURS}
    theirs = {each.name for each in formats.BASELINES}
    names = [w.name for w in workloads.FORMATS]
    assert len(names) == len(set(names))
    assert not set(names) & {w.name for w in workloads.WORKLOADS}
    for work in workloads.FORMATS:
        assert {target.mode for target in work.targets} == set(work.modes)
        for target in work.targets:
            assert target.of is None or target.of in ours
            assert target.against in {BEST_BASELINE, formats.FLOAT32} | theirs
    for rivals in command.RIVALS.values():
        assert set(rivals) <= theirs | {BEST_BASELINE}
    assert set(formats.FORMATS) == set(tolerance.FORMATS)


def test_the_tables() -> None:
    head, line = cells(command.speeds([LSTM]))
    assert head[:6] == ["", "T, B, I, H", "float32", "int8", "int16", "bfloat16"]
    assert line == [
        *("LSTM", "(100, 1, 8, 8)", "100 µs", "40 µs, 2.5×", "–", "50 µs, 2×"),
        *("2×", "–", "*0.75×* OpenVINO bfloat16"),
        *("–", "*0.6×*"),
    ]
    assert cells(command.training([TRAINED]))[1] == [
        *("LSTM", "(10, 1, 8, 8)", "150 µs", "100 µs", "1.5×", "*0.9×*"),
    ]
    errors = cells(command.errors([LSTM, replace(LSTM, cell="gru", entries=LSTM.entries[:2])]))
    assert errors[0] == ["largest error", "LSTM", "GRU", "tolerance"]
    assert errors[1] == ["fastrnn float32", "1.0e-07", "1.0e-07", ""]
    assert errors[3] == ["fastrnn bfloat16", "1.0e-07", "–", f"{tolerance.FORMATS['bfloat16']:.0e}"]


def test_targets_that_were_not_reached_are_listed() -> None:
    verdicts = (
        Verdict("fastrnn float32", 3, 2.5, "missed", "fastrnn int8"),
        Verdict("ONNX Runtime int8", 1.1, None, "not measured", "fastrnn int8"),
        Verdict("OpenVINO", 1, 2.0, "reached", "fastrnn int8"),
    )
    lines = command.targets([replace(LSTM, verdicts=verdicts)]).splitlines()
    assert lines == [
        "targets: 1 missed, 1 not measured, 1 reached",
        "missed: LSTM (100, 1, 8, 8): fastrnn int8 over fastrnn float32: 2.50, target 3",
        "not measured: LSTM (100, 1, 8, 8): fastrnn int8 over ONNX Runtime int8: target 1.1",
    ]


def test_the_page_has_the_results_of_a_machine() -> None:
    text = (ROOT / "docs" / "quantize.md").read_text()
    found = [store.load(file) for file in sorted(report.RESULTS.glob(f"*/{command.FILE}"))]
    none: store.Results[Row] = store.Results((), ())
    assert text in [command.docs(text, results) for results in found or [none]]


def test_a_page_without_rows_says_so() -> None:
    page = f"{command.BEGIN}\nold\n<!-- end -->\n"
    assert command.NOT_MEASURED in command.docs(page, store.Results((), ()))
    assert "LSTM" in command.docs(page, results_of(LSTM, TRAINED))


def test_two_rows_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "WORKLOADS", TINY)
    monkeypatch.setattr(machine, "measure", here)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}\nold\n<!-- end -->\nafter\n")
    options = ["--quick", "--seconds", "1e-4", "--save", "--results", str(tmp_path / "results")]
    assert command.main([*options, "--docs", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "1/2  GRU (3, 2, 8, 8): fastrnn float32" in printed
    assert "2/2  LSTM, training (3, 2, 8, 8): fastrnn" in printed and "targets: " in printed

    (file,) = (tmp_path / "results").glob(f"*/{command.FILE}")
    results = store.load(file)
    inference, training = (found for found, _ in results.rows)
    missing = {each.name for each in formats.OURS if each.available()}
    names = {e.name for e in inference.entries}
    assert {each.name for each in formats.OURS} - missing <= names
    assert {"torch.nn", "torch.nn bfloat16"} <= names and not missing & names
    assert inference.refused["ONNX Runtime int8"]
    assert [e.name for e in training.entries if e.kind != "variant"] == ["fastrnn", "torch.nn"]
    assert training.dtype == "bfloat16" and training.entry(formats.FLOAT32)
    assert results.runs[0].command.startswith("python -m benchmarks.formats --quick")

    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| GRU " in text and "| largest error " in text and "| training " in text

    assert command.main(["--saved", str(file.parent)]) == 0
    assert "| GRU " in capsys.readouterr().out


def test_a_wrong_row_is_not_timed_and_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(module: nn.Module) -> nn.Module:
        return Scaled(fastrnn.from_torch(module), 1.2)

    layer = TorchLayer("fastrnn int8", wrong, modes=("inference",), format="int8")
    monkeypatch.setattr(command, "WORKLOADS", TINY[:1])
    monkeypatch.setattr(machine, "measure", here)
    monkeypatch.setattr(formats, "OURS", (layer,))
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("timed"))
    assert command.main(["--quick"]) == 1
    assert "WRONG: formats-3x2x8, gru, inference: output of fastrnn int8" in capsys.readouterr().out


def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, reason in (
        (["--only", "lstm,rnn"], "no rnn; there are: lstm, gru"),
        (["--docs", "page.md"], "--docs needs --save or --saved"),
        (["--saved", str(tmp_path)], "has no formats.json with rows"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert reason in capsys.readouterr().err
