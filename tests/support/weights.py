"""Ways to attach a parametrization or a hook to a weight, and to write values into weights."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

_Module = TypeVar("_Module", bound=nn.Module)


def without_zeros(module: _Module) -> _Module:
    """A module whose weights are drawn where they begin with 0, as the recurrent ones of sLSTM: in
    its outputs, a product or a bias that is left out would not be seen."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.where(weight == 0, torch.rand_like(weight) - 0.5, weight))
    return module


def as_torch_draws(layer: Any) -> Any:
    """A layer whose weights and biases are drawn as those of torch.nn. Published ones let norms
    begin with rows of zeros, which amplify what is rounded 300 times."""
    bound = layer.hidden_size**-0.5
    for name, weight in layer.named_parameters():
        if name.startswith(("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")):
            nn.init.uniform_(weight, -bound, bound)
    return layer


def hidden_weight(module: nn.Module) -> str:
    return "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh"


def weight_norm(module: nn.Module, name: str) -> None:
    parametrizations.weight_norm(module, name)


def old_weight_norm(module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


def pruned(module: nn.Module, name: str) -> None:
    prune.l1_unstructured(module, name, amount=0.5)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Doubled())
