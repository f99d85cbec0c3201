"""docs/beyond-torch-nn.md, row by row: torch.nn fails or is wrong, and ours works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from tests.support.names import LAYERS


def made(library: Any, name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = getattr(library, name)(4, 6, **kwargs)
    return layer


def compiled(layer: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(5, 3, 4))


def compiled_packed(layer: nn.Module) -> Any:
    torch._dynamo.reset()
    call = torch.compile(lambda p: layer(p), fullgraph=True, backend="aot_eager")
    return call(pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]))


def exported(layer: nn.Module) -> Any:
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(
        layer, (torch.randn(5, 3, 4),), dynamic_shapes={"input": {0: steps}}
    )
    assert program.module()(torch.randn(9, 3, 4))[0].shape == (9, 3, 6)


def vmapped(layer: nn.Module) -> Any:
    return torch.vmap(lambda x: layer(x)[0])(torch.randn(7, 5, 3, 4))


def vmapped_weights(layer: nn.Module) -> Any:
    weights, _ = torch.func.stack_module_state([layer, copy.deepcopy(layer)])
    return torch.vmap(lambda w: torch.func.functional_call(layer, w, (torch.ones(5, 3, 4),))[0])(
        weights
    )


def per_sample(layer: nn.Module) -> Any:
    weights = dict(layer.named_parameters())

    def loss(weights: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x.unsqueeze(1),))[0].square().sum()

    return torch.vmap(torch.func.grad(loss), (None, 1))(weights, torch.randn(5, 3, 4))


def forward_mode(layer: nn.Module) -> Any:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(5, 3, 4), torch.randn(5, 3, 4))
        assert forward_ad.unpack_dual(layer(x)[0]).tangent is not None


def skip_init(layer: nn.Module) -> Any:
    return nn.utils.skip_init(type(layer), 4, 6)


def swapped(layer: nn.Module) -> Any:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(copy.deepcopy(layer).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def changed_in_place(layer: nn.Module) -> Any:
    output, _ = layer(torch.randn(5, 3, 4))
    output.mul_(2)
    output.sum().backward()


def no_steps(layer: nn.Module) -> Any:
    x = torch.randn(5, 3, 4)
    if isinstance(layer, (nn.RNN, nn.GRU, nn.LSTM)):
        return layer(pack_padded_sequence(x, [5, 2, 0]))
    assert not layer(x, lengths=[5, 2, 0])[0][:, 2].any()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (compiled, LAYERS),
        (compiled_packed, LAYERS),
        (exported, LAYERS),
        (vmapped, LAYERS),
        (vmapped_weights, LAYERS),
        (per_sample, ["RNN", "GRU"]),
        (forward_mode, ["LSTM"]),
        (skip_init, LAYERS),
        (swapped, LAYERS),
        (changed_in_place, ["LSTM"]),
        (no_steps, LAYERS),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_torch_refuses_what_works_here(call: Callable[[nn.Module], Any], names: list[str]) -> None:
    for name in names:
        call(made(fastrnn, name))
        with pytest.raises(Exception, match=r"."):
            call(made(nn, name))


@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_keeps_what_was_written(name: str) -> None:
    x = torch.randn(5, 3, 4)
    same = []
    for library in (nn, fastrnn):
        layer: Any = made(library, name)
        layer._flat_weights[1] = nn.Parameter(torch.randn_like(layer.weight_hh_l0))
        same.append(torch.equal(layer(x)[0], copy.deepcopy(layer)(x)[0]))
    assert same == [False, True]
