"""The command line: its commands, and their exit codes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import fastrnn
from fastrnn import __main__, cells
from fastrnn._version import __version__
from fastrnn.tools import demo
from tests.support.command import run


def test_is_a_module_to_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastrnn", "--version"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    assert fastrnn.__version__ == __version__


@pytest.mark.parametrize("name", [*cells.names()[:4], "janet"])
def test_cell_prints_what_is_derived(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, "cell", name)
    assert code == 0
    assert out.startswith(f"cell {name}\n")
    forward, backward = out.split("\nbackward")
    for state in cells.get(name).states:
        assert re.search(rf"^ *{state}' += ", forward, re.M)
        assert re.search(rf"^ *d{state} += ", backward, re.M)


def test_unknown_cell_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["cell", "lstn"], ["plan", "--shape", "1,1,1,1", "--cell", "lstn"]):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "")
        assert "'lstn'" in err and "rnn_tanh, rnn_relu, lstm, gru" in err


def test_demo_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 3

    monkeypatch.setattr(demo, "main", main)
    assert __main__.main(["demo", "--seconds", "5", "--help"]) == 3
    assert seen == [["--seconds", "5", "--help"]]


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["info", "--jsno"])
    assert "--jsno" in capsys.readouterr().err
