"""Values that are passed together: the operands of a scan, the weights of a recurrence, and which
operands need a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Needs", "Operands", "Weights", "heads_of", "named", "side_by_side"]


class Operands(NamedTuple):
    """The arguments of a scan besides its cell, in the order of the operator.

    Attributes:
        x: input, [T, B, I] dense, [R, I] packed (with `batch_sizes`), or [B, I] for one step of
            one recurrence, whose states then are [B, *].
        w_ih, w_hh: `P` weights each, [G*H, I] and [G*H, Q]; `Q` is the projection size if there
            is one, else `H`.
        b_ih, b_hh: `P` biases each, [G*H], or none.
        w_hr: `P` projections of state 0, [Q, H], or none.
        s0: `S` initial states, [P, B, Q] for state 0 and [P, B, H] for the others; none for zeros
            (not with `batch_sizes`).
        batch_sizes: int64 [T] on the CPU, non-increasing: sequences alive at each step of packed
            input.
        lengths: int64 [B], for dense input: steps of each sequence, in any order, zero allowed.
            Output past the end is zero, and the final state is that of the last valid step.
        resets: bool, in `x`'s shape without the last dimension: whether an episode begins at this
            row. No state crosses from the previous step to it, in either direction.
        reverse: if bit `p` is set, recurrence `p` runs backward in time.
    """

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
    """Which operands need a gradient, in the order of the operator."""

    x: bool
    w_ih: bool
    w_hh: bool
    biases: bool
    w_hr: bool
    s0: bool

    def groups(self) -> tuple[bool, ...]:
        """One flag for each of x, w_ih, w_hh, b_ih, b_hh, w_hr and s0, in this order."""
        return (self.x, self.w_ih, self.w_hh, self.biases, self.biases, self.w_hr, self.s0)


class Weights(NamedTuple):
    """The weights of one recurrence; None for a weight that it lacks."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def named(weights: Weights | Sequence[Tensor]) -> Weights:
    """The weights of one recurrence from its list in `all_weights` of torch's layers, which leaves
    missing weights out."""
    if type(weights) is Weights:
        return weights
    if len(weights) % 2 == 0:  # there is no projection, which would come last
        return Weights(*weights)
    w_ih, w_hh, *biases, w_hr = weights
    b_ih, b_hh = biases or (None, None)
    return Weights(w_ih, w_hh, b_ih, b_hh, w_hr)


def heads_of(weights: Weights) -> list[Weights]:
    """The weights of each head, from weights of shape [heads, *]."""
    present = [(name, weight) for name, weight in weights._asdict().items() if weight is not None]
    names = [name for name, _ in present]
    heads = zip(*(weight for _, weight in present), strict=True)
    return [Weights(**dict(zip(names, head, strict=True))) for head in heads]


def side_by_side(weights: Sequence[Weights]) -> Sequence[Sequence[Tensor]]:
    """The lists w_ih, w_hh, b_ih, b_hh and w_hr of `Operands`, from the weights of recurrences."""
    # All are five long; zip's check would take as long as the rest of this function.
    w_ih, w_hh, b_ih, b_hh, w_hr = zip(*weights)  # noqa: B905
    return (
        w_ih,
        w_hh,
        () if b_ih[0] is None else b_ih,
        () if b_hh[0] is None else b_hh,
        () if w_hr[0] is None else w_hr,
    )
