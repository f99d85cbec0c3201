"""A gated network whose state is a weighted sum of its inputs."""

from __future__ import annotations

from typing import Any

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["ran"]


def _initialize(u: Any, v: Any) -> None:
    for first, second in ((u.g, None), (u.i, v.i), (u.f, v.f)):
        fill.bias(first, second, 0)


@cell(gates="gif", recurrent="if", states="hc", initialize=_initialize)
def ran(u, v, h, c):  # type: ignore[no-untyped-def]
    """Recurrent additive network (Lee et al. 2017, arXiv:1705.07393).

        g  = W_g·x
        i  = sigmoid(W_i·x + R_i·h + b_i)
        f  = sigmoid(W_f·x + R_f·h + b_f)
        c' = i·g + f·c
        h' = tanh(c')

    The paper's second variant has `h' = c'`. The paper has no bias at `g`; here it has `bias_ih`.
    `weight_hh` has rows of `i` and `f`. The biases begin with 0, as in the authors' code, which
    leaves the matrices to the model around it: here they begin with torch.nn's values.
    """
    c = sigmoid(u.i + v.i) * u.g + sigmoid(u.f + v.f) * c
    return tanh(c), c
