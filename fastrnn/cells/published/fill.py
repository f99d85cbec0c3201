"""Values that several cells begin with. Each function writes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["bias", "orthogonal"]


def bias(u: Any, v: Any, value: float) -> None:
    """Set the bias of a gate, which is the sum of two, to `value`. A layer may have no bias.

    Args:
        u, v: the gate's rows of the input and of the recurrent weights.
    """
    if u.bias is not None:
        u.bias.fill_(value)
        v.bias.zero_()


def orthogonal(weight: Tensor) -> None:
    """Fill a matrix with a random orthogonal one."""
    # LAPACK has no routine for 16-bit floats.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(torch.nn.init.orthogonal_(wide))
