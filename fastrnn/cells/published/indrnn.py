"""A network whose units do not see each other within a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn, relu

from fastrnn.cells.arguments import Param
from fastrnn.cells.declare import cell

__all__ = ["indrnn", "long_memory"]


def _between_0_and_1(u: Tensor) -> None:
    nn.init.uniform_(u)


@cell(gates="h", recurrent="", states="h", params={"u": Param("unit", init=_between_0_and_1)})
def indrnn(u, v, p, h):  # type: ignore[no-untyped-def]
    """Independently recurrent network (Li et al. 2018, arXiv:1803.04831).

        h' = relu(W·x + u*h + b)

    `u` [H], in a layer `weight_u_l0`, has one number for each unit, and there is no `weight_hh`.
    Units meet in the next layer alone, so a network has several. `u` begins from U(0, 1), as in the
    authors' code: so units forget at different speeds. The last layer of a network whose loss reads
    the last step alone begins with `long_memory`. For long sequences the paper clips |u| to
    2^(1/T), after every update.
    """
    return relu(u.h + p.u * h)


def long_memory(steps: int, change: float = 2.0) -> Callable[[Any, Any, Any], None]:
    """Values for `initialize` of `indrnn`: `u` from the paper's range for long memory,
    U(change^(-1/T), change^(1/T)), with which `T` steps change a state by at most this factor.

    Args:
        steps: `T`, the length of the sequences.
        change: the factor, more than 1.

    Raises:
        ValueError: if `steps` is less than 1, or `change` at most 1.
    """
    if steps < 1 or not change > 1:
        raise ValueError(f"long_memory takes steps >= 1 and change > 1, got {steps} and {change}")

    def initialize(u: Any, v: Any, p: Any) -> None:
        p.u.uniform_(change ** (-1 / steps), change ** (1 / steps))

    return initialize
