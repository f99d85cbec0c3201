"""What follows when a quantised module is changed, loaded, frozen, quantised again or restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastrnn
from tests.support.quantised import CHANGED, assert_equal, assert_like, by_hand


def replaced(module: Any) -> None:
    bias = module.bias_hh_l0
    module.bias_hh_l0 = nn.Parameter(bias * 2, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight_ih_l0.add_(1),
        lambda m: m.weight_hh_l0[0].zero_(),
        lambda m: m.bias_hh_l0.mul_(2),
        lambda m: m.bias_hh_l0.numpy().__setitem__(5, 3),
        lambda m: setattr(m, "weight_hh_l0", m.weight_hh_l0 * 1),
        lambda m: nn.init.zeros_(m.weight_ih_l0),
        replaced,
    ],
)
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_a_change_is_found_out(change: Callable[[nn.Module], object], keep_float: bool) -> None:
    module: Any = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=keep_float)
    x = torch.randn(4, 3, 5)
    module(x)
    with torch.no_grad():
        if keep_float and isinstance(module.weight_hh_l0, nn.Parameter):
            module.weight_hh_l0.requires_grad_(False)
        try:
            change(module)
        except TypeError:  # torch refuses a tensor in the place of a Parameter
            return
        with pytest.raises(RuntimeError, match=CHANGED):
            module(x)
        fastrnn.quantize_(module, keep_float=keep_float)
        module(x)


def test_changed_scales_are_found_out() -> None:
    module: Any = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=False)
    module.weight_hh_l0_scale.mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        module(torch.randn(4, 3, 5))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_what_is_loaded_is_rounded(keep_float: bool) -> None:
    module, other = (fastrnn.LSTM(5, 9, num_layers=2) for _ in range(2))
    fastrnn.quantize_(module, keep_float=keep_float)
    module.load_state_dict(other.state_dict())
    x = torch.randn(4, 3, 5)
    assert_like(module(x), by_hand(other)(x))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_what_is_loaded_may_be_nan_and_gives_nan(keep_float: bool) -> None:
    module = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=keep_float)
    state = fastrnn.GRU(5, 9).state_dict()
    for value in (float("nan"), float("inf")):
        state["weight_ih_l0"][20, 2] = value  # of the new gate of unit 2
        module.load_state_dict(state)
        assert module(torch.randn(4, 3, 5))[0].isnan().any(0).any(0).tolist()[2]


def test_no_derivative_is_said_and_not_lost() -> None:
    for keep_float in (True, False):
        module = fastrnn.GRU(5, 9)
        fastrnn.quantize_(module, keep_float=keep_float)
        x = torch.randn(4, 3, 5, requires_grad=True)
        with pytest.raises(RuntimeError, match="no derivative"):
            module(x)
        with pytest.raises(RuntimeError, match="no derivative"), torch.autocast("cpu"):
            module(x)
        with torch.no_grad():
            assert not module(x)[0].requires_grad


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_the_last_of_freeze_and_quantize_counts(keep_float: bool) -> None:
    module: Any = fastrnn.GRU(5, 9)
    original = copy.deepcopy(module).requires_grad_(False)
    rounded, x = by_hand(module), torch.randn(4, 3, 5)
    fastrnn.freeze(module)
    fastrnn.quantize_(module, keep_float=keep_float)
    assert_like(module(x), rounded(x))
    with pytest.raises(ValueError, match="dequantize_"):
        fastrnn.unfreeze(module)
    assert_like(module(x), rounded(x))
    fastrnn.freeze(module)
    assert_equal(module(x), (original if keep_float else rounded)(x))
    assert list(module.state_dict()) == list(original.state_dict())
    fastrnn.dequantize_(module)  # a frozen layer stays frozen
    assert not module.bias_hh_l0.requires_grad
    fastrnn.unfreeze(module)
    assert all(p.requires_grad for p in module.parameters())


def test_quantising_again() -> None:
    module: Any = fastrnn.GRU(5, 9)
    x, original = torch.randn(4, 3, 5), copy.deepcopy(module)
    fastrnn.quantize_(module)
    fastrnn.quantize_(module, "bfloat16")
    assert_like(module(x), by_hand(original, "bfloat16")(x), "bfloat16")
    fastrnn.quantize_(module, keep_float=False)
    state = copy.deepcopy(module.state_dict())
    report = fastrnn.quantize_(module, activations="int16", keep_float=False)
    assert report.quantised[0].format == "int8 x int16"
    assert_equal(list(module.state_dict().values()), list(state.values()))
    assert_like(module(x), by_hand(original)(x), "int16")
    fastrnn.quantize_(module, keep_float=True)
    assert isinstance(module.weight_hh_l0, nn.Parameter)
    assert_like(module(x), by_hand(original)(x), "int8")
    fastrnn.dequantize_(module)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_the_way_back_to_torch(keep_float: bool) -> None:
    model = nn.Sequential(nn.LSTM(5, 9, proj_size=4))
    original = copy.deepcopy(model[0])
    x = torch.randn(4, 3, 5)
    fastrnn.replace_(model)
    fastrnn.quantize_(model, keep_float=keep_float)
    other = fastrnn.to_torch(model[0])
    assert type(other) is nn.LSTM and isinstance(other.weight_hh_l0, nn.Parameter)
    fastrnn.restore_(model)
    assert type(model[0]) is nn.LSTM and "_frozen" not in vars(model[0])
    assert all(p.requires_grad for p in model.parameters())
    expected = original if keep_float else by_hand(original)
    assert list(model[0].state_dict()) == list(original.state_dict())
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(other(x), expected(x))
