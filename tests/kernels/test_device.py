"""The facts about a device, on which plans depend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import hardware
from fastrnn.extension import _C
from fastrnn.kernels import device


def test_tf32_where_torch_lets_its_rnn_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn: Any = torch.backends.cudnn.rnn
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(rnn, "fp32_precision", precision)
        assert device.current().tf32 is (precision == "tf32")
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert device.current().tf32 is allowed


def test_a_call_has_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 3)
    assert [device.current("cpu", n).cpu.threads for n in (1, 3, 32)] == [1, 3, 3]
    assert not device.current().cpu.contended
    assert device.current("cpu", 2, contended=True).cpu.contended


def test_a_late_thread_counts_for_new_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    monkeypatch.setenv("FASTRNN_LOG", "plan")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _C.forget_plans()
    layer, x = fastrnn.GRU(40, 83), torch.randn(10, 1, 40)
    try:
        _C.end_contention()
        assert not _C.contended()
        layer(x)
        assert "contended" not in capsys.readouterr().err
        _C.late_peer()
        assert _C.contended()
        layer(x)
        logged = capsys.readouterr().err
        assert "contended=True" in logged and "split_units=1" in logged
    finally:
        torch.set_num_threads(before)
        _C.end_contention()
        _C.forget_plans()
