"""Gated units whose gate multiplies the state before the recurrent product."""

from __future__ import annotations

from typing import Any

from torch import nn, sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["gru_reset_before", "mgu2", "mgu_reset_before"]


def _initialize(u: Any, v: Any) -> None:
    for first, second in ((u.r, v.r), (u.z, v.z), (u.n, v.n)):
        nn.init.normal_(first.weight, std=0.01)
        fill.orthogonal(second.weight)


@cell(gates="rzn", states="h", initialize=_initialize)
def gru_reset_before(u, v, h):  # type: ignore[no-untyped-def]
    """Gated recurrent unit, as it was published (Cho et al. 2014, arXiv:1406.1078).

        r  = sigmoid(W_r·x + R_r·h + b_r)
        z  = sigmoid(W_z·x + R_z·h + b_z)
        n  = tanh(W_n·x + R_n·(r·h) + b_n)
        h' = (1 - z)·n + z·h

    torch.nn's GRU multiplies by `r` after the product: `r·(R_n·h + c_n)`. This is the GRU of Keras
    with `reset_after=False`, and of ONNX with `linear_before_reset=0`. `W` begins from N(0, 0.01²)
    and each `R` orthogonal, as in the paper, which omits the biases: these begin with torch.nn's
    values.
    """
    r, z = sigmoid(u.r + v.r), sigmoid(u.z + v.z)
    n = tanh(u.n + v(r * h).n)
    return n + z * (h - n)


@cell(gates="fn", states="h")
def mgu_reset_before(u, v, h):  # type: ignore[no-untyped-def]
    """Minimal gated unit, as it was published (Zhou et al. 2016, arXiv:1603.09420).

        f  = sigmoid(W_f·x + R_f·h + b_f)
        n  = tanh(W_n·x + R_n·(f·h) + b_n)
        h' = (1 - f)·h + f·n

    It begins with torch.nn's values.
    """
    f = sigmoid(u.f + v.f)
    return h + f * (tanh(u.n + v(f * h).n) - h)


@cell(gates="fn", inputs="n", states="h")
def mgu2(u, v, h):  # type: ignore[no-untyped-def]
    """Second of the simplified minimal gated units (Heck & Salem 2017, arXiv:1701.03452).

        f  = sigmoid(R_f·h)
        n  = tanh(W_n·x + R_n·(f·h) + b_n)
        h' = (1 - f)·h + f·n

    The gate does not see the input: `weight_ih` has rows of `n` alone. The paper's MGU2 has no bias
    at `f`, and its MGU1 has one; here it is that of `bias_hh`. It begins with torch.nn's
    values.
    """
    f = sigmoid(v.f)
    return h + f * (tanh(u.n + v(f * h).n) - h)
