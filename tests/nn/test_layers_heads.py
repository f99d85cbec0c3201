"""`heads=`: a layer with heads gives the results of as many small layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import cells, kernels
from tests.support.tensors import batches, flatten

LAYERS = {
    "RNN": lambda *a, **k: fastrnn.RNN(*a, **k),
    "GRU": lambda *a, **k: fastrnn.GRU(*a, **k),
    "LSTM": lambda *a, **k: fastrnn.LSTM(*a, **k),
    "Recurrent": lambda *a, **k: fastrnn.Recurrent(cells.get("lstm"), *a, **k),
}


def small_layers(layer: Any, bidirectional: bool) -> list[nn.Module]:
    """The heads of a layer as layers of torch.nn, with its weights."""
    kind = getattr(nn, {"Recurrent": "LSTM"}.get(type(layer).__name__, type(layer).__name__))
    made = []
    for head in range(layer.heads):
        one = kind(
            layer.input_size,
            layer.hidden_size // layer.heads,
            bidirectional=bidirectional,
            dtype=torch.float64,
        )
        one.load_state_dict({name: value[head] for name, value in layer.state_dict().items()})
        made.append(one)
    return made


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_heads_are_small_layers(name: str, bidirectional: bool, kernel: str) -> None:
    layer = LAYERS[name](5, 12, heads=3, bidirectional=bidirectional, dtype=torch.float64)
    directions = 1 + bidirectional
    x = torch.randn(7, 4, 5, dtype=torch.float64)
    hx = [torch.randn(directions, 4, 12, dtype=torch.float64) for _ in range(2)]
    several = name in ("LSTM", "Recurrent")
    with kernels.use(kernel):
        y, *states = flatten(layer(x, tuple(hx) if several else hx[0]))
    heads = []
    for k, one in enumerate(small_layers(layer, bidirectional)):
        own = [h[..., 4 * k : 4 * (k + 1)].contiguous() for h in hx]
        heads.append(flatten(one(x, tuple(own) if several else own[0])))
    outputs = [h[0].view(7, 4, directions, 4) for h in heads]
    torch.testing.assert_close(y.view(7, 4, directions, 12), torch.cat(outputs, -1))
    for k, state in enumerate(states):
        torch.testing.assert_close(state, torch.cat([h[1 + k] for h in heads], -1))


def test_gradients_layers_packed_input_and_compilation() -> None:
    layer = fastrnn.GRU(5, 8, 2, heads=2, bidirectional=True, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()}["weight_hh_l1"] == (
        2,
        12,
        4,
    )
    assert layer.weight_ih_l1.shape == (2, 12, 16)
    packed = pack_sequence(batches([3, 5, 1], 5), enforce_sorted=False)
    results = []
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel):
            y, h = layer(packed)
        loss = y.data.sin().sum() + h.sum()
        results.append([y.data, h, *torch.autograd.grad(loss, list(layer.parameters()))])
    torch.testing.assert_close(*results)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), layer(x))


def test_frozen_copied_and_saved() -> None:
    layer = fastrnn.LSTM(5, 8, heads=4, bidirectional=True)
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        right = flatten(layer(x))
        assert "heads=4" in repr(layer)
        torch.testing.assert_close(flatten(copy.deepcopy(layer)(x)), right)
        other = fastrnn.LSTM(5, 8, heads=4, bidirectional=True)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(flatten(fastrnn.freeze(other)(x)), right)


def test_one_head_is_a_plain_layer() -> None:
    plain, one = fastrnn.GRU(3, 4), fastrnn.GRU(3, 4, heads=1)
    one.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 3)
    torch.testing.assert_close(one(x), plain(x))
    assert isinstance(fastrnn.to_torch(one), nn.GRU)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"heads": 0}, "heads should be a positive integer, got 0"),
        ({"heads": 2.0}, "positive integer"),
        ({"heads": 5}, "heads=5 should divide hidden_size=8"),
        ({"heads": 2, "proj_size": 2}, "heads are not projected"),
    ],
)
def test_what_heads_cannot_be(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fastrnn.LSTM(4, 8, **arguments)
    with pytest.raises(ValueError, match="at most 64 recurrences side by side"):
        fastrnn.GRU(4, 128, heads=64, bidirectional=True)


def test_what_has_no_heads() -> None:
    layer = fastrnn.LSTM(4, 8, heads=2)
    with pytest.raises(TypeError, match=r"torch\.nn has no heads"):
        fastrnn.to_torch(layer)
    with pytest.raises(ValueError, match="a stepper runs one recurrence per layer"):
        layer.stream()


def test_the_most_heads_there_can_be() -> None:
    layer = fastrnn.RNN(3, 64, heads=32, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with kernels.use("cpu"):
        y, _ = layer(x)
    with kernels.use("reference"):
        torch.testing.assert_close(layer(x)[0], y)
