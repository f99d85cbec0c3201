"""Layers and baselines in int8 and bfloat16: their numbers are those of their formats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastrnn.extension import _C
from fastrnn.tools import tolerance
from fastrnn.tools.bench import comparison, formats
from fastrnn.tools.bench.implementation import Case, Implementation
from fastrnn.tools.bench.workload import Workload
from tests.support.bench import SMALL

SHAPES = {"inference": Workload("w", 20, 2, 32, 64), "step": Workload("w", 1, 2, 32, 64)}
EVERY = (*formats.OURS, *formats.BASELINES)


CASES = [
    pytest.param(each, case, id=f"{each.name}, {case.cell}, {case.mode}")
    for mode, work in SHAPES.items()
    for case in (Case.build(work, cell, mode, 2) for cell in ("lstm", "gru"))
    for each in EVERY
    if each.supports(case) is None
]


@pytest.mark.parametrize(("implementation", "case"), CASES)
def test_the_error_is_that_of_the_format(implementation: Implementation, case: Case) -> None:
    if reason := implementation.available():
        pytest.skip(reason)
    case = replace(case, threads=torch.get_num_threads())
    prepared = implementation.prepare(case)
    ours = implementation in formats.OURS
    error, _ = comparison.Gate(case).check(implementation.name, prepared, ours=ours)
    assert (prepared.format is None) == (implementation.name.split()[-1] not in formats.FORMATS)
    if prepared.format is None:
        assert error < 1e-5
    else:
        # If it computed in float32, the error would be below 1e-6.
        assert 2e-4 < error < tolerance.FORMATS[prepared.format] * (1 if ours else 5)
        assert error > 1e-3 or prepared.format != "int8"
    with prepared.around():
        results = prepared.read(prepared.call())
    states = {"h_n", "c_n"} if case.cell == "lstm" else {"h_n"}
    assert set(results) == {"output"} | (states if case.mode == "inference" else set())


def test_each_says_what_it_cannot_do() -> None:
    training = Case.build(SMALL, "lstm", "training", 1)
    gru = Case.build(SMALL, "gru", "inference", 1)
    assert all(each.supports(training) for each in EVERY)
    refused = {each.name: each.supports(gru) for each in formats.BASELINES if each.supports(gru)}
    assert refused == {"ONNX Runtime int8": "LSTM is its only recurrent operator in int8"}


def test_a_format_without_instructions_or_an_engine_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_C, "formats", lambda: ["float32"])
    for each in formats._layer_and_stepper("fastrnn int8", lambda layer: layer, "int8"):
        assert "no instructions for int8" in str(each.available())
    monkeypatch.setattr(formats, "_ENGINES", ())
    assert "no engine" in str(formats.TorchAo().available())


def test_the_engine_of_the_caller_and_the_weights_stay() -> None:
    case = Case.build(SMALL, "lstm", "inference", 1)
    before = torch.backends.quantized.engine
    weights = [p.clone() for p in case.module.parameters()]
    for each in EVERY:
        if not (each.available() or each.supports(case)):
            each.prepare(case)
    assert torch.backends.quantized.engine == before
    for parameter, weight in zip(case.module.parameters(), weights, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, weight)


def test_a_case_of_another_dtype() -> None:
    case = Case.build(replace(SMALL, lengths=(5, 2)), "gru", "training", 1)
    other = case.to(torch.bfloat16)
    tensors = (other.x.data, other.gradient, *other.module.parameters())
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert {p.dtype for p in case.module.parameters()} == {torch.float32}
