"""The operands of a scan, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Needs", "Operands"]


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
