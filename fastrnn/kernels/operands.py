"""Values that are passed together: the operands of a scan, the weights of a recurrence, and which
operands need a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastrnn.cells import Cell

__all__ = ["Needs", "Operands", "Weights", "heads_of", "named", "side_by_side"]

_L = Sequence[Tensor]


class Operands(NamedTuple):
    """The arguments of a scan besides its cell, in the order of the operator.

    Attributes:
        x: input, [T, B, I] dense, [R, I] packed (with `batch_sizes`), or [B, I] for one step of
            one recurrence, whose states then are [B, *].
        w_ih, w_hh: `P` weights each, [G*H, I] and [G*H, Q]; `Q` is the projection size if there
            is one, else `H`. `G` counts the gates that have rows in the matrix; without any, it is
            [0, Q].
        b_ih, b_hh: `P` biases each, with a number for each row of `w_ih` or of `w_hh`, or none.
        w_hr: `P` projections of state 0, [Q, H], or none.
        params: learned parameters, [H] or [1], in the cell's order; all of recurrence 0, then all
            of recurrence 1 and so on.
        s0: `S` initial states, [P, B, Q] for state 0 and [P, B, H] for the others; none for zeros
            (not with `batch_sizes`).
        reset_states: the states in which episodes begin, as `s0`; none for zeros.
        batch_sizes: int64 [T] on the CPU, non-increasing: sequences alive at each step of packed
            input.
        lengths: int64 [B], for dense input: steps of each sequence, in any order, zero allowed.
            Output past the end is zero, and the final state is that of the last valid step.
        resets: bool, in `x`'s shape without the last dimension: whether an episode begins at this
            row. No state crosses from the previous step to it, in either direction: the step reads
            `reset_states`.
        noise: int64, if the cell draws random numbers: a seed, the probability of each draw times
            2^32 and, for packed input, the caller's index of each sequence. It is on the device of
            `x`; see `cells.noise.seeded`.
        reverse: if bit `p` is set, recurrence `p` runs backward in time.
    """

    x: Tensor
    w_ih: Sequence[Tensor]
    w_hh: Sequence[Tensor]
    b_ih: Sequence[Tensor] = ()
    b_hh: Sequence[Tensor] = ()
    w_hr: Sequence[Tensor] = ()
    params: Sequence[Tensor] = ()
    s0: Sequence[Tensor] = ()
    reset_states: Sequence[Tensor] = ()
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    noise: Tensor | None = None
    reverse: int = 0

    def lists(self) -> tuple[_L, _L, _L, _L, _L, _L, _L, _L]:
        """w_ih, w_hh, b_ih, b_hh, w_hr, params, s0 and reset_states."""
        return self[1:9]

    def params_of(self, recurrence: int) -> Sequence[Tensor]:
        """The learned parameters of one recurrence."""
        count = len(self.params) // len(self.w_hh)
        return self.params[recurrence * count : (recurrence + 1) * count]


class Needs(NamedTuple):
    """Which operands need a gradient, in the order of the operator."""

    x: bool
    w_ih: bool
    w_hh: bool
    biases: bool
    w_hr: bool
    params: bool
    s0: bool
    reset_states: bool

    def groups(self) -> tuple[bool, ...]:
        """One flag for each of x and the `lists()` of `Operands`, in this order."""
        biases = self.biases, self.biases
        learned = self.w_hr, self.params
        return (self.x, self.w_ih, self.w_hh, *biases, *learned, self.s0, self.reset_states)


class Weights(NamedTuple):
    """The weights of one recurrence; None for a weight that it lacks. `params` are the cell's
    learned parameters. If the cell has no recurrent rows, `w_hh` is empty, [0, H], and so is
    `b_hh` if there is `b_ih`."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    params: tuple[Tensor, ...] = ()

    def flat(self) -> list[Tensor | None]:
        """All of them in one list: the first five, then the parameters."""
        matrices, params = self[:5], self.params
        return [*matrices, *params]

    def present(self) -> list[Tensor]:
        """Those that there are, in the same order."""
        return [weight for weight in self.flat() if weight is not None]


def named(cell: Cell, weights: Weights | Sequence[Tensor], heads: int = 1) -> Weights:
    """The weights of one recurrence from its list in `all_weights` of torch's layers, which leaves
    missing weights out; the cell's parameters come last. With `heads`, all weights have a first
    dimension for them."""
    if type(weights) is Weights:
        return weights
    given: list[Any] = list(weights)
    count = len(given) - len(cell.params)
    if not cell.recurrent:  # neither w_hh nor b_hh
        w_ih, *others = given[:count]
        over = w_ih.shape[: int(heads > 1)]
        # A projection is a matrix, and comes last.
        w_hr = others.pop() if others and others[-1].dim() > len(over) + 1 else None
        width = w_ih.size(len(over)) // len(cell.inputs) if w_hr is None else w_hr.size(len(over))
        w_hh = w_ih.new_empty(*over, 0, width)
        b_ih, b_hh = (others[0], others[0].new_empty(*over, 0)) if others else (None, None)
        return Weights(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(given[count:]))
    w_ih, w_hh, *others = given[:count]
    # A projection comes last, after both biases or none.
    w_hr = others.pop() if count % 2 else None
    b_ih, b_hh = others or (None, None)
    return Weights(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(given[count:]))


def heads_of(weights: Weights) -> list[Weights]:
    """The weights of each head, from weights of shape [heads, *]."""
    names = [
        name
        for name, weight in zip(Weights._fields[:5], weights, strict=False)
        if weight is not None
    ]
    heads = []
    for head in zip(*weights.present(), strict=True):
        own = dict(zip(names, head, strict=False))
        heads.append(Weights(**own, params=head[len(names) :]))
    return heads


def side_by_side(weights: Sequence[Weights]) -> tuple[_L, _L, _L, _L, _L, _L]:
    """The lists w_ih, w_hh, b_ih, b_hh, w_hr and params of `Operands`, from the weights of
    recurrences."""
    # All are six long; zip's check would take as long as the rest of this function.
    w_ih, w_hh, b_ih, b_hh, w_hr, params = zip(*weights)  # noqa: B905
    return (
        w_ih,
        w_hh,
        () if b_ih[0] is None else b_ih,
        () if b_hh[0] is None else b_hh,
        () if w_hr[0] is None else w_hr,
        [tensor for own in params for tensor in own] if params[0] else (),
    )
