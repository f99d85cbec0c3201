"""Stateless recurrent layers: layers and directions over one `ops.scan` per layer.

Everything that torch.nn's layers accept is brought here to the one shape the operator knows,
time-major or packed, and the answer back to the caller's. The exceptions are torch.nn's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import ops
from fastrnn.cells import Cell
from fastrnn.kernels.operands import Operands, Weights, named, side_by_side
from fastrnn.nn.checks import (
    Check,
    States,
    check_device,
    check_lengths,
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
    recompute: bool = False,
    name: str = "rnn",
    check: Check | None = None,
    packed: Sequence[ops.Prepacked | None] = (),
) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
    """Run a stack of recurrent layers, `L` layers of `D` directions.

    Args:
        cell: the cell, with `G` gates and `S` states.
        input: [T, B, I]; [B, T, I] with `batch_first`; [T, I] unbatched; or a `PackedSequence`.
        weights: for every layer and direction `Weights`, or what `all_weights` of torch's layers
            holds. With `heads`, such for every head of those, in turn, of H/heads units each.
        hx: initial states, [L*D, B, H] ([L*D, H] unbatched; state 0 as wide as the projection);
            one tensor for a cell of one state, a sequence of `S` otherwise. None for zeros.
        bidirectional: run a second direction from the end; outputs are concatenated.
        heads: independent recurrences side by side over the same input; outputs and states are
            concatenated.
        batch_first: whether `input`, the output and `resets` have the batch first. States do not.
        dropout: probability of zeroing outputs between layers, when `training`. Draws the same
            random numbers as torch.nn does.
        training: whether to apply `dropout`.
        lengths: steps of each row [B] of dense input, in any order, from 0 to T. Outputs past the
            end are zero, and the final states are those of the last valid step. Values are
            checked where they can be read without waiting for a device.
        resets: bool, one per step: [T, B], [B, T] with `batch_first`, [T] unbatched; packed as
            the input is. An episode begins there: no state crosses from the step before, in
            either direction.
        recompute: keep only the output of every layer for the backward pass, which computes the
            cells' values anew from it: less memory for more time. The CUDA kernels do so for a
            chunk of steps at a time, the others for a layer at a time.
        name: how the layer calls itself in errors.
        check: `check(input, hx, batch_sizes, w_ih)`, with the first of the weights, in place of
            the check of dtype and sizes against `weights`.
        packed: the weights of every layer once more, by `ops.pack`.

    Returns:
        The output, in the form of `input` with `D*H` features, and the final states in that of
        `hx`.

    Raises:
        ValueError: wrong number of dimensions of `input`; dtype other than that of the weights;
            `lengths` or `resets` of wrong shape or out of range.
        RuntimeError: wrong sizes of `input` or `hx`; devices that differ; T = 0 without `lengths`.
        TypeError: `lengths` or `resets` of a wrong type or dtype.

    Like torch.nn.RNN, https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """
    every: Sequence[Weights] = weights  # type: ignore[assignment]  # from a layer they have names
    if not weights or type(weights[0]) is not Weights:
        every = [named(each) for each in weights]
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
    if not states and (batch_sizes is not None or (lengths is not None and x.shape[0] == 0)):
        states = _zeros(cell, x, every, heads, _batch_size(x, batch_sizes, order))

    y, final = _stack(
        cell,
        x,
        every,
        states if heads == 1 else [_split(s, heads) for s in states],
        directions=2 if bidirectional else 1,
        heads=heads,
        dropout=dropout if training else 0.0,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        recompute=recompute,
        packed=packed,
    )

    if heads > 1:
        final = [_joined(s, heads) for s in final]
    if batch_sizes is not None:
        if restore is not None:
            final = [s.index_select(1, restore) for s in final]
        return PackedSequence(y, batch_sizes, order, restore), _given(final)
    if not batched:
        y = (y.transpose(0, 1) if batch_first else y).squeeze(0 if batch_first else 1)
        return y, _given([s.squeeze(1) for s in final])
    if batch_first:
        # A view of one state's output torch.nn does not give, of several it does.
        y = ops.transposed(y) if len(cell.states) == 1 else y.transpose(0, 1)
    return y, _given(final)


def _not_dense(x: Tensor, name: str) -> Exception:
    """What to raise for an input that is no dense tensor of two or three dimensions."""
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
    """States with a batch, in the order in which the input is packed."""
    if not batched:
        return [s.unsqueeze(1) for s in states]
    return states if order is None else [s.index_select(1, order) for s in states]


def _given(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """States in the form of `hx`."""
    return states[0] if len(states) == 1 else tuple(states)


def rnn_cell(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    packed: ops.Prepacked | None = None,
) -> tuple[Tensor, ...]:
    """One time step.

    Args:
        cell: the cell, with `G` gates and `S` states.
        input: [B, I], or [I] unbatched.
        states: `S` tensors [B, H], or [H] unbatched; none for zeros.
        weights: [G*H, I], [G*H, H], [G*H] and [G*H]; without a projection.
        packed: the same by `ops.pack`.

    Returns:
        `S` next states, shaped as `states`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    w_ih, w_hh, b_ih, b_hh, _ = weights
    if input.dtype != w_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(
            f"{different_dtypes(input, w_ih)}: input dtype ({input.dtype}) does not match weight "
            f"dtype ({w_ih.dtype}). Convert input: input.to({w_ih.dtype})"
        )
    check_device(input, w_ih, states)
    biases: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    if b_ih is not None and b_hh is not None:
        biases = (b_ih,), (b_hh,)
    elif (b := b_hh if b_ih is None else b_ih) is None:
        biases = (), ()
    else:
        zero = torch.zeros_like(b)
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
    *,
    directions: int,
    heads: int,
    dropout: float = 0.0,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    recompute: bool,
    packed: Sequence[ops.Prepacked | None],
) -> tuple[Tensor, Sequence[Tensor]]:
    """Layers on canonical operands: `x` [T, B, I] or packed [R, I], `s0` `S` times
    [L*D*heads, B, *]."""
    scans = directions * heads
    reverse = 0 if directions == 1 else (1 << heads) - 1 << heads  # the second half
    reverse -= (reverse >> 63) << 64  # as a signed number of 64 bits
    if len(weights) == scans:  # one layer, as most have
        w_ih, w_hh, b_ih, b_hh, w_hr = side_by_side(weights)
        operands = Operands(
            x, w_ih, w_hh, b_ih, b_hh, w_hr, s0, batch_sizes, lengths, resets, reverse
        )
        return ops.run(cell, operands, packed[0] if packed else None, recompute=recompute)
    finals = []
    for first in range(0, len(weights), scans):
        x, final = _stack(
            cell,
            F.dropout(x, dropout, True) if dropout and first else x,
            weights[first : first + scans],
            [h[first : first + scans] for h in s0],
            directions=directions,
            heads=heads,
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
            recompute=recompute,
            packed=packed[first // scans :],
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
    # A permutation tells the batch size without reading data, which a compiler could not.
    return int(batch_sizes[0]) if order is None else order.size(0)


def _zeros(
    cell: Cell, x: Tensor, weights: Sequence[Weights], heads: int, batch: int
) -> tuple[Tensor, ...]:
    count = len(weights) // heads
    return tuple(x.new_zeros(count, batch, n) for n in widths(cell, weights[0], heads))
