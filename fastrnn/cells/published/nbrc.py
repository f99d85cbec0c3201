"""A gated cell whose units hold one of two stable values."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["nbrc"]


@cell(gates="acn", recurrent="ac", states="h")
def nbrc(u, v, h):  # type: ignore[no-untyped-def]
    """Neuromodulated bistable recurrent cell (Vecoven et al. 2021, arXiv:2006.05252).

        a  = 1 + tanh(U_a·x + W_a·h)
        c  = sigmoid(U_c·x + W_c·h)
        h' = c·h + (1 - c)·tanh(U·x + a·h)

    `weight_hh` has rows of `a` and `c`. The authors' code has biases in these alone.
    """
    a, c = 1 + tanh(u.a + v.a), sigmoid(u.c + v.c)
    n = tanh(u.n + a * h)
    return n + c * (h - n)
