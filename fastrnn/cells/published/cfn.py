"""A gated network whose state goes to zero without input."""

from __future__ import annotations

from typing import Any

from torch import nn, sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["cfn"]


def _initialize(u: Any, v: Any) -> None:
    for gate in (u.theta, u.eta, u.w, v.theta, v.eta):
        nn.init.uniform_(gate.weight, -0.07, 0.07)
    fill.bias(u.theta, v.theta, 1)
    fill.bias(u.eta, v.eta, -1)
    fill.bias(u.w, None, 0)


@cell(gates=("theta", "eta", "w"), recurrent=("theta", "eta"), states="h", initialize=_initialize)
def cfn(u, v, h):  # type: ignore[no-untyped-def]
    """Chaos-free network (Laurent & von Brecht 2016, arXiv:1612.06212).

        theta = sigmoid(U_theta·h + V_theta·x + b_theta)
        eta   = sigmoid(U_eta·h + V_eta·x + b_eta)
        h'    = theta·tanh(h) + eta·tanh(W·x)

    The paper has no bias at `W·x`; here it has `bias_ih`. `weight_hh` has rows of `theta` and
    `eta`. All matrices begin from U(-0.07, 0.07), `b_theta` with 1 and `b_eta` with -1, as in the
    paper, and the bias at `W·x` with 0.
    """
    theta, eta = sigmoid(u.theta + v.theta), sigmoid(u.eta + v.eta)
    return theta * tanh(h) + eta * tanh(u.w)
