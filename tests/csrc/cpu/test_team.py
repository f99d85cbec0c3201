"""Threads of the CPU kernel: any number, several callers, and forked processes."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from fastrnn import cells, ops
from fastrnn.tools.tolerance import largest_error
from tests.support.operands import by_reference, operands, run
from tests.support.paths import ROOT


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
        result = subprocess.run([sys.executable, "-c", variant], timeout=60)
        assert result.returncode == 0
