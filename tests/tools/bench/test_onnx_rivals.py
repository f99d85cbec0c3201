"""Rivals that run ONNX models compute the same as torch.nn."""

from __future__ import annotations

import pytest

from fastrnn.tools.bench.contender import Contender
from fastrnn.tools.bench.onnx_rivals import OnnxRuntime, OpenVino
from fastrnn.tools.bench.workload import CELLS
from tests.support.bench import SHAPES, STREAMED, agrees


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rival", [OnnxRuntime(), OpenVino()], ids=lambda r: r.name)
def test_onnx_rivals_agree(rival: Contender, shape: str, cell: str) -> None:
    if reason := rival.available():
        pytest.skip(reason)
    agrees(rival, SHAPES[shape], cell, "inference")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rival", [OnnxRuntime(), OpenVino()], ids=lambda r: r.name)
def test_streaming_rivals_carry_the_state(rival: Contender, cell: str) -> None:
    if reason := rival.available():
        pytest.skip(reason)
    agrees(rival, STREAMED, cell, "step")
