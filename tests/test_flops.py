"""FlopCounterMode counts the same for our layers as for torch.nn's."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from tests.support.modules import twins
from tests.support.names import CELLS, LAYERS
from tests.support.paths import ROOT
from tests.support.tensors import flatten

F64 = torch.float64
T, B, I, H = 7, 3, 4, 5  # noqa: E741


def count(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Forward and backward."""
    with FlopCounterMode(display=False) as counter:
        results = [y for y in flatten(module(*args, **kwargs)) if y.requires_grad]
        forward = counter.get_total_flops()
        if results:
            torch.stack([y.sum() for y in results]).sum().backward()
    return forward, counter.get_total_flops() - forward


def states(name: str, *shape: int, **options: Any) -> Any:
    # Two tensors: torch would add up the gradients of one tensor before their product.
    each = [torch.randn(shape, dtype=F64, **options) for _ in range(2)]
    return tuple(each) if "LSTM" in name else each[0]


# In float64, because torch counts nothing for a float32 LSTM, which is one call of oneDNN.


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("needs_states", [None, False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"bidirectional": True, "bias": False, "num_layers": 2}]
)
def test_layers_count_as_torchs(
    name: str, needs_x: bool, needs_states: bool | None, options: dict[str, Any]
) -> None:
    ours, theirs, _ = twins(name, I, H, **options)
    x = torch.randn(T, B, I, dtype=F64, requires_grad=needs_x)
    layers = len(getattr(theirs, "all_weights"))  # noqa: B009
    given = (
        () if needs_states is None else (states(name, layers, B, H, requires_grad=needs_states),)
    )
    assert count(ours, x, *given) == count(theirs, x, *given)


def test_the_formula_by_hand() -> None:
    ours, _, _ = twins("GRU", I, H)
    inputs, recurrent = 2 * T * B * 3 * H * I, 2 * T * B * 3 * H * H
    to_first_states = recurrent // T
    wanted = inputs + recurrent, inputs + recurrent + recurrent - to_first_states
    assert count(ours, torch.randn(T, B, I, dtype=F64)) == wanted


@pytest.mark.parametrize("needs_x", [False, True])
def test_projections(needs_x: bool) -> None:
    ours, theirs, _ = twins("LSTM", I, H, proj_size=2, num_layers=2)
    x = torch.randn(T, B, I, dtype=F64, requires_grad=needs_x)
    assert count(ours, x) == count(theirs, x)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_and_inference(name: str) -> None:
    ours, theirs, _ = twins(name, I, H)
    x = torch.randn(T, B, I, dtype=F64)
    packed = pack_padded_sequence(x, [7, 4, 2])
    assert count(ours, packed) == count(theirs, packed)
    with torch.no_grad():
        assert count(ours, x) == count(theirs, x)
        assert count(ours, x[0]) == count(theirs, x[0])
    frozen = fastrnn.freeze(ours.eval())
    with torch.no_grad():
        assert count(frozen, x) == count(theirs, x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_parameter_costs_nothing(name: str) -> None:
    ours, theirs, _ = twins(name, I, H)
    for weight in ("weight_ih_l0", "weight_hh_l0"):
        for module in (ours, theirs):
            getattr(module, weight).requires_grad_(False)
        x = torch.randn(T, B, I, dtype=F64)
        assert count(ours, x) == count(theirs, x)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("needs", [False, True])
def test_cells_count_as_torchs(name: str, needs: bool) -> None:
    ours, theirs, _ = twins(name, I, H)
    x = torch.randn(B, I, dtype=F64, requires_grad=needs)
    hx = states(name, B, H, requires_grad=needs)
    for given in ((x,), (x, hx)):
        assert count(ours, *given) == count(theirs, *given)


def test_custom_cells_and_heads() -> None:
    @fastrnn.cell(gates="abc", states="h", name="counted")
    def counted(u: Any, v: Any, h: Tensor) -> Tensor:
        return torch.tanh(u.a + v.a) * h + (u.b + v.b) * (u.c + v.c)

    x = torch.randn(T, B, I, dtype=F64)
    gru = count(nn.GRU(I, H, dtype=F64), x)
    assert count(fastrnn.Recurrent(counted, I, H, dtype=F64), x) == gru
    heads = fastrnn.GRU(I, 2 * H, heads=2, dtype=F64)
    assert count(heads, x) == tuple(2 * n for n in gru)
    # Values that are not saved are recomputed.
    forward, backward = count(fastrnn.GRU(I, H, dtype=F64, recompute=True), x)
    assert (forward, backward) == (gru[0], gru[1] + gru[0])


def test_counts_by_module() -> None:
    model = nn.Sequential(nn.Linear(I, I), fastrnn.GRU(I, H))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(T, B, I))
    counts = counter.get_flop_counts()
    assert counts["Sequential.1"] == {torch.ops.fastrnn.scan: 2 * T * B * 3 * H * (I + H)}


@pytest.mark.parametrize("first", ["fastrnn", "torch.utils.flop_counter"])
def test_registered_whichever_comes_first(first: str) -> None:
    """`import fastrnn` does not import the counter, which would import Triton."""
    code = f"""
import sys, torch
import {first}
if {first!r} == "fastrnn":
    assert "torch.utils.flop_counter" not in sys.modules
import fastrnn, torch.utils.flop_counter
assert not any(type(f).__module__ == "fastrnn.flops" for f in sys.meta_path)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    fastrnn.GRU(4, 5)(torch.randn(7, 3, 4))
print(counter.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * T * B * 3 * H * (I + H)
