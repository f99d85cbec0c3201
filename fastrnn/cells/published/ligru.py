"""The gated recurrent unit for speech, without a reset gate."""

from __future__ import annotations

from typing import Any

from torch import relu, sigmoid

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["ligru"]


def _initialize(u: Any, v: Any) -> None:
    for gate in (v.z, v.n):
        fill.orthogonal(gate.weight)


@cell(gates="zn", states="h", initialize=_initialize)
def ligru(u, v, h):  # type: ignore[no-untyped-def]
    """Light gated recurrent unit (Ravanelli et al. 2018, arXiv:1803.10225).

        z  = sigmoid(BN(W_z·x) + R_z·h)
        n  = relu(BN(W_n·x) + R_n·h)
        h' = z·h + (1 - z)·n

    The paper normalises `W·x` over the batch (BN); here there are biases in its place. The
    recurrent matrices begin orthogonal, as in the authors' code.
    """
    z = sigmoid(u.z + v.z)
    n = relu(u.n + v.n)
    return n + z * (h - n)
