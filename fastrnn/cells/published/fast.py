"""Networks for small devices: one product, and a few learned scalars."""

from __future__ import annotations

from typing import Any

from torch import nn, sigmoid, tanh

from fastrnn.cells.declare import Param, cell
from fastrnn.cells.published import fill

__all__ = ["fast_grnn", "fast_rnn"]


def _matrices(u: Any, v: Any) -> None:
    for gate in (u.h, v.h):
        nn.init.normal_(gate.weight, std=0.1)


def _initialize_rnn(u: Any, v: Any, p: Any) -> None:
    _matrices(u, v)
    fill.bias(u.h, v.h, 1)


def _initialize_grnn(u: Any, v: Any, p: Any) -> None:
    _matrices(u, v)
    fill.bias(u.h, v.h, 0)


@cell(
    gates="h",
    states="h",
    params={"alpha": Param("one", init=-3.0), "beta": Param("one", init=3.0)},
    initialize=_initialize_rnn,
)
def fast_rnn(u, v, p, h):  # type: ignore[no-untyped-def]
    """FastRNN (Kusupati et al. 2018, arXiv:1901.02358).

        n  = tanh(W·x + U·h + b)
        h' = sigmoid(beta)·h + sigmoid(alpha)·n

    `alpha` and `beta` are learned scalars. They begin with -3 and 3, `b` with 1, and both matrices
    from N(0, 0.1²), as in the authors' code, which also passes them through a sigmoid.
    """
    return sigmoid(p.beta) * h + sigmoid(p.alpha) * tanh(u.h + v.h)


@cell(
    gates="h",
    states="h",
    params={
        "bz": Param("unit", init=1.0),
        "bn": Param("unit", init=1.0),
        "zeta": Param("one", init=1.0),
        "nu": Param("one", init=-4.0),
    },
    initialize=_initialize_grnn,
)
def fast_grnn(u, v, p, h):  # type: ignore[no-untyped-def]
    """FastGRNN (Kusupati et al. 2018, arXiv:1901.02358).

        a  = W·x + U·h
        z  = sigmoid(a + b_z)
        n  = tanh(a + b_n)
        h' = z·h + (sigmoid(zeta)·(1 - z) + sigmoid(nu))·n

    Both gates share one product. `zeta` and `nu` are learned scalars. They begin with 1 and -4, the
    biases with 1, and both matrices from N(0, 0.1²), as in the authors' code. A layer with
    `bias=False` has the published weights and no others.
    """
    a = u.h + v.h
    z, n = sigmoid(a + p.bz), tanh(a + p.bn)
    return z * h + (sigmoid(p.zeta) * (1 - z) + sigmoid(p.nu)) * n
