"""Under a function mode, such as torch's default device, everything works as without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastrnn
from tests.support.modules import twins
from tests.support.names import CELLS, LAYERS
from tests.support.tensors import flatten

NAMES = LAYERS + CELLS


class Subclass(Tensor):
    """It overrides nothing, but is dispatched like a tensor subclass that does."""


def jvp(module: nn.Module, x: Tensor) -> Tensor:
    tangent = torch.ones_like(x)
    return torch.func.jvp(lambda a: flatten(module(a))[0], (x,), (tangent,))[1]


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacfwd(lambda a: flatten(module(a))[0].sum())(x)


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda a: flatten(module(a))[0].square().sum())(x)


def dual(module: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = flatten(module(forward_ad.make_dual(x, torch.ones_like(x))))[0]
        return forward_ad.unpack_dual(y).tangent.clone()


def mapped(module: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda a: flatten(module(a))[0])(torch.stack([x, x + 1, x - 1]))


def per_sample(module: nn.Module, x: Tensor) -> Tensor:
    weights = dict(module.named_parameters())

    def loss(weights: Any, x: Tensor) -> Tensor:
        return flatten(torch.func.functional_call(module, weights, (x,)))[0].square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(weights, torch.stack([x, x + 1]))
    return torch.cat([g.flatten() for g in found.values()])


def called(module: nn.Module, x: Tensor) -> Tensor:
    return flatten(module(x))[0].detach()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "function",
    [called, jvp, jacobian, gradient, dual, mapped, per_sample],
    ids=lambda f: f.__name__,
)
def test_transforms(function: Callable[[nn.Module, Tensor], Tensor], name: str) -> None:
    ours, _, _ = twins(name, 4, 6)
    x = torch.randn(*((3,) if name in CELLS else (5, 3)), 4, dtype=torch.float64)
    expected = function(ours, x)
    assert expected.abs().sum() > 0
    with torch.device("cpu"):
        torch.testing.assert_close(function(ours, x), expected)
    if function in (called, jvp, jacobian, gradient):
        found = function(ours, x.as_subclass(Subclass))
        torch.testing.assert_close(found.as_subclass(Tensor), expected)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_views(name: str) -> None:
    x = torch.randn(3, 5, 4)
    with torch.device("cpu"):
        views = [
            flatten(m(x))[0]._is_view()
            for m in (getattr(library, name)(4, 6, batch_first=True) for library in (nn, fastrnn))
        ]
    assert views[0] == views[1]


@pytest.mark.parametrize("name", NAMES)
def test_frozen(name: str) -> None:
    module = getattr(fastrnn, name)(4, 6)
    x = torch.randn(*((3,) if name in CELLS else (5, 3)), 4)
    frozen = fastrnn.freeze(copy.deepcopy(module))
    with torch.device("cpu"):
        for ours, theirs in zip(flatten(frozen(x)), flatten(module(x)), strict=True):
            torch.testing.assert_close(ours, theirs.detach())
        next(frozen.parameters()).add_(1)
        with pytest.raises(RuntimeError, match="changed or replaced after freezing"):
            frozen(x)


@pytest.mark.parametrize("lengths", [[5, 3, 0], torch.tensor([5, 3, 0])], ids=["list", "tensor"])
def test_lengths_under_another_default_device(lengths: Any) -> None:
    gru = fastrnn.GRU(4, 6)
    x = torch.randn(5, 3, 4)
    expected = gru(x, lengths=lengths)[0]
    with torch.device("meta"):
        torch.testing.assert_close(gru(x, lengths=lengths)[0], expected)
        wrong = [6, 3, 0]
        with pytest.raises(ValueError, match="between 0 and the 5 steps"):
            gru(x, lengths=torch.tensor(wrong, device="cpu"))
