"""A gated cell whose units hold one of two stable values."""

from __future__ import annotations

from typing import Any

from torch import nn, sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["nbrc"]


def _initialize(u: Any, v: Any) -> None:
    for gate in (u.a, u.c, u.n, v.a, v.c):
        nn.init.xavier_uniform_(gate.weight)
    for first, second in ((u.a, v.a), (u.c, v.c), (u.n, None)):
        fill.bias(first, second, 0)


@cell(gates="acn", recurrent="ac", states="h", initialize=_initialize)
def nbrc(u, v, h):  # type: ignore[no-untyped-def]
    """Neuromodulated bistable recurrent cell (Vecoven et al. 2021, arXiv:2006.05252).

        a  = 1 + tanh(U_a·x + W_a·h)
        c  = sigmoid(U_c·x + W_c·h)
        h' = c·h + (1 - c)·tanh(U·x + a·h)

    `weight_hh` has rows of `a` and `c`. The authors' code has biases in these alone.
    Each matrix of a gate begins as Glorot & Bengio 2010 have it, from U(-a, a) with
    `a = √(6 / (rows + columns))`, and each bias with 0, as in that code.
    """
    a, c = 1 + tanh(u.a + v.a), sigmoid(u.c + v.c)
    n = tanh(u.n + a * h)
    return n + c * (h - n)
