"""The fastest configuration is measured once, kept and used again; the tests bring a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrnn.kernels.gpu.triton import launch, tune
from fastrnn.kernels.gpu.triton.tune import Tuner
from fastrnn.plan import Device, Plan, Problem, TritonConfig, TritonFacts, alternatives, choose

pytestmark = pytest.mark.interpreter

FIRST = TritonConfig(precision="tf32", unit_tile=32, depth_tile=64, warps=8, stages=4)
CONFIGS = alternatives(FIRST)


class Clock:
    """Times by the number of warps. A configuration without a time cannot run."""

    def __init__(self, **by_warps: float) -> None:
        self.seconds = {int(name[1:]): value for name, value in by_warps.items()}
        self.asked: list[TritonConfig] = []

    def __call__(self, config: TritonConfig) -> float:
        self.asked.append(config)
        if config.warps not in self.seconds:
            raise RuntimeError("out of resources")
        return self.seconds[config.warps]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[], Path]:
    return lambda: tmp_path


def test_the_fastest_that_runs_is_kept(folder: Callable[[], Path]) -> None:
    clock = Clock(w8=2.0, w4=1.0)  # 16 cannot run
    found = Tuner(folder).best(("lstm",), CONFIGS, clock)
    assert (found.warps, found.precision) == (4, "tf32")
    assert clock.asked == CONFIGS
    later = Clock()
    assert Tuner(folder).best(("lstm",), CONFIGS, later) == found
    assert not later.asked


def test_steps_and_batches_share_what_was_found(folder: Callable[[], Path]) -> None:
    """The fields of a configuration that are not tuned are the caller's."""
    tuner = Tuner(folder)
    tuner.best(("lstm",), CONFIGS, Clock(w8=2.0, w4=1.0))
    other = [replace(config, precision="tf32x3") for config in CONFIGS]
    found = tuner.best(("lstm",), other, None)
    assert (found.warps, found.precision) == (4, "tf32x3")


def test_other_kernels_and_other_choices_are_measured_anew(folder: Callable[[], Path]) -> None:
    tuner = Tuner(folder)
    tuner.best(("lstm",), CONFIGS, Clock(w8=2.0, w4=1.0))
    for key, configs in ((("gru",), CONFIGS), (("lstm",), CONFIGS[:2])):
        clock = Clock(w8=1.0, w4=1.0)
        assert tuner.best(key, configs, clock) == configs[0]
        assert clock.asked


def test_a_little_faster_is_not_enough(folder: Callable[[], Path]) -> None:
    assert Tuner(folder).best((), CONFIGS, Clock(w8=1.0, w4=0.97, w16=0.99)) == FIRST


def test_unmeasured_it_is_the_first_and_nothing_is_kept(folder: Callable[[], Path]) -> None:
    """While a graph is captured, nothing can be timed."""
    tuner = Tuner(folder)
    assert tuner.best((), CONFIGS, None) == FIRST
    assert tuner.best((), CONFIGS, Clock(w8=2.0, w4=1.0)).warps == 4


@pytest.mark.parametrize("text", ["", "[]", '{"warps": 4}', "damaged"])
def test_a_damaged_file_is_replaced(folder: Callable[[], Path], text: str) -> None:
    Tuner(folder).best((), CONFIGS, Clock(w8=2.0, w4=1.0))
    (file,) = folder().iterdir()
    file.write_text(text)
    assert Tuner(folder).best((), CONFIGS, Clock(w8=2.0, w4=1.0)).warps == 4
    assert Tuner(folder).best((), CONFIGS, None).warps == 4


def test_alternatives_need_no_more_memory_and_no_more_registers_than_there_are() -> None:
    for hidden in (16, 64, 128, 512):
        for dtype in ("float32", "bfloat16"):
            for backward in (False, True):
                problem = Problem(
                    "lstm", 9, 64, 8, hidden, 4, 2, dtype=dtype, tape=True, backward=backward
                )
                device = Device(kind="cuda", triton=TritonFacts(shared_bytes=227 << 10))
                first, *others = alternatives(choose(problem, device).triton)
                assert others
                for config in (first, *others):
                    assert config.resident == first.resident
                    assert config.unit_tile == first.unit_tile
                    assert config.depth_tile <= first.depth_tile
                    assert config.stages <= first.stages
                    assert config.warps * 32 * config.registers <= 65536


def test_only_on_a_gpu_and_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRNN_TUNE", raising=False)
    assert not tune.wanted()
    monkeypatch.setenv("FASTRNN_TUNE", "1")
    assert tune.wanted()


def test_what_a_launch_changes_is_as_before_when_all_were_timed(
    folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    carry, sums = torch.ones(3), torch.ones(2)
    ran: list[TritonConfig] = []

    class Event:
        """A time that follows from the number of warps of the last launch."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return float(ran[-1].warps)

    def run(config: TritonConfig) -> None:
        assert torch.equal(carry, torch.ones(3)) and torch.equal(sums, torch.ones(2))
        carry.mul_(2)
        sums.add_(1)
        ran.append(config)

    monkeypatch.setattr(torch.cpu, "Event", Event, raising=False)
    monkeypatch.setattr(torch.cpu, "get_device_name", lambda _: "none", raising=False)
    monkeypatch.setattr(launch, "_tuner", Tuner(folder))
    operands, planned = SimpleNamespace(x=torch.zeros(1)), Plan("triton", FIRST)
    scan = SimpleNamespace(operands=operands, cell="lstm", hidden=5, recurrent=5, plan=planned)
    for _ in range(2):
        assert launch._fastest(False, scan, run, [carry, sums]).warps == 4  # type: ignore[arg-type]
        assert torch.equal(carry, torch.ones(3)) and torch.equal(sums, torch.ones(2))
    assert len(ran) == 5 * len(CONFIGS)  # once
