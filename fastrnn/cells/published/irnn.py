"""The Elman network of rectified units that begins with the identity."""

from __future__ import annotations

from typing import Any

from torch import nn, relu

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["irnn"]


def _initialize(u: Any, v: Any) -> None:
    nn.init.normal_(u.h.weight, std=0.001)
    nn.init.eye_(v.h.weight)
    fill.bias(u.h, v.h, 0)


@cell(gates="h", states="h", initialize=_initialize)
def irnn(u, v, h):  # type: ignore[no-untyped-def]
    """Elman network of rectified units (Le et al. 2015, arXiv:1504.00941).

        h' = relu(W·x + R·h + b)

    It begins with `R = I`, `b = 0` and `W` from N(0, 0.001²), as in the paper.
    """
    return relu(u.h + v.h)
