"""Gated recurrent units, in the gate order of torch.nn."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["gru"]


@cell(gates="rzn", states="h")
def gru(u, v, h):  # type: ignore[no-untyped-def]
    """Gated recurrent unit, reset after the product (Cho et al. 2014, arXiv:1406.1078v1)."""
    r, z = sigmoid(u.r + v.r), sigmoid(u.z + v.z)
    n = tanh(u.n + r * v.n)
    return n + z * (h - n)
