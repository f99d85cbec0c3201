"""Implementations: cases, supported workloads, and the results of the compiled loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastrnn.tools.bench.implementation import Case, CompiledLoop, TorchLayer
from fastrnn.tools.bench.jax_baseline import Jax
from fastrnn.tools.bench.onnx_baselines import OnnxRuntime, OpenVino
from fastrnn.tools.bench.workload import CELLS
from tests.support.bench import SHAPES, SMALL, agrees


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("shape", ["one layer", "stack"])
def test_the_loop_agrees_compiled_or_not(
    monkeypatch: pytest.MonkeyPatch, shape: str, mode: str, cell: str
) -> None:
    # torch's compiler takes long and is not ours to test.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    agrees(CompiledLoop(), replace(SHAPES[shape], compiled_loop=True), cell, mode)


def test_baselines_say_what_they_cannot_do() -> None:
    training = Case.build(SHAPES["one layer"], "gru", "training", 1)
    half = Case.build(replace(SMALL, dtype="bfloat16"), "gru", "inference", 1)
    for baseline in (OnnxRuntime(), OpenVino()):
        assert baseline.supports(training) == "inference only"
        assert "bfloat16" in str(baseline.supports(half))
    assert "dense float32" in str(Jax().supports(half))
    assert "compiler" in str(CompiledLoop().supports(training))


def test_cases_are_the_same_every_time_and_leave_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, second = (Case.build(SMALL, "lstm", "training", 1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(first.x, Tensor) and isinstance(second.x, Tensor)
    assert torch.equal(first.x, second.x) and torch.equal(first.gradient, second.gradient)
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_switches_of_a_gpu_leave_cudnn_on() -> None:
    case = replace(Case.build(SMALL, "lstm", "inference", 1), device="cuda")
    for tf32 in (False, True):
        with TorchLayer("torch.nn", tf32=tf32).prepare(case).around():
            assert torch.backends.cudnn.enabled
            assert torch.backends.cudnn.allow_tf32 == tf32


def test_the_context_of_inference_can_be_chosen() -> None:
    case = Case.build(SMALL, "lstm", "inference", 1)
    for context, inference in ((torch.inference_mode, True), (torch.no_grad, False)):
        with TorchLayer("torch.nn", inference=context).prepare(case).around():
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled() == inference
