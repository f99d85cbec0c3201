"""The gated recurrent unit with one gate."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["mgu"]


@cell(gates="fn", states="h")
def mgu(u, v, h):  # type: ignore[no-untyped-def]
    """Minimal gated unit (Zhou et al. 2016, arXiv:1603.09420), with the gate after the product.

        f  = sigmoid(W_f·x + R_f·h + b_f)
        n  = tanh(W_n·x + R_n·(f·h) + b_n)        in the paper
        n  = tanh(W_n·x + b_n + f·(R_n·h + c_n))  here
        h' = (1 - f)·h + f·n

    The paper multiplies `h` by the gate before the product. Here the gate comes after it, as in the
    GRU of torch.nn, because a step then has one product. It
    begins with torch.nn's values.
    """
    f = sigmoid(u.f + v.f)
    return h + f * (tanh(u.n + f * v.n) - h)
