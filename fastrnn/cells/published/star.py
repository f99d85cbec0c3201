"""A cell made to be stacked in many layers."""

from __future__ import annotations

from typing import Any

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["star"]


def _initialize(u: Any, v: Any) -> None:
    for weight in (u.z.weight, u.k.weight, v.k.weight):
        fill.orthogonal(weight)


@cell(gates="zk", recurrent="k", states="h", initialize=_initialize)
def star(u, v, h):  # type: ignore[no-untyped-def]
    """Stackable recurrent cell (Turkoglu et al. 2019, TPAMI 2021, arXiv:1911.11033).

        z  = tanh(W_z·x + b_z)
        k  = sigmoid(W_k·x + R_k·h + b_k)
        h' = tanh((1 - k)·h + k·z)

    The matrices begin orthogonal, as in the authors' code. That code has another gate, that of
    `janet`: `h' = tanh(sigmoid(a)·h + (1 - sigmoid(a - 1))·z)`, where `a = W_k·x + R_k·h + b_k`.
    `weight_hh` has rows of `k` alone.
    """
    z, k = tanh(u.z), sigmoid(u.k + v.k)
    return tanh(h + k * (z - h))
