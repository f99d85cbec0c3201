"""A cell whose two gates come from the sum and the difference of the same projections."""

from __future__ import annotations

from torch import sigmoid

from fastrnn.cells.declare import cell

__all__ = ["atr"]


@cell(gates="p", states="h")
def atr(u, v, h):  # type: ignore[no-untyped-def]
    """Addition-subtraction twin-gated recurrent network (Zhang et al. 2018, arXiv:1810.12546).

        p  = W·x
        q  = R·h
        i  = sigmoid(p + q)
        f  = sigmoid(p - q)
        h' = i·p + f·h

    It begins with torch.nn's values.
    """
    return sigmoid(u.p + v.p) * u.p + sigmoid(u.p - v.p) * h
