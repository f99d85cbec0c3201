"""The norm over the heads of `SLSTM`, which comes after the recurrence."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn import kernels
from fastrnn.tools.loop import Loop
from tests.support.tensors import batches

WAYS = [
    pytest.param({}, id="one head"),
    pytest.param({"heads": 4}, id="heads"),
    pytest.param({"heads": 2, "batch_first": True, "bias": False}, id="batch first"),
]


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A layer with the norm, and one without it, with the same weights that are not 0."""
    layer: Any = fastrnn.SLSTM(5, 8, norm=True, dtype=dtype, **options)
    plain: Any = fastrnn.SLSTM(5, 8, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight_hh_l0.uniform_(-0.5, 0.5)
        layer.weight_norm_l0.uniform_(0.5, 1.5)
    given = {n: w for n, w in layer.state_dict().items() if n != "weight_norm_l0"}
    plain.load_state_dict(given)
    return layer, plain


def by_group_norm(layer: Any, y: Tensor) -> Tensor:
    """`torch.nn.GroupNorm` after the recurrence, as the blocks of the paper have it."""
    group = nn.GroupNorm(layer.heads, 8, dtype=y.dtype)
    with torch.no_grad():
        group.weight.copy_(layer.weight_norm_l0.flatten())
    result: Tensor = group(y.reshape(-1, 8)).view_as(y)
    return result


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("options", WAYS)
def test_it_is_a_group_norm(options: dict[str, Any], kernel: str) -> None:
    layer, plain = pair(**options)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    with kernels.use(kernel):
        y, states = layer(x)
        h, right = plain(x)
        torch.testing.assert_close(y, by_group_norm(layer, h))
        torch.testing.assert_close(states, right)
        assert layer(x[0])[0].shape == (3, 8)
        torch.testing.assert_close(layer(x[0])[0], by_group_norm(layer, plain(x[0])[0]))
        _, _, ((steps, *_),) = layer(x, return_states=True)
        torch.testing.assert_close(steps, h)


def test_gradients_are_those_of_the_group_norm() -> None:
    layer, plain = pair(heads=2)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x)[0].sin().sum(), list(layer.parameters()))
    names = [name for name, _ in layer.named_parameters()]
    own = dict(plain.named_parameters())
    gain = layer.weight_norm_l0.detach().flatten().requires_grad_()
    y = nn.functional.group_norm(plain(x)[0].reshape(-1, 8), 2, gain).view(6, 3, 8)
    theirs = torch.autograd.grad(y.sin().sum(), [own.get(name, gain) for name in names])
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other.view_as(one), msg=name)


def test_names_begin_and_repr() -> None:
    layer = fastrnn.SLSTM(5, 8, heads=4, norm=True)
    assert torch.equal(layer.weight_norm_l0, torch.ones(4, 2))
    assert fastrnn.SLSTM(5, 8, norm=True).weight_norm_l0.shape == (8,)
    assert list(layer.state_dict()) == [
        *fastrnn.SLSTM(5, 8, heads=4).state_dict(),
        "weight_norm_l0",
    ]
    assert str(layer) == "SLSTM(5, 8, heads=4, norm=True)"
    with torch.no_grad():
        layer.weight_norm_l0.fill_(3)
    layer.reset_parameters()
    assert torch.equal(layer.weight_norm_l0, torch.ones(4, 2))
    assert fastrnn.SLSTM(5, 8, norm=True, dtype=torch.bfloat16).weight_norm_l0.dtype == (
        torch.bfloat16
    )


def test_packed_input_and_lengths() -> None:
    """Padding stays 0: the norm has no bias."""
    layer, plain = pair(heads=2)
    sequences = batches([3, 5, 1], 5)
    packed = pack_sequence(sequences, enforce_sorted=False)
    y, _ = layer(packed)
    assert isinstance(y, PackedSequence)
    torch.testing.assert_close(y.data, by_group_norm(layer, plain(packed)[0].data))
    x = torch.randn(5, 3, 5, dtype=torch.float64)
    y, _ = layer(x, lengths=[3, 5, 0])
    assert not y[3:, 0].any() and not y[:, 2].any()
    torch.testing.assert_close(y[:3, 0], layer(x[:3, 0])[0])


def test_copies_freezing_and_quantising() -> None:
    layer, _ = pair(torch.float32, heads=2)
    x = torch.randn(6, 3, 5)
    y = layer(x)[0]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x)[0], y)
    fastrnn.freeze(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(layer(x)[0], y)
    layer.load_state_dict(layer.state_dict())
    layer.double().float()
    fastrnn.unfreeze(layer)
    assert all(p.requires_grad for p in layer.parameters())
    fastrnn.quantize_(layer)
    assert 0 < (layer(x)[0] - y).abs().max() < 0.05
    fastrnn.dequantize_(layer)
    layer.weight_norm_l0.requires_grad_(False)
    fastrnn.unfreeze(fastrnn.freeze(layer))
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["weight_norm_l0"]


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.layer(x)[0]
        return first


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_recorded_graphs_have_the_norm_once() -> None:
    layer, _ = pair(torch.float32, heads=2)
    x = torch.randn(6, 3, 5)
    y = layer(x)[0]
    torch.testing.assert_close(torch.fx.symbolic_trace(First(layer))(x), y)
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x)[0], y)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x)[0], y)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x)[0], y)


def test_what_is_refused(tmp_path: Path) -> None:
    for options, why in (
        ({"proj_size": 4}, "over the units of a head, which a projection mixes"),
        ({"num_layers": 2}, "for one layer in one direction"),
        ({"bidirectional": True}, "for one layer in one direction"),
    ):
        with pytest.raises(ValueError, match=why):
            fastrnn.SLSTM(5, 8, norm=True, **options)
    layer = fastrnn.SLSTM(5, 8, norm=True)
    for call in (layer.stream, lambda: layer.stream_slots(2)):
        with pytest.raises(ValueError, match="a stepper gives h, and the output of this layer is"):
            call()
    with pytest.raises(ValueError, match="the code in C gives h"):
        fastrnn.export_c(layer, tmp_path / "layer.c")
    with pytest.raises(ValueError, match="neither heads nor norm"):
        Loop(layer)
