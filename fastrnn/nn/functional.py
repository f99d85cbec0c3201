"""Stateless recurrent layers: a stack of layers and directions, with one `ops.scan` per layer.

Every input that torch.nn's layers accept is converted to the layout of the operator, time-major or
packed, and the results to the layout of the caller. The exceptions are torch.nn's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import ops
from fastrnn.cells import Cell
from fastrnn.cells.noise import seeded
from fastrnn.kernels.operands import Operands, Weights, named, side_by_side
from fastrnn.nn.checks import (
    Check,
    States,
    check_device,
    check_lengths,
    check_reset_states,
    check_resets,
    check_sizes,
    check_states,
    different_dtypes,
    states_of,
    widths,
)

__all__ = ["rnn", "rnn_cell"]


def rnn(
    cell: Cell,
    input: Tensor | PackedSequence,
    weights: Sequence[Weights | Sequence[Tensor]],
    hx: States | None = None,
    *,
    bidirectional: bool = False,
    heads: int = 1,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | PackedSequence | None = None,
    reset_states: States | None = None,
    recompute: bool = False,
    return_states: bool = False,
    name: str = "rnn",
    check: Check | None = None,
    packed: Sequence[ops.Prepacked | None] = (),
) -> tuple[Any, ...]:
    """Run a stack of recurrent layers, `L` layers of `D` directions.

    Args:
        cell: the cell, with `G` gates and `S` states; `cell.noisy` to draw random numbers, as in
            training.
        input: [T, B, I]; [B, T, I] with `batch_first`; [T, I] unbatched; or a `PackedSequence`.
        weights: for every layer and direction `Weights`, or the list that `all_weights` of torch's
            layers holds, without parameters that have no rows, and with the cell's learned
            parameters at its end. With `heads`, one for every head of each, of H/heads units.
        hx: initial states [L*D, B, H], or [L*D, H] unbatched; state 0 is as wide as the
            projection. One tensor for a cell with one state, else a sequence of `S`. None for
            zeros.
        bidirectional: run a second direction from the end; outputs are concatenated.
        heads: number of independent recurrences over the same input; outputs and states are
            concatenated.
        batch_first: whether `input`, the output and `resets` have the batch first. States do not.
        dropout: probability of zeroing outputs between layers if `training`. It draws the same
            random numbers as torch.nn.
        training: whether to apply `dropout`.
        lengths: int [B], steps of each sequence of dense input, in any order, from 0 to T. Outputs
            past the end are zero, and the final states are those of the last valid step. Values
            are checked if they can be read without waiting for a device.
        resets: bool, whether an episode begins at a step: [T, B], [B, T] with `batch_first`, [T]
            unbatched, or packed like the input. No state crosses from the previous step to this
            one, in either direction.
        reset_states: the states in which these episodes begin, in the form of `hx`, with gradients;
            a batch of 1 stands for all sequences. None for zeros.
        recompute: save only the output of every layer for the backward pass, which recomputes the
            cells' values from it. It needs less memory and more time. The CUDA kernels recompute a
            chunk of steps at a time, the others a layer at a time.
        return_states: whether to return the states after every step, too. Such a call needs the
            memory of training, also without gradients.
        name: name of the layer in errors.
        check: called as `check(input, hx, batch_sizes, w_ih)` with the first of the weights, in
            place of the check of dtype and sizes against `weights`.
        packed: the prepacked weights of every layer, from `ops.pack`.

    Returns:
        The output, in the form of `input` with `D*H` features, and the final states, in the form
        of `hx`. With `return_states` also, for every layer, a tuple of its `S` states after every
        step, each in the form of the output. They have gradients. The first is the layer's output;
        the others have zeros past the end of a sequence, and `D*H` features even with a projection.

    Raises:
        ValueError: if `input` has the wrong number of dimensions or not the dtype of the weights,
            if `lengths`, `resets` or `reset_states` have a wrong shape or are out of range, or if
            `reset_states` come without `resets`.
        RuntimeError: if `input` or `hx` have wrong sizes, devices differ, or T = 0 without
            `lengths`.
        TypeError: if `lengths` or `resets` have a wrong type or dtype.

    It corresponds to torch.nn.RNN,
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """
    # A layer passes `Weights` already.
    every: Sequence[Weights] = weights  # type: ignore[assignment]
    if not weights or type(weights[0]) is not Weights:
        every = [named(cell, recurrence) for recurrence in weights]
    batch_sizes: Tensor | None = None
    order: Tensor | None = None
    restore: Tensor | None = None
    rank: int | None = None
    batched = True
    if isinstance(input, PackedSequence):
        x, batch_sizes, order, restore = input
    else:
        x = input
        if (rank := x.dim()) not in (2, 3) or x.layout is not torch.strided or x.is_nested:
            raise _not_dense(x, name)
        if rank == 2:
            batched = False
            x = x.unsqueeze(0 if batch_first else 1)

    states: Sequence[Tensor] = ()
    if hx is not None:
        states = states_of(cell, hx, rank, whole=batched and order is None)
        states = _canonical(states, order, batched)
        hx = states if len(cell.states) > 1 else states[0]
    if check is None:
        check_sizes(
            cell,
            x,
            hx,
            batch_sizes,
            every,
            bidirectional=bidirectional,
            heads=heads,
            batch_first=batch_first,
        )
    else:
        check(x, hx, batch_sizes, every[0].w_ih)
    check_device(x, every[0].w_ih, states)
    if states:
        check_states(states, x)

    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    if lengths is not None:
        if batch_sizes is not None:
            raise ValueError("lengths= is for dense input; a PackedSequence holds its own lengths")
        lengths = check_lengths(lengths, x, batched)
    elif batch_sizes is None and x.shape[0] == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN, got 0; "
            "pass lengths= to allow empty sequences"
        )
    if resets is not None:
        resets = check_resets(resets, x, batch_sizes, order, batch_first and batched)
    begins: Sequence[Tensor] = ()
    if reset_states is not None:
        if resets is None:
            raise ValueError("reset_states= is for resets=, which is missing")
        batch = _batch_size(x, batch_sizes, order)
        sizes = [(len(every) // heads, batch, n) for n in widths(cell, every[0], heads)]
        begins = check_reset_states(reset_states, sizes, x, batched)
        if order is not None:
            begins = [s.index_select(1, order) for s in begins]
    if not states and (batch_sizes is not None or (lengths is not None and x.shape[0] == 0)):
        states = _zeros(cell, x, every, heads, _batch_size(x, batch_sizes, order))

    every_step: list[tuple[Tensor, ...]] | None = [] if return_states else None
    y, final = _stack(
        cell,
        x,
        every,
        states if heads == 1 else [_split(s, heads) for s in states],
        begins if heads == 1 else [_split(s, heads) for s in begins],
        directions=2 if bidirectional else 1,
        heads=heads,
        dropout=dropout if training else 0.0,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        order=order,
        recompute=recompute,
        packed=packed,
        every_step=every_step,
    )

    if heads > 1:
        final = [_joined(s, heads) for s in final]
    if batch_sizes is not None and restore is not None:
        final = [s.index_select(1, restore) for s in final]
    last = _like_hx(final if batched else [s.squeeze(1) for s in final])
    outputs: list[Any] = [y] if every_step is None else [y, *itertools.chain(*every_step)]
    if batch_sizes is not None:
        outputs = [PackedSequence(y, batch_sizes, order, restore) for y in outputs]
    elif not batched:
        outputs = [y.squeeze(1) for y in outputs]
    elif batch_first:
        # torch.nn's LSTM returns a view here; its RNN and GRU, with one state, do not.
        if len(cell.states) == 1:
            outputs = [ops.transposed(y) for y in outputs]
        else:
            outputs = [y.transpose(0, 1) for y in outputs]
    if every_step is None:
        return outputs[0], last
    rest = iter(outputs[1:])
    return outputs[0], last, tuple(tuple(next(rest) for _ in layer) for layer in every_step)


def _not_dense(x: Tensor, name: str) -> Exception:
    """The error for an input that is not a dense tensor of two or three dimensions."""
    if x.dim() not in (2, 3):
        tensor = "tensor " if name == "RNN" else ""  # torch.nn's LSTM and GRU leave it out
        return ValueError(
            f"{name}: Expected input to be 2D or 3D, got {x.dim()}D {tensor}instead; "
            "input is [T, B, I], [B, T, I] with batch_first=True, or [T, I]"
        )
    return RuntimeError(
        f"{name}: expected a dense tensor, got "
        f"{'a nested tensor' if x.is_nested else x.layout}; pad the input "
        "(to_padded_tensor, to_dense) and pass lengths=, or pack it"
    )


def _canonical(states: Sequence[Tensor], order: Tensor | None, batched: bool) -> Sequence[Tensor]:
    """States with a batch dimension, in the order in which the input is packed."""
    if not batched:
        return [s.unsqueeze(1) for s in states]
    return states if order is None else [s.index_select(1, order) for s in states]


def _like_hx(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """States in the form of `hx`."""
    return states[0] if len(states) == 1 else tuple(states)


def rnn_cell(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    packed: ops.Prepacked | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Run one time step.

    Args:
        cell: the cell, with `G` gates and `S` states.
        input: [B, I], or [I] unbatched.
        states: `S` tensors [B, H], or [H] unbatched; none for zeros.
        weights: [G*H, I], [G*H, H], [G*H] and [G*H], without a projection.
        packed: the same weights, prepacked by `ops.pack`.
        dtype: that of `input`, if it is not the dtype of the weights, because they are rounded.

    Returns:
        `S` next states, shaped as `states`.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit together.
    """
    w_ih, w_hh, b_ih, b_hh, *_ = weights
    dtype = dtype or w_ih.dtype
    if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(
            f"{different_dtypes(input, w_ih.new_empty(0, dtype=dtype))}: input dtype "
            f"({input.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype})"
        )
    check_device(input, w_ih, states)
    biases: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    if b_ih is not None and b_hh is not None:
        biases = (b_ih,), (b_hh,)
    elif (b := b_hh if b_ih is None else b_ih) is None:
        biases = (), ()
    else:
        zero = b.new_zeros((w_hh if b_hh is None else w_ih).size(0))
        biases = (zero if b_ih is None else b_ih,), (zero if b_hh is None else b_hh,)
    batched = input.dim() == 2
    check_states(states, input)
    if states:
        states = [s if batched else s.unsqueeze(0) for s in states]
    x = input if batched else input.unsqueeze(0)
    y, after = ops.scan(
        cell, x, (w_ih,), (w_hh,), b_ih=biases[0], b_hh=biases[1], s0=states, packed=packed
    )
    out = (y, *after[1:])  # the first state is the output
    return out if batched else tuple(s.squeeze(0) for s in out)


def _stack(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    s0: Sequence[Tensor],
    begins: Sequence[Tensor],
    *,
    directions: int,
    heads: int,
    dropout: float = 0.0,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    order: Tensor | None,
    recompute: bool,
    packed: Sequence[ops.Prepacked | None],
    every_step: list[tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run the layers on canonical operands: `x` [T, B, I] or packed [R, I], and `S` states
    [L*D*heads, B, *] in `s0` and, perhaps, in `begins`. The states after every step are appended to
    `every_step`."""
    scans = directions * heads
    reverse = 0 if directions == 1 else (1 << heads) - 1 << heads  # the second half
    reverse -= (reverse >> 63) << 64  # as a signed 64-bit integer
    if len(weights) == scans:  # the common case of one layer
        noise = seeded(cell.draws, x, order) if cell.noise else None
        rows = batch_sizes, lengths, resets, noise
        operands = Operands(x, *side_by_side(weights), s0, begins, *rows, reverse)
        wanted = every_step is not None and len(cell.states) > 1
        y, last, steps = ops.run(
            cell, operands, packed[0] if packed else None, recompute=recompute, steps=wanted
        )
        if every_step is not None:
            # Not unbind: its views may not be changed in place.
            others = [] if steps is None else [steps.select(2, k) for k in range(steps.size(2))]
            width = others[0].shape[1:].numel() if others else 0
            every_step.append((y, *(s.reshape(*y.shape[:-1], width) for s in others)))
        return y, last
    finals = []
    for first in range(0, len(weights), scans):
        x, final = _stack(
            cell,
            F.dropout(x, dropout, True) if dropout and first else x,
            weights[first : first + scans],
            [h[first : first + scans] for h in s0],
            [h[first : first + scans] for h in begins],
            directions=directions,
            heads=heads,
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
            order=order,
            recompute=recompute,
            packed=packed[first // scans :],
            every_step=every_step,
        )
        finals.append(final)
    return x, [torch.cat(s) for s in zip(*finals, strict=True)]


def _split(state: Tensor, heads: int) -> Tensor:
    """[L*D, B, H] as [L*D*heads, B, H/heads]."""
    count, batch, width = state.shape
    apart = state.view(count, batch, heads, width // heads).transpose(1, 2)
    return apart.reshape(count * heads, batch, width // heads)


def _joined(state: Tensor, heads: int) -> Tensor:
    """The inverse of `_split`."""
    count, batch, width = state.shape
    together = state.view(count // heads, heads, batch, width).transpose(1, 2)
    return together.reshape(count // heads, batch, heads * width)


def _batch_size(x: Tensor, batch_sizes: Tensor | None, order: Tensor | None) -> int:
    if batch_sizes is None:
        return x.size(1)
    # The size of a permutation is the batch size; a compiler cannot read data.
    return int(batch_sizes[0]) if order is None else order.size(0)


def _zeros(
    cell: Cell, x: Tensor, weights: Sequence[Weights], heads: int, batch: int
) -> tuple[Tensor, ...]:
    count = len(weights) // heads
    return tuple(x.new_zeros(count, batch, n) for n in widths(cell, weights[0], heads))
