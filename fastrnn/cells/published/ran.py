"""A gated network whose state is a weighted sum of its inputs."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["ran"]


@cell(gates="gif", recurrent="if", states="hc")
def ran(u, v, h, c):  # type: ignore[no-untyped-def]
    """Recurrent additive network (Lee et al. 2017, arXiv:1705.07393).

        g  = W_g·x
        i  = sigmoid(W_i·x + R_i·h + b_i)
        f  = sigmoid(W_f·x + R_f·h + b_f)
        c' = i·g + f·c
        h' = tanh(c')

    The paper's second variant has `h' = c'`. The paper has no bias at `g`; here it has `bias_ih`.
    `weight_hh` has rows of `i` and `f`.
    """
    c = sigmoid(u.i + v.i) * u.g + sigmoid(u.f + v.f) * c
    return tanh(c), c
