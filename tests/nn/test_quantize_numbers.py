"""Quantised modules give the numbers of their rounded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn.extension import _C
from tests.support.names import CELLS
from tests.support.quantised import (
    CASES,
    FORMATS,
    LIMITS,
    Case,
    assert_equal,
    assert_like,
    by_hand,
    format_of,
    has_kernel,
)
from tests.support.tensors import batches, flatten
from tests.support.weights import as_torch_draws


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_rounded_weights(
    case: Case, how: dict[str, Any], keep_float: bool
) -> None:
    steps, batch = 9, 3
    module = case.layer()
    expected = by_hand(module, how["weights"])
    first, second = (batch, steps) if module.batch_first else (steps, batch)
    x, resets = torch.randn(first, second, 7), torch.rand(first, second) < 0.3
    lengths = torch.tensor([9, 0, 4])
    packed = pack_sequence(batches([3, 9, 5], 7, torch.float32), enforce_sorted=False)
    states = expected(x)[1]
    report = fastrnn.quantize_(module, **how, keep_float=keep_float)
    assert [q.name for q in report.quantised] == [""] and not report.left_alone
    calls: list[Callable[[Any], Any]] = [
        lambda m: m(x),
        lambda m: m(x, states),
        lambda m: m(x, lengths=lengths, resets=resets),
        lambda m: m(packed),
        lambda m: m(x[0]),
    ]
    for call in calls:
        assert_like(call(module), call(expected), format_of(how))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_cells(kind: str, bias: bool, how: dict[str, Any], keep_float: bool) -> None:
    cell = getattr(fastrnn, kind)(5, 33, bias=bias)
    expected = by_hand(cell, how["weights"])
    x = torch.randn(3, 5)
    hx = expected(x)
    fastrnn.quantize_(cell, **how, keep_float=keep_float)
    for given in ((x,), (x[0],), (x, hx)):
        assert_like(cell(*given), expected(*given), format_of(how))
    with pytest.raises(RuntimeError, match="Convert input"):
        cell(x.double())
    with pytest.raises(RuntimeError, match="no derivative"):
        cell(x.requires_grad_())


# Errors of a norm of the recurrent product alone grow from step to step with the initial gains,
# those of float32 by the same factor: a step divides by the deviation of that product.
PUBLISHED = [
    ("gru_reset_before", 1.0, True),
    ("mgu2", 1.0, True),
    ("slstm", 1.0, True),
    ("rms_norm_lstm", 1.0, True),
    ("dreamer_gru", 1.0, True),
    ("layer_norm_lstm", 0.1, True),
    ("layer_norm_lstm", 1.0, False),
    ("layer_norm_gru", 0.1, True),
    ("layer_norm_gru", 1.0, False),
]


@pytest.mark.compiles
@pytest.mark.takes(10)
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize(("name", "gain", "whole"), PUBLISHED)
def test_errors_of_published_cells(
    name: str, gain: float, whole: bool, how: dict[str, Any]
) -> None:
    """Against float64 with the weights before they were rounded: of a sequence, or of one step from
    exact states, which may have twice the error."""
    layer: Any = fastrnn.Recurrent(fastrnn.cells.get(name), 64, 128).requires_grad_(False)
    # The limits are for these values: with some published ones, errors grow from step to step, and
    # others are zeros, which no format rounds.
    as_torch_draws(layer)
    for parameter, value in layer.named_parameters():
        if "gain" in parameter:
            value.mul_(gain)
    exact, x = copy.deepcopy(layer).double(), torch.randn(60, 2, 64)
    y, last = exact(x.double())
    fastrnn.quantize_(layer, **how)
    if whole:
        error, limit = (layer(x)[0] - y).abs().max(), LIMITS[format_of(how)]
    else:
        states = tuple(state.float() for state in flatten(last))
        x, right = x[:1], exact(x[:1].double(), last)[0]
        error = (layer(x, states if len(states) > 1 else states[0])[0] - right).abs().max()
        limit = 2 * LIMITS[format_of(how)]
    assert 0 < error < limit


@pytest.mark.parametrize("how", FORMATS, ids=format_of)
def test_a_sequence_has_the_same_numbers_alone_and_in_any_batch(how: dict[str, Any]) -> None:
    module = fastrnn.GRU(7, 33)
    fastrnn.quantize_(module, **how)
    x = torch.randn(11, 5, 7)
    whole = module(x)[0]
    assert_equal(module(x[:, 2:3])[0], whole[:, 2:3])
    first, state = module(x[:4])
    assert_equal(torch.cat([first, module(x[4:], state)[0]]), whole)
    assert_equal(module(torch.cat([x * 50, x], 1))[0][:, 5:], whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_layers_of_half_precision(dtype: torch.dtype, keep_float: bool) -> None:
    module = fastrnn.LSTM(7, 33, dtype=dtype)
    expected = by_hand(module)
    report = fastrnn.quantize_(module, keep_float=keep_float)
    restored = f", {str(dtype).removeprefix('torch.')} weights restored"
    assert report.quantised[0].kernel == _C.isa() + restored * (not has_kernel("int8"))
    x = torch.randn(5, 3, 7, dtype=dtype)
    assert_like(module(x), expected(x))
    with pytest.raises(ValueError, match="Convert input"):
        module(x.float())


def test_rows_of_zeros_and_the_largest_number() -> None:
    module: Any = fastrnn.GRU(4, 3, bias=False)
    with torch.no_grad():
        module.weight_ih_l0[1] = 0
        module.weight_ih_l0[2] = torch.tensor([-6.35, 0.024, 3.2, 0.0])
        module.weight_hh_l0[0] = 1e-45
    fastrnn.quantize_(module, keep_float=False)
    state = module.state_dict()
    assert not state["weight_ih_l0"][1].any() and state["weight_ih_l0_scale"][1] == 1
    assert state["weight_ih_l0"][2].tolist() == [-127, 0, 64, 0]
    torch.testing.assert_close(state["weight_ih_l0_scale"][2], torch.tensor(0.05))
    assert state["weight_hh_l0"].abs().amax() == 127
    assert module(torch.randn(5, 2, 4))[0].isfinite().all()


def test_the_widest_sums_do_not_overflow() -> None:
    """All products of the widest layer are as large as they can be, and of one sign."""
    layer: Any = fastrnn.RNN(65_536, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.25)
    for activations in ("int8", "int16"):
        fastrnn.quantize_(layer, activations=activations)
        for sign in (1, -1):
            y = layer(torch.full((1, 1, 65_536), 2.0 * sign))[0]
            torch.testing.assert_close(y.item(), max(0.0, 32768.0 * sign))
