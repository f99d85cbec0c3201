"""Threads of the CPU kernel: any number, several callers, and forked processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastrnn import GRU, LSTM, cells, hardware, ops
from fastrnn.extension import _C
from fastrnn.tools.tolerance import largest_error
from tests.support import programs
from tests.support.operands import by_reference, operands, run
from tests.support.paths import ROOT


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many threads as torch has, whatever the number of cores."""
    monkeypatch.setattr(hardware, "cores", lambda: 64)
    _C.forget_plans()
    _C.end_contention()
    yield
    _C.forget_plans()
    _C.end_contention()


def test_calls_from_several_threads_at_once() -> None:
    cell = cells.get("gru")
    given = operands(cell, 30, 4, 40, 64, dtype=torch.float32)
    right = run(ops.scan, cell, given)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            for what, value in run(ops.scan, cell, given).items():
                if not torch.equal(value, right[what]):
                    wrong.append(what)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    cell = cells.get("lstm")
    given = operands(cell, 20, 3, 40, 70)
    exact = run(by_reference, cell, given)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = run(ops.scan, cell, given)
    finally:
        torch.set_num_threads(before)
    for what, right in exact.items():
        assert largest_error(ours[what], right) < 1e-12, what


AFTER_FORK = """
import os, sys, torch
sys.path.insert(0, {root!r})
from fastrnn import LSTM
layer, x = LSTM(64, 64), torch.randn(50, 1, 64)
right = layer(x)[0]
child = os.fork()
if child == 0:
    # torch's own pools must not be used here, as its documentation says.
    torch.set_num_threads(1)
    os._exit(0 if (layer(x)[0] - right).abs().max() < 1e-5 else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_fork_after_threads_started() -> None:
    code = AFTER_FORK.format(root=str(ROOT))
    for variant in (code, code.replace("    torch.set_num_threads(1)\n", "")):
        result = subprocess.run([sys.executable, "-c", variant], timeout=600)
        assert result.returncode == 0


@pytest.mark.usefixtures("many_cores")
def test_layers_in_many_threads_give_what_one_gives() -> None:
    """A server: together the layers have more threads than there are cores."""
    layers = [GRU(16, 64), LSTM(24, 48), GRU(8, 96), LSTM(32, 64)]
    inputs = [torch.randn(40, 1, layer.input_size) for layer in layers]

    def results(k: int) -> list[torch.Tensor]:
        layer, x = layers[k], inputs[k].clone().requires_grad_()
        y = layer(x)[0]
        return [y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    right = [results(k) for k in range(len(layers))]
    wrong: list[str] = []

    def work(k: int) -> None:
        torch.set_num_threads(3)
        for _ in range(20):
            for ours, exact in zip(results(k), right[k], strict=True):
                if not torch.equal(ours, exact):
                    wrong.append(f"layer {k}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(layers))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


# Cases of team.cpp: whether it is certain that a member is late, and whether one thread then runs
# the sweep again.
LATE = {
    "nobody": (False, True),
    "start": (True, True),
    "step": (True, True),
    "last": (True, True),
    "unrepeatable": (True, False),
    "sequences": (True, False),
}


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_a_team_with_a_late_member_breaks_up(tmp_path: Path, sanitizer: str | None) -> None:
    source = Path(__file__).with_name("team.cpp")
    program = programs.compiled(source, tmp_path, "cpu/memory.cpp", sanitizer=sanitizer)
    lines = programs.run(*program).splitlines()
    assert [line.split()[0] for line in lines] == list(LATE)
    for line in lines:
        name, late, alone, right = line.split()
        certainly_late, again = LATE[name]
        assert right == "1", line
        assert late == "1" or not certainly_late, line  # on a busy machine others may be late
        assert alone == (late if again else "0"), line
