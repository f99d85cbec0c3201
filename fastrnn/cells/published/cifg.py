"""Long short-term memory with one gate for input and forgetting."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["cifg"]


@cell(gates="igo", states="hc")
def cifg(u, v, h, c):  # type: ignore[no-untyped-def]
    """LSTM with coupled input and forget gate (Greff et al. 2017, arXiv:1503.04069).

        i  = sigmoid(W_i·x + R_i·h + b_i)
        f  = 1 - i
        g  = tanh(W_g·x + R_g·h + b_g)
        o  = sigmoid(W_o·x + R_o·h + b_o)
        c' = f·c + i·g
        h' = o·tanh(c')

    The paper's gates also read `c` (peepholes); here they do not, as is usual. TensorFlow's
    `CoupledInputForgetGateLSTMCell` computes `f`, and `i = 1 - f`: the same, with the signs of the
    weights of `i` reversed. It begins with torch.nn's values.
    """
    i, o = sigmoid(u.i + v.i), sigmoid(u.o + v.o)
    c = c + i * (tanh(u.g + v.g) - c)
    return o * tanh(c), c
