"""Networks that discretise a stable differential equation, with and without a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn, sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["Antisymmetric", "antisymmetric_rnn", "gated_antisymmetric_rnn"]


def _begin(u: Any, v: Any) -> None:
    nn.init.normal_(u.weight, std=u.weight.size(1) ** -0.5)
    fill.bias(u, v, 0)


def _initialize(u: Any, v: Any) -> None:
    _begin(u.h, v.h)


def _initialize_gated(u: Any, v: Any) -> None:
    _begin(u.z, v.z)
    _begin(u.h, v.h)


@cell(gates="h", states="h", initialize=_initialize)
def antisymmetric_rnn(u, v, h, step=0.01):  # type: ignore[no-untyped-def]
    """AntisymmetricRNN (Chang et al. 2019, arXiv:1902.09689).

        h' = h + step·tanh((W - Wᵀ - gamma·I)·h + V·x + b)

    The parametrization `Antisymmetric` gives `weight_hh` the form `W - Wᵀ - gamma·I`. The paper
    chooses the step size for each task; `functools.partial` changes it here. `V` begins from
    N(0, 1/I) for `I` inputs, and `b` with 0, as in the paper. The paper chooses the variance of `W`
    for each task too: here `W` begins with torch.nn's values.
    """
    return h + step * tanh(u.h + v.h)


@cell(gates="zh", states="h", initialize=_initialize_gated)
def gated_antisymmetric_rnn(u, v, h, step=0.01):  # type: ignore[no-untyped-def]
    """AntisymmetricRNN with gating (Chang et al. 2019, arXiv:1902.09689).

        z  = sigmoid((W - Wᵀ - gamma·I)·h + V_z·x + b_z)
        h' = h + step·z·tanh((W - Wᵀ - gamma·I)·h + V_h·x + b_h)

    Both gates have one recurrent matrix: `Antisymmetric` gives both blocks of `weight_hh` the same
    values. The paper chooses the step size for each task; `functools.partial` changes it here. It
    begins as `antisymmetric_rnn` does.
    """
    return h + step * sigmoid(u.z + v.z) * tanh(u.h + v.h)


class Antisymmetric(nn.Module):
    """The parametrization of `weight_hh` that makes each of its blocks `W - Wᵀ - gamma·I`.

    `W` is the first block of the stored matrix; other blocks of that are not read.

    Args:
        gamma: the strength of diffusion, which the paper chooses for each task.
    """

    def __init__(self, gamma: float = 0.01) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, weight: Tensor) -> Tensor:
        """Map the stored matrix [G*H, H], or [heads, G*H, H], to the recurrent one."""
        rows, hidden = weight.shape[-2:]
        first = weight[..., :hidden, :]
        diffusion = self.gamma * torch.eye(hidden, dtype=weight.dtype, device=weight.device)
        return torch.cat([first - first.mT - diffusion] * (rows // hidden), -2)
