"""An Elman network with one gate."""

from __future__ import annotations

from typing import Any

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["ugrnn"]


def _initialize(u: Any, v: Any) -> None:
    fill.bias(u.g, v.g, 1)


@cell(gates="gc", states="h", initialize=_initialize)
def ugrnn(u, v, h):  # type: ignore[no-untyped-def]
    """Update gate RNN (Collins et al. 2017, arXiv:1611.09913).

        c  = tanh(W_c·x + R_c·h + b_c)
        g  = sigmoid(W_g·x + R_g·h + b_g)
        h' = g·h + (1 - g)·c

    The paper also tries relu in place of tanh. `b_g` begins with 1, the value that TensorFlow's
    `contrib.rnn.UGRNNCell` adds to it.
    """
    c = tanh(u.c + v.c)
    return c + sigmoid(u.g + v.g) * (h - c)
