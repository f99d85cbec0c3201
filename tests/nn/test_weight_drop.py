"""Dropout of weights as a parametrization of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastrnn


def dropped(layer: Any, name: str = "weight_hh_l0", p: float = 0.5) -> Any:
    parametrize.register_parametrization(layer, name, fastrnn.WeightDrop(p))
    return layer


LAYERS = {
    "lstm": lambda: fastrnn.LSTM(3, 5, 2),
    "gru": lambda: fastrnn.GRU(3, 5, bidirectional=True),
    "custom": lambda: fastrnn.Recurrent(fastrnn.cells.mgu, 3, 5),
    "norm": lambda: fastrnn.LayerNormLSTM(3, 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_pass_draws_one_mask(name: str) -> None:
    """The layer computes what one with the dropped weight does, and sends it the gradient."""
    layer = dropped(LAYERS[name]())
    whole = layer.parametrizations.weight_hh_l0.original
    x = torch.randn(6, 2, 3)
    torch.manual_seed(7)
    y = layer(x)[0]
    torch.manual_seed(7)
    mask = (layer.weight_hh_l0 != 0).detach()
    assert 0.2 < mask.double().mean() < 0.8
    other = LAYERS[name]()
    state = {k: v for k, v in layer.state_dict().items() if not k.startswith("parametrizations")}
    other.load_state_dict(state | {"weight_hh_l0": 2 * mask * whole.detach()})
    assert torch.equal(y, other(x)[0])
    y.sum().backward()
    other(x)[0].sum().backward()
    torch.testing.assert_close(whole.grad, 2 * mask * other.weight_hh_l0.grad)


def test_evaluation_has_all_weights() -> None:
    layer = dropped(fastrnn.LSTM(3, 5))
    x = torch.randn(4, 2, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    plain = fastrnn.LSTM(3, 5)
    plain.load_state_dict(
        {
            k.replace("parametrizations.", "").replace(".original", ""): v
            for k, v in layer.state_dict().items()
        }
    )
    assert torch.equal(layer(x)[0], plain(x)[0])


@pytest.mark.parametrize("make", [fastrnn.GRUCell, nn.GRUCell])
def test_cells_and_modules_of_torch(make: Any) -> None:
    cell = dropped(make(3, 5), "weight_ih", 1.0)
    x, h = torch.randn(2, 3), torch.zeros(2, 5)
    assert torch.equal(cell(x, h), cell(torch.zeros(2, 3), h))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_probability_is_checked(p: float) -> None:
    with pytest.raises(ValueError, match="p should be a probability, from 0 to 1"):
        fastrnn.WeightDrop(p)
