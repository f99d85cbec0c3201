"""A gated network whose state goes to zero without input."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["cfn"]


@cell(gates=("theta", "eta", "w"), recurrent=("theta", "eta"), states="h")
def cfn(u, v, h):  # type: ignore[no-untyped-def]
    """Chaos-free network (Laurent & von Brecht 2016, arXiv:1612.06212).

        theta = sigmoid(U_theta·h + V_theta·x + b_theta)
        eta   = sigmoid(U_eta·h + V_eta·x + b_eta)
        h'    = theta·tanh(h) + eta·tanh(W·x)

    The paper has no bias at `W·x`; here it has `bias_ih`. `weight_hh` has rows of `theta` and
    `eta`.
    """
    theta, eta = sigmoid(u.theta + v.theta), sigmoid(u.eta + v.eta)
    return theta * tanh(h) + eta * tanh(u.w)
