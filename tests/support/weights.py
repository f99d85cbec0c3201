"""Ways to attach a parametrization or a hook to a weight."""

from __future__ import annotations

import warnings

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


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
