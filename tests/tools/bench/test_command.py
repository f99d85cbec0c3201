"""`python -m fastrnn bench`."""

from __future__ import annotations

import json
import re

import pytest

import fastrnn
from fastrnn import __main__
from fastrnn.tools.bench import comparison
from fastrnn.tools.bench.implementation import TorchLayer
from tests.support.bench import Scaled, here


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrnn.tools.bench.machine.measure", lambda device: here())


def test_a_shape_of_your_own(quick_machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "5,2,3,8", "--seconds", "0.001", "--baselines", "torch.nn"]
    arguments += ["--latency-calls", "100"]
    assert __main__.main(["bench", *arguments, "--layer", "gru", "--training"]) == 0
    out = capsys.readouterr().out
    assert "GRU, training, T=5 B=2 I=3 H=8, float32" in out
    assert re.search(r"^fastrnn +\d", out, re.MULTILINE)
    assert re.search(r"^torch.nn +\d.* x$", out, re.MULTILINE)
    assert "not ONNX Runtime: " in out
    assert __main__.main(["bench", *arguments, "--stream", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["mode"], values["steps"], values["batch"]) == ("step", 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "5,2,3"], "four whole numbers"),
        (["--shape", "5,2,-3,8"], "four whole numbers"),
        (["--shape", "5,2,3,8", "--baselines", "haste"], "no baseline haste; there are: torch.nn"),
        (["--shape", "5,2,3,8", "--layers", "0"], "at least 1"),
        (["--shape", "5,2,3,8", "--training", "--stream"], "not allowed with"),
    ],
)
def test_impossible_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["bench", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_results_are_reported(
    quick_machine: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = TorchLayer("fastrnn", lambda layer: Scaled(fastrnn.from_torch(layer), 1.01))
    monkeypatch.setattr(comparison, "OURS", (wrong,))
    assert __main__.main(["bench", "--shape", "5,2,3,8", "--baselines", "torch.nn"]) == 1
    assert "nothing was timed: your shape, lstm, inference: output" in capsys.readouterr().err
