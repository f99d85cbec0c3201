"""Baselines that run ONNX models give the results of torch.nn."""

from __future__ import annotations

import pytest

from fastrnn.tools.bench.implementation import Implementation
from fastrnn.tools.bench.onnx_baselines import OnnxRuntime, OpenVino
from fastrnn.tools.bench.workload import CELLS
from tests.support.bench import SHAPES, STREAMED, agrees


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("baseline", [OnnxRuntime(), OpenVino()], ids=lambda r: r.name)
def test_onnx_baselines_agree(baseline: Implementation, shape: str, cell: str) -> None:
    if reason := baseline.available():
        pytest.skip(reason)
    agrees(baseline, SHAPES[shape], cell, "inference")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("baseline", [OnnxRuntime(), OpenVino()], ids=lambda r: r.name)
def test_streaming_baselines_carry_the_state(baseline: Implementation, cell: str) -> None:
    if reason := baseline.available():
        pytest.skip(reason)
    agrees(baseline, STREAMED, cell, "step")
