"""A cell of a user that several files test layers with: each cell takes seconds to compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastrnn


@fastrnn.cell(gates="fn", states="h", name="shared_mgu")
def minimal(u: Any, v: Any, h: Tensor) -> Tensor:
    """Minimal gated unit, Zhou et al. 2016, arXiv:1603.09420."""
    f = torch.sigmoid(u.f + v.f)
    return (1 - f) * h + f * torch.tanh(u.n + f * v.n)
