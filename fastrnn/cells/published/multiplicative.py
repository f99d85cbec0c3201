"""Long short-term memory whose recurrent product sees a product of input and state."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["multiplicative_lstm"]


@cell(gates="mifgo", states="hc")
def multiplicative_lstm(u, v, h, c):  # type: ignore[no-untyped-def]
    """Multiplicative LSTM (Krause et al. 2016, arXiv:1609.07959).

        m  = (W_m·x + b_m)·(R_m·h + c_m)
        i, f, o = sigmoid(W·x + R·m + b) for each of these gates
        c' = f·c + i·tanh(W_g·x + R_g·m + b_g)
        h' = o·tanh(c')

    The paper has neither `b_m` nor `c_m`, and its candidate `g` has no tanh. It begins with
    torch.nn's values.
    """
    m = v(u.m * v.m)
    i, f, o = sigmoid(u.i + m.i), sigmoid(u.f + m.f), sigmoid(u.o + m.o)
    c = f * c + i * tanh(u.g + m.g)
    return o * tanh(c), c
