"""What travels together: the operands of a scan, the weights of a recurrence, and who needs a
gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Needs", "Operands", "Weights", "heads_of", "named", "side_by_side"]


class Operands(NamedTuple):
    """What a scan is given besides its cell, in the order of the operator; `reference.scan`
    documents each."""

    x: Tensor
    w_ih: Sequence[Tensor]
    w_hh: Sequence[Tensor]
    b_ih: Sequence[Tensor] = ()
    b_hh: Sequence[Tensor] = ()
    w_hr: Sequence[Tensor] = ()
    s0: Sequence[Tensor] = ()
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: int = 0


class Needs(NamedTuple):
    """Which operands want a gradient, in the order of the operator."""

    x: bool
    w_ih: bool
    w_hh: bool
    biases: bool
    w_hr: bool
    s0: bool

    def groups(self) -> tuple[bool, ...]:
        """One for each of x, w_ih, w_hh, b_ih, b_hh, w_hr and s0, in this order."""
        return (self.x, self.w_ih, self.w_hh, self.biases, self.biases, self.w_hr, self.s0)


class Weights(NamedTuple):
    """The weights of one recurrence; None for what it does not have."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def named(weights: Weights | Sequence[Tensor]) -> Weights:
    """The weights of one recurrence from what `all_weights` of torch's layers holds for it, which
    has no place for what there is not."""
    if type(weights) is Weights:
        return weights
    if len(weights) % 2 == 0:  # without a projection, which stands last
        return Weights(*weights)
    w_ih, w_hh, *biases, w_hr = weights
    b_ih, b_hh = biases or (None, None)
    return Weights(w_ih, w_hh, b_ih, b_hh, w_hr)


def heads_of(weights: Weights) -> list[Weights]:
    """The weights of every head, from those of all of them, [heads, *]."""
    present = [(name, each) for name, each in weights._asdict().items() if each is not None]
    names = [name for name, _ in present]
    heads = zip(*(each for _, each in present), strict=True)
    return [Weights(**dict(zip(names, head, strict=True))) for head in heads]


def side_by_side(weights: Sequence[Weights]) -> Sequence[Sequence[Tensor]]:
    """The w_ih, w_hh, b_ih, b_hh and w_hr of recurrences that run together, as `Operands` has
    them."""
    # All are five long; to have zip look takes as long as the rest.
    w_ih, w_hh, b_ih, b_hh, w_hr = zip(*weights)  # noqa: B905
    return (
        w_ih,
        w_hh,
        () if b_ih[0] is None else b_ih,
        () if b_hh[0] is None else b_hh,
        () if w_hr[0] is None else w_hr,
    )
