"""The facts about a device, on which plans depend."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import hardware, kernels, plan
from fastrnn.extension import _C
from fastrnn.kernels import device
from fastrnn.kernels.gpu import cuda
from tests.support import stub
from tests.support.problems import LSTM


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


@pytest.mark.parametrize("error", [35, 209])
def test_a_library_that_cannot_run_here_is_passed_over(error: int) -> None:
    """The driver is too old, or there is no code for this GPU."""
    with stub.answering(usable=error):
        found = device.current("cpu")
        assert isinstance(found.cuda, str) and f"(error {error})" in found.cuda
        on_gpu = replace(found, kind="cuda", triton=plan.TritonFacts())
        for offered, kernel in (
            (on_gpu, "triton"),
            (replace(on_gpu, triton="no Triton"), "reference"),
        ):
            chosen = plan.choose(LSTM, offered)
            assert chosen.kernel == kernel
            with pytest.raises(plan.KernelRefused, match=f"error {error}"):
                plan.choose(LSTM, replace(offered, forced="cuda"))
            assert dict(chosen.refused)["cuda"] == found.cuda


def test_the_library_is_asked_on_the_gpu_before_it_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = {"major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32}
    gpu = SimpleNamespace(**properties, shared_memory_per_block_optin=227 << 10)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda.device, "__enter__", lambda self: asked.append(self.idx))
    monkeypatch.setattr(torch.cuda.device, "__exit__", lambda self, *_: False)
    for error in (0, 209):
        with stub.answering(usable=error):
            library = cuda.library()
            assert isinstance(library, cuda.Library)
            library.simulated = False
            facts = device.current("cuda", index=1).cuda
        if error:
            assert isinstance(facts, str) and "no kernel image" in facts
        else:
            assert isinstance(facts, plan.CudaFacts) and facts.capability == 90
    assert asked == [1, 1]


def test_a_device_that_refuses_grids_is_planned_again_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "_refused", set())
    layer = fastrnn.LSTM(8, 1024, dtype=torch.bfloat16)
    x = torch.zeros(8, 64, 8, dtype=torch.bfloat16)

    def residency() -> str:
        asked = replace(LSTM, hidden=1024, batch=64, dtype="bfloat16")
        return plan.choose(asked, replace(device.current("cpu"), forced="cuda")).cuda.residency

    with stub.answering(cooperative=720) as library, kernels.use("cuda"):
        assert residency() == "grid"
        y, _ = layer(x)
        assert library.fastrnn_stub_launches() == 2  # the grid, then the other
        assert residency() != "grid"
        y.sum().backward()
        layer(x)
        assert library.fastrnn_stub_launches() == 4  # the device is remembered
    monkeypatch.setattr(device, "_refused", set())
    with stub.answering(cooperative=720), kernels.use("cuda"):
        y = layer(x)[0]
        monkeypatch.setattr(device, "_refused", set())
        _C.forget_plans()
        y.sum().backward()  # the backward pass is the first to be refused
        assert residency() != "grid"
    monkeypatch.undo()
    _C.forget_plans()
