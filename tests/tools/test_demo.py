"""The demo: both models learn the same, and a wrong replacement is noticed."""

from __future__ import annotations

import copy
import itertools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrnn
from fastrnn.tools import demo
from fastrnn.tools.corpus import Corpus
from fastrnn.tools.curves import COMPILED, FASTRNN, LOOP, TORCH
from fastrnn.tools.demo import NextCharacter, Options
from fastrnn.tools.loop import Loop
from tests.support.imports import without

TINY = ["--hidden", "8", "--window", "5", "--batch", "4", "--text", __file__, "--sample", "30"]


def test_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "comparison.png"
    steps = ["--steps", "12", "--cell", "lstm", "gru", "rnn"]
    assert demo.main([*TINY, *steps, "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    for cell in ("LSTM", "GRU", "RNN"):
        assert f"{cell}: replaced  rnn  torch.nn.{cell} -> fastrnn.{cell}" in text
    rows = re.findall(r"^ +(\d+) +(\d\.\d{4}) +(\d\.\d{4}) +\S+$", text, re.MULTILINE)
    assert [int(step) for step, _, _ in rows] == 3 * [1, 2, 3, 4, 6, 7, 8, 9, 10, 12]
    assert all(abs(float(a) - float(b)) < 2e-4 for _, a, b in rows)
    differences = re.findall(r"losses: (\S+) in the first 10 steps, (\S+) between the curves", text)
    assert len(differences) == 3
    assert all(float(early) < 1e-5 and float(curve) < 1e-4 for early, curve in differences)
    assert text.count("times as fast (medians of 12 interleaved steps)") == 3
    distances = re.findall(r"logits and gradients differ by (\S+) at most", text)
    assert len(distances) == 3
    assert all(0 <= float(d) < 1e-5 for d in distances)
    assert text.count("written by the trained model:\ndef ") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)


def test_a_cell_that_torch_lacks_trains_beside_loops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], uncompiled: None
) -> None:
    picture = tmp_path / "comparison.png"
    steps = ["--steps", "12", "--cell", "layer_norm_lstm"]
    assert demo.main([*TINY, *steps, "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "LAYER_NORM_LSTM: fastrnn.Recurrent beside a loop of torch operations" in text
    row = r"^ +(\d+) +(\d\.\d{4}) +(\d\.\d{4}) +(\d\.\d{4}) +\S+$"
    rows = re.findall(row, text, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 12]
    for _, *losses in rows:
        assert max(map(float, losses)) - min(map(float, losses)) < 2e-4
    assert "times as fast as the loop, and " in text and " times as the compiled loop (" in text
    assert "written by the trained model:\ndef " in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_loop_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Loop):
        def forward(self, x: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
            y, state = super().forward(x, state)
            return 1.01 * y, state

    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    monkeypatch.setattr(demo, "Loop", Wrong)
    run = [*TINY, "--steps", "3", "--cell", "layer_norm_lstm", "--out", str(tmp_path / "a.png")]
    assert demo.main(run) == 1
    assert "do NOT agree" in capsys.readouterr().err


def test_why_the_loop_is_not_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*inputs: Any) -> Any:
        raise RuntimeError("\nno C++ compiler\nlong advice")

    monkeypatch.setattr(torch, "compile", lambda step, **options: refused)
    options = Options(steps=2, hidden=8, window=5, batch=4)
    comparison, _, report = demo.run(
        "layer_norm_lstm", Corpus.of("some text " * 9), options, lambda *_: None
    )
    assert comparison.names == (LOOP, FASTRNN) and comparison.steps == 2
    assert report.endswith("torch.compile does not work here: no C++ compiler")


@pytest.mark.compiles
@pytest.mark.takes(60)
def test_the_compiled_loop_trains_alike() -> None:
    options = Options(steps=3, hidden=8, window=4, batch=4)
    comparison, _, _ = demo.run(
        "layer_norm_lstm", Corpus.of("some text " * 9), options, lambda *_: None
    )
    assert comparison.names == (LOOP, COMPILED, FASTRNN)
    assert comparison.early_difference() < 1e-5


def test_both_learn_the_same() -> None:
    corpus = Corpus.of("for x in range(10):\n    print(x)\n" * 40)
    options = Options(steps=150, hidden=24, window=8, batch=24, learning_rate=3e-2)
    comparison, fast, _ = demo.run("gru", corpus, options, lambda *_: None)
    assert comparison.steps == len(comparison.times[FASTRNN]) == 150
    curve = [loss for _, loss in comparison.curve(FASTRNN)]
    assert curve[-1] < 0.2 < 1.5 < curve[0]
    assert comparison.curve_difference() < 1e-3
    assert comparison.losses[TORCH][:3] == pytest.approx(comparison.losses[FASTRNN][:3], abs=1e-5)
    assert "range(10):\n    print(x)" in demo.generate(fast, corpus, "for x in ", 60)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_trained_model_loses_little_when_it_is_quantised(cell: str) -> None:
    corpus, options = Corpus.standard_library(), Options(hidden=64, window=8, batch=48)
    batches = demo._batches(corpus, options)
    trained = NextCharacter(cell, len(corpus.symbols), options.hidden)
    fastrnn.replace_(trained)
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    for _ in range(150):
        demo._train_step(trained, optimizer, next(batches))
    windows = torch.cat([next(batches) for _ in range(50)])

    def loss(model: NextCharacter) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(windows[:, :-1])[0], windows[:, -1]).item()

    right = loss(trained)
    assert right < 3.1  # 4.6 before training
    for how in ({"activations": "int8"}, {"activations": "int16"}, {"weights": "bfloat16"}):
        model = copy.deepcopy(trained)
        fastrnn.quantize_(model, **how)  # type: ignore[arg-type]
        assert abs(loss(model) - right) < 0.01 * right


def test_a_wrong_replacement_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any) -> Any:
        report = replace(model)
        forward = model.rnn.forward
        model.rnn.forward = lambda *a: tuple(
            1.01 * y if torch.is_tensor(y) else y for y in forward(*a)
        )
        return report

    replace: Callable[[nn.Module], Any] = fastrnn.replace_
    monkeypatch.setattr(demo, "replace_", wrong)
    monkeypatch.setattr(demo, "restore_", lambda model: delattr(model.rnn, "forward"))
    run = [*TINY, "--steps", "3", "--cell", "gru", "--out", str(tmp_path / "comparison.png")]
    assert demo.main(run) == 1
    assert "do NOT agree" in capsys.readouterr().err


def test_time_budget_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # it is read five times in each step
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 100))
    corpus = Corpus.of(Path(__file__).read_text())
    options = Options(seconds=0.5, hidden=4, window=3, batch=2)
    seen: list[float] = []
    comparison, _, _ = demo.run("rnn", corpus, options, lambda done, _: seen.append(done))
    own = sum(comparison.times[TORCH]) + sum(comparison.times[FASTRNN])
    assert comparison.steps == 10 and own == pytest.approx(2 * 10 / 100)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_generation_carries_the_state() -> None:
    torch.manual_seed(0)
    corpus = Corpus.of("abcdefgh")
    model = NextCharacter("lstm", 8, 16)
    text = demo.generate(model, corpus, "abc", 20, temperature=1e-6)
    for length in range(3, 22):
        logits, _ = model(corpus.encode(text[:length]))
        assert corpus.symbols[int(logits.argmax())] == text[length]


def test_without_matplotlib_the_way_out_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("matplotlib", monkeypatch)
    picture = tmp_path / "comparison.png"
    assert demo.main([*TINY, "--steps", "2", "--cell", "gru", "--out", str(picture)]) == 0
    assert "pip install 'fastrnn[demo]'" in capsys.readouterr().out
    assert not picture.exists()


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--seconds", "-1"], ["--cell", "lstn"]])
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(wrong)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_short_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def f(): pass")
    assert demo.main(["--text", str(text), "--steps", "1"]) == 2
    assert "13 characters, a window takes 17" in capsys.readouterr().err


def test_batches_depend_on_the_seed_only() -> None:
    corpus = Corpus.of(Path(__file__).read_text())
    options = Options(window=6, batch=3)
    a, b = demo._batches(corpus, options), demo._batches(corpus, options)
    for _ in range(3):
        first = next(a)
        assert torch.equal(first, next(b))
        assert first.shape == (3, 7)
    other = next(demo._batches(corpus, Options(window=6, batch=3, seed=1)))
    assert not torch.equal(other, next(b))
    assert statistics.fmean(first.flatten().tolist()) < len(corpus.symbols)
