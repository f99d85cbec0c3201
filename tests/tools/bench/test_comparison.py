"""A comparison: wrong results, verdicts, and baselines that cannot be timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from torch import nn

import fastrnn
from fastrnn.tools.bench import comparison, measure
from fastrnn.tools.bench.comparison import Verdict
from fastrnn.tools.bench.implementation import Case, Implementation, Prepared, TorchLayer
from fastrnn.tools.bench.workload import BEST_BASELINE, MICROSECONDS, PEAK, Target
from tests.support.bench import ROW, SMALL, Scaled, entry, row, run


@pytest.mark.parametrize(
    ("against", "bound", "value", "status"),
    [
        (BEST_BASELINE, 2, 2, "reached"),
        (BEST_BASELINE, 2.04, 2, "within noise"),
        (BEST_BASELINE, 2.1, 2, "missed"),
        ("torch.nn", 3, 3, "reached"),
        ("fastrnn, 1 thread", 1.7, 0.6, "missed"),
        ("ONNX Runtime", 2, None, "not measured"),
        (PEAK, 0.1, 0.1, "reached"),
        (PEAK, 0.2, 0.1, "missed"),
        (MICROSECONDS, 100, 100, "reached"),
        (MICROSECONDS, 98, 100, "within noise"),
        (MICROSECONDS, 90, 100, "missed"),
    ],
)
def test_verdicts(against: str, bound: float, value: float | None, status: str) -> None:
    (verdict,) = comparison.judge(ROW, Target.all("inference", against, bound), peak=100)
    assert verdict == Verdict(
        against, bound, cast(Any, pytest.approx(value)) if value else None, status
    )


def test_no_bound_no_verdict() -> None:
    assert comparison.judge(ROW, Target("inference", BEST_BASELINE, None, 1, 1), peak=100) == []


def test_a_target_may_be_of_another_implementation() -> None:
    one = "fastrnn, 1 thread"
    target = Target.all("inference", "torch.nn", 4, of=one)
    (verdict,) = comparison.judge(ROW, target, peak=100)
    assert verdict == Verdict("torch.nn", 4, 5, "reached", one)
    (missing,) = comparison.judge(ROW, replace(target, of="fastrnn int8"), peak=100)
    assert missing == Verdict("torch.nn", 4, None, "not measured", "fastrnn int8")


@pytest.mark.parametrize(("factor", "kept"), [(1.01, True), (1.2, False)])
def test_baselines_in_few_digits_have_a_tolerance_of_their_format(
    factor: float, kept: bool
) -> None:
    def scaled(module: nn.Module) -> nn.Module:
        return Scaled(module, factor)

    found = run(SMALL, "inference", (TorchLayer("torch.nn", scaled, format="bfloat16"),))
    assert (found.entry("torch.nn") is not None) == kept


def test_variants_are_no_baselines() -> None:
    assert [e.name for e in ROW.baselines] == ["JAX", "torch.nn"]
    assert ROW.speedup() == 2
    assert ROW.speedup("torch.nn") == 3
    assert row(entry("fastrnn", "ours", 1.0)).speedup() is None


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize("mode", ["inference", "step"])
def test_wrong_results_of_ours_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, factor: float, mode: str
) -> None:
    wrong = TorchLayer("fastrnn", lambda layer: Scaled(fastrnn.from_torch(layer), factor))
    monkeypatch.setattr(comparison, "OURS", (wrong,))
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("timed"))
    work = replace(SMALL, steps=1, modes=("step",)) if mode == "step" else SMALL
    with pytest.raises(comparison.GateFailed, match="output of fastrnn is off from float64"):
        run(work, mode, ())


def test_wrong_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_of_the_gradient(layer: nn.Module) -> nn.Module:
        ours = fastrnn.from_torch(layer)
        ours.register_forward_hook(
            lambda *call: ((call[2][0] + call[2][0].detach()) / 2, call[2][1])
        )
        return ours

    monkeypatch.setattr(comparison, "OURS", (TorchLayer("fastrnn", half_of_the_gradient),))
    with pytest.raises(comparison.GateFailed, match="gradient of x"):
        run(SMALL, "training", ())


class Crashing:
    name = "torch.nn"

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case) -> Prepared:
        raise RuntimeError("out of luck\nat length")


class Absent(Crashing):
    def available(self) -> str | None:
        return "not installed: pip install it"


@pytest.mark.parametrize(
    ("baseline", "reason"),
    [
        (TorchLayer("torch.nn", lambda m: Scaled(m, 1.5)), "results are off: small"),
        (Crashing(), "failed: RuntimeError: out of luck"),
        (Absent(), "not installed: pip install it"),
    ],
)
def test_baselines_that_cannot_be_timed_are_named_with_the_reason(
    baseline: Implementation, reason: str
) -> None:
    found = run(SMALL, "inference", (baseline,))
    assert reason in found.refused["torch.nn"]
    assert "length" not in found.refused["torch.nn"]
    assert found.entry("torch.nn") is None and found.ours.name == "fastrnn"
