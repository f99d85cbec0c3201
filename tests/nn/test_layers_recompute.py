"""`recompute=`: it saves less for the backward pass, and the gradients are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import kernels
from fastrnn.kernels.operands import Operands, side_by_side
from tests.support.tensors import flatten, sum_of


def layers(**options: Any) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "rnn": fastrnn.RNN(3, 5, nonlinearity="relu", **options),
        "gru": fastrnn.GRU(3, 5, 2, bidirectional=True, **options),
        "lstm": fastrnn.LSTM(3, 5, 2, bidirectional=True, **options),
        "projected": fastrnn.LSTM(3, 6, proj_size=4, **options),
        "heads": fastrnn.LSTM(3, 6, heads=2, **options),
        "own": fastrnn.Recurrent(squashed, 3, 5, **options),
    }


@fastrnn.cell(gates="a", states="hm")
def squashed(u, v, h, m):
    m = torch.sigmoid(u.a + v.a) * m + torch.tanh(h)
    return torch.tanh(m), m


def saved(layer: nn.Module, *inputs: Any, **options: Any) -> tuple[int, list[Tensor]]:
    """Bytes kept for the backward pass besides operands and results; and all gradients."""
    leaves = [*layer.parameters(), *(t for t in inputs if isinstance(t, Tensor))]
    for leaf in leaves:
        leaf.requires_grad_()
        leaf.grad = None
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = flatten(layer(*inputs, **options))
    known = {t.untyped_storage().data_ptr() for t in (*leaves, *results)}
    total = sum(bytes_ for pointer, bytes_ in sizes.items() if pointer not in known)
    sum_of((r * r).sum() for r in results).backward()
    return total, [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("form", ["dense", "packed", "lengths", "resets"])
@pytest.mark.parametrize("name", layers())
def test_gradients_are_the_same(name: str, form: str, kernel: str) -> None:
    x = torch.randn(4, 3, 3)
    options: dict[str, Any] = {
        "lengths": {"lengths": torch.tensor([2, 4, 0])},
        "resets": {"resets": torch.rand(4, 3) < 0.4},
    }.get(form, {})
    given: Any = x
    if form == "packed":
        given = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1], x[:1, 2]])
    found = []
    for recompute in (False, True):
        with kernels.use(kernel):
            found.append(saved(layers(recompute=recompute)[name], given, **options)[1])
    assert len(found[0]) == len(found[1]) > 3
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_only_operands_and_outputs_are_kept() -> None:
    x = torch.randn(50, 3, 3)
    layer: Any
    for name, layer in layers().items():
        much, _ = saved(layer, x)
        layer.recompute = True
        little, _ = saved(layer, x)
        # The output of the layer in between, which is the input of the next.
        between = 50 * 3 * 10 * 4 if name in ("gru", "lstm") else 0
        assert little == between, name
        rows = 50 * 3 * 4
        tape = {"gru": 4 * 10 * 2, "lstm": 5 * 10 * 2, "projected": 6 * 6, "heads": 5 * 6}
        assert name not in tape or much >= little + rows * tape[name], name


def test_what_else_uses_the_gradient() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    plain = layers(dtype=torch.float64)["lstm"]
    other = layers(dtype=torch.float64, recompute=True)["lstm"]

    def changed(layer: nn.Module) -> list[Tensor]:
        y, _ = layer(x)
        total = (y * 1).sin().sum()
        with torch.no_grad():
            y.mul_(0)  # torch.nn allows it
        return list(torch.autograd.grad(total, list(layer.parameters())))

    def twice(layer: nn.Module) -> list[Tensor]:
        own = list(layer.parameters())
        first = torch.autograd.grad(layer(x)[0].sin().sum(), own, create_graph=True)
        return list(torch.autograd.grad(sum_of(g.square().sum() for g in first), own))

    def cast(layer: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            total = layer(x)[0].sin().sum()
        return list(torch.autograd.grad(total, list(layer.parameters())))

    for use in (changed, twice, cast):
        for a, b in zip(use(other), use(plain), strict=True):
            assert torch.equal(a, b), use.__name__


def test_compiled() -> None:
    x = torch.randn(4, 2, 3)
    layer: Any = layers(recompute=True)["lstm"]
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    much, right = saved(layers()["lstm"], x)
    little, ours = saved(compiled, x)
    assert little < much
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b)
    arguments = Operands(x, *side_by_side(layer._weights()[:1]))
    x.requires_grad_()
    torch.library.opcheck(torch.ops.fastrnn.scan.default, ("lstm", *arguments, False, True))


def test_an_attribute_of_any_layer() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4)})
    fastrnn.replace_(model)
    layer = model["rnn"]
    assert isinstance(layer, fastrnn.GRU) and not layer.recompute
    assert "recompute" not in repr(layer)
    layer.recompute = True
    assert saved(layer, torch.randn(5, 2, 3))[0] == 0
    assert "recompute=True" in repr(layer)
    assert layer.state_dict().keys() == nn.GRU(3, 4).state_dict().keys()
    fastrnn.restore_(model)
    assert type(model["rnn"]) is nn.GRU
    model["rnn"](torch.randn(5, 2, 3))
