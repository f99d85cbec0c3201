"""Long short-term memory with the forget gate alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["chrono", "janet"]


def _initialize(u: Any, v: Any) -> None:
    fill.bias(u.f, v.f, 1)
    fill.bias(u.c, v.c, 0)


@cell(gates="fc", states="h", initialize=_initialize)
def janet(u, v, h):  # type: ignore[no-untyped-def]
    """Just another network (van der Westhuizen & Lasenby 2018, arXiv:1804.04849).

        s  = W_f·x + R_f·h + b_f
        c  = tanh(W_c·x + R_c·h + b_c)
        h' = sigmoid(s)·h + (1 - sigmoid(s - beta))·c

    `beta` is 1, as in the authors' code. The biases begin with `b_f = 1` and `b_c = 0`, as there
    where the longest dependency is not given. Where it is, the paper begins with `chrono`.
    """
    s = u.f + v.f
    return sigmoid(s) * h + (1 - sigmoid(s - 1)) * tanh(u.c + v.c)


def chrono(longest: float) -> Callable[[Any, Any], None]:
    """The paper's values for `initialize` of `janet`: `b_f` from log(U(1, longest - 1)), `b_c = 0`
    (Tallec & Ollivier 2018, arXiv:1804.11188).

    Args:
        longest: the longest dependency in steps, more than 2.
    """
    fill.check_longest(longest)

    def initialize(u: Any, v: Any) -> None:
        fill.chrono(u.f, v.f, longest)
        fill.bias(u.c, v.c, 0)

    return initialize
