"""The cell that a search over architectures found."""

from __future__ import annotations

from torch import relu, sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["nas"]


@cell(gates=tuple(f"g{k}" for k in range(8)), states="hc")
def nas(u, v, h, c):  # type: ignore[no-untyped-def]
    """Cell found by neural architecture search (Zoph & Le 2017, arXiv:1611.01578).

    With `a_k = W_k·x + R_k·h`, in the order of TensorFlow's `contrib.rnn.NASCell`, which is the
    usual reference because the paper draws the cell and gives no formula:

        p  = tanh(tanh(sigmoid(a_0)·relu(a_1)) + c)
        q  = tanh(sigmoid(a_2) + relu((W_3·x)·(R_3·h)))
        r  = tanh(tanh(a_4)·sigmoid(a_5))
        s  = sigmoid(tanh(a_6) + sigmoid(a_7))
        c' = p·q
        h' = tanh(c'·tanh(r + s))

    `NASCell` has no bias by default, and else one at `R·h`; here each product has its own. It
    begins with torch.nn's values.
    """
    a = {k: getattr(u, k) + getattr(v, k) for k in ("g0", "g1", "g2", "g4", "g5", "g6", "g7")}
    p = tanh(tanh(sigmoid(a["g0"]) * relu(a["g1"])) + c)
    q = tanh(sigmoid(a["g2"]) + relu(u.g3 * v.g3))
    r = tanh(tanh(a["g4"]) * sigmoid(a["g5"]))
    s = sigmoid(tanh(a["g6"]) + sigmoid(a["g7"]))
    c = p * q
    return tanh(c * tanh(r + s)), c
