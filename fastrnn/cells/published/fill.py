"""Values that several cells begin with. Each function writes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["bias", "check_longest", "chrono", "orthogonal"]


def bias(u: Any, v: Any, value: float) -> None:
    """Set the bias of a gate, which is the sum of two, to `value`. A layer may have no bias.

    Args:
        u, v: the gate's rows of the input and of the recurrent weights; `v` is None if it has rows
            in one of them.
    """
    if u.bias is not None:
        u.bias.fill_(value)
        if v is not None:
            v.bias.zero_()


def check_longest(longest: float) -> None:
    """Raise if `chrono` cannot draw for this longest dependency."""
    if not longest > 2:
        raise ValueError(f"the longest dependency should have more than 2 steps, got {longest}")


def chrono(u: Any, v: Any, longest: float) -> None:
    """Draw the bias of a gate from log(U(1, longest - 1)) (Tallec & Ollivier 2018,
    arXiv:1804.11188).

    Args:
        u, v: as in `bias`.
        longest: the longest dependency in steps, more than 2.
    """
    check_longest(longest)
    bias(u, v, 1)
    if u.bias is not None:
        u.bias.uniform_(1, longest - 1).log_()


def orthogonal(weight: Tensor, gain: float = 1.0) -> None:
    """Fill a matrix with a random orthogonal one, times `gain`."""
    # LAPACK has no routine for 16-bit floats.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(torch.nn.init.orthogonal_(wide, gain))
