"""Stateless recurrent layers: layers and directions over one `ops.scan` per layer.

Everything that torch.nn's layers accept is brought here to the one shape the operator knows,
time-major or packed, and the answer back to the caller's. The exceptions are torch.nn's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import ops
from fastrnn.cells import Cell

__all__ = [
    "check_device",
    "check_dtype",
    "check_input",
    "check_states",
    "different_dtypes",
    "rnn",
    "rnn_cell",
]

States = Tensor | Sequence[Tensor]
Check = Callable[[Tensor, "States | None", "Tensor | None", Tensor], None]

# The names that torch's errors have for dtypes, where they differ from Python's.
_SCALAR_TYPES = {
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float16: "Half",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bfloat16: "BFloat16",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.bool: "Bool",
}


def rnn(
    cell: Cell,
    input: Tensor | PackedSequence,
    weights: Sequence[Sequence[Tensor]],
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
    packed: Sequence[ops.Packed | None] = (),
) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
    """Run a stack of recurrent layers, `L` layers of `D` directions.

    Args:
        cell: the cell, with `G` gates and `S` states.
        input: [T, B, I]; [B, T, I] with `batch_first`; [T, I] unbatched; or a `PackedSequence`.
        weights: for every layer and direction `[w_ih, w_hh, b_ih, b_hh, w_hr]`, the biases and
            the projection where there are such: what `all_weights` of torch's layers holds. With
            `heads`, such a list for every head of those, in turn, of H/heads units each.
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
        recompute: keep only the output of every layer for the way back, which computes the cells'
            values anew from it: less memory for more time. The CUDA kernels do so for a chunk of
            steps at a time, the others for a layer at a time.
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
    batch_sizes: Tensor | None = None
    order: Tensor | None = None
    restore: Tensor | None = None
    batched = True
    batch_dim = 0 if batch_first else 1
    if isinstance(input, PackedSequence):
        x, batch_sizes, order, restore = input
    else:
        x = input
        if x.dim() not in (2, 3):
            tensor = "tensor " if name == "RNN" else ""  # torch.nn's LSTM and GRU leave it out
            raise ValueError(
                f"{name}: Expected input to be 2D or 3D, got {x.dim()}D {tensor}instead; "
                "input is [T, B, I], [B, T, I] with batch_first=True, or [T, I]"
            )
        if x.layout is not torch.strided or x.is_nested:
            raise RuntimeError(
                f"{name}: expected a dense tensor, got "
                f"{'a nested tensor' if x.is_nested else x.layout}; pad the input "
                "(to_padded_tensor, to_dense) and pass lengths=, or pack it"
            )
        if x.dim() == 2:
            batched = False
            x = x.unsqueeze(batch_dim)

    given = hx
    states: tuple[Tensor, ...] = ()
    if hx is not None:
        rank = None if batch_sizes is not None else 3 if batched else 2
        states = _states(cell, hx, rank, whole=batched and order is None)
        if not batched:
            states = tuple(s.unsqueeze(1) for s in states)
        if order is not None:
            states = tuple(s.index_select(1, order) for s in states)
        given = states if len(cell.states) > 1 else states[0]
    if check is None:
        _check_sizes(cell, x, given, batch_sizes, weights, bidirectional, heads, batch_first)
    else:
        check(x, given, batch_sizes, weights[0][0])
    check_device(x, weights[0][0], states)
    check_states(states, x)

    if batch_sizes is None:
        if batch_first:
            x = x.transpose(0, 1)
        if lengths is not None:
            lengths = _check_lengths(lengths, x, batched)
        elif x.size(0) == 0:
            raise RuntimeError(
                "Expected sequence length to be larger than 0 in RNN, got 0; "
                "pass lengths= to allow empty sequences"
            )
    elif lengths is not None:
        raise ValueError("lengths= is for dense input; a PackedSequence holds its own lengths")
    if resets is not None:
        resets = _check_resets(resets, x, batch_sizes, order, batch_first and batched)
    if not states and (batch_sizes is not None or (lengths is not None and x.size(0) == 0)):
        states = _zeros(cell, x, weights, heads, _batch_size(x, batch_sizes, order))

    if heads > 1:
        states = tuple(_split(s, heads) for s in states)
    y, final = _stack(
        cell,
        x,
        weights,
        states,
        2 if bidirectional else 1,
        heads,
        dropout if training else 0.0,
        batch_sizes,
        lengths,
        resets,
        recompute,
        packed,
    )

    if heads > 1:
        final = [_joined(s, heads) for s in final]
    if restore is not None:
        final = [s.index_select(1, restore) for s in final]
    if not batched:
        final = [s.squeeze(1) for s in final]
    last = final[0] if len(final) == 1 else tuple(final)
    if batch_sizes is not None:
        return PackedSequence(y, batch_sizes, order, restore), last
    if not batched:
        return (y.transpose(0, 1) if batch_first else y).squeeze(batch_dim), last
    if batch_first:
        # A view of one state's output torch.nn does not give, of several it does.
        y = ops.transposed(y) if len(cell.states) == 1 else y.transpose(0, 1)
    return y, last


def rnn_cell(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    packed: ops.Packed | None = None,
) -> tuple[Tensor, ...]:
    """One time step.

    Args:
        cell: the cell, with `G` gates and `S` states.
        input: [B, I], or [I] unbatched.
        states: `S` tensors [B, H], or [H] unbatched; none for zeros.
        w_ih, w_hh, b_ih, b_hh: [G*H, I], [G*H, H], [G*H] and [G*H]; biases may be None.
        packed: the same by `ops.pack`.

    Returns:
        `S` next states, shaped as `states`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
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
    weights: Sequence[Sequence[Tensor]],
    s0: Sequence[Tensor],
    directions: int,
    heads: int,
    dropout: float,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    recompute: bool,
    packed: Sequence[ops.Packed | None],
) -> tuple[Tensor, Sequence[Tensor]]:
    """Layers on canonical operands: `x` [T, B, I] or packed [R, I], `s0` `S` times
    [L*D*heads, B, *]."""
    scans = directions * heads
    last = len(weights) - scans
    reverse = 0 if directions == 1 else (1 << heads) - 1 << heads  # the second half
    reverse -= (reverse >> 63) << 64  # as a signed number of 64 bits
    finals = []
    for first in range(0, len(weights), scans):
        w_ih, w_hh, *rest = zip(*weights[first : first + scans], strict=True)
        b_ih, b_hh = rest[:2] if len(rest) > 1 else ((), ())
        w_hr = rest[-1] if len(rest) & 1 else ()
        s = s0 if last == 0 else [h[first : first + scans] for h in s0]
        x, final = ops.scan(
            cell,
            x,
            w_ih,
            w_hh,
            b_ih=b_ih,
            b_hh=b_hh,
            w_hr=w_hr,
            s0=s,
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
            reverse=reverse,
            packed=packed[first // scans] if packed else None,
            recompute=recompute,
        )
        finals.append(final)
        if dropout and first < last:
            x = F.dropout(x, dropout, True)
    if len(finals) == 1:
        return x, finals[0]
    return x, [torch.cat(s) for s in zip(*finals, strict=True)]


def check_dtype(input: Tensor, weight: Tensor) -> None:
    """The input must have the dtype of the weights; `ValueError` otherwise, as torch.nn.

    Under autocast the operator casts.
    """
    if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )


def check_device(input: Tensor, weight: Tensor, states: Sequence[Tensor] = ()) -> None:
    """The states and the weights must be where the input is; `RuntimeError` otherwise, as torch.nn.

    It looks at the states first.
    """
    device = input.device
    for s in states:
        if s.device != device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{device} and hidden tensor at {s.device}. Move hx: hx.to({str(device)!r})"
            )
    if device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{device} and parameter tensor at {weight.device}. "
            f"Move input: input.to({str(weight.device)!r}), or the model: "
            + (
                "model.to_empty(device=...), then load its weights"
                if weight.device.type == "meta"
                else f"model.to({str(device)!r})"
            )
        )


def check_input(input: Tensor, input_size: int, batch_sizes: Tensor | None) -> None:
    """torch.nn's checks of dimensions and features; `RuntimeError`."""
    expected = 3 if batch_sizes is None else 2
    if input.dim() != expected:
        raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
    if input.size(-1) != input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.size(-1)}"
        )


def check_states(states: Sequence[Tensor], input: Tensor) -> None:
    """Initial states must have the dtype of the input; `RuntimeError` otherwise."""
    for s in states:
        if s.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"{different_dtypes(s, input)}: hx dtype ({s.dtype}) does not match input dtype "
                f"({input.dtype}). Convert hx: hx.to({input.dtype})"
            )


def different_dtypes(one: Tensor, other: Tensor) -> str:
    """What a matrix product of torch says of operands whose dtypes differ."""
    names = (_SCALAR_TYPES.get(t.dtype, str(t.dtype)) for t in (one, other))
    return "mat1 and mat2 must have the same dtype, but got {} and {}".format(*names)


def _states(cell: Cell, hx: States, rank: int | None, whole: bool) -> tuple[Tensor, ...]:
    """The states of `hx`, of `rank` dimensions; None for packed input, where torch.nn looks at
    sizes only.

    It takes the first two of more states, or the halves of one tensor, unless it passes on `hx`
    as a whole.
    """
    kind = "batched" if rank == 3 else "unbatched"
    count = len(cell.states)
    if count == 1:
        state: Tensor = hx  # type: ignore[assignment]
        if rank is not None and state.dim() != rank:
            raise RuntimeError(
                f"For {kind} {rank}-D input, hx should also be {rank}-D "
                f"but got {state.dim()}-D tensor"
            )
        return (state,)
    if rank is not None and any(hx[k].dim() != rank for k in range(count)):
        what = "hx and cx" if count == 2 else f"the {count} states of hx"
        dims = ", ".join(f"{hx[k].dim()}-D" for k in range(count))
        raise RuntimeError(
            f"For {kind} {rank}-D input, {what} should also be {rank}-D but got ({dims}) tensors"
        )
    if whole and isinstance(hx, Tensor):
        raise TypeError(
            f"{cell.name}() received an invalid combination of arguments: hx must be a tuple of "
            f"{count} Tensors, not a Tensor; pass hx=({', '.join(cell.states)})"
        )
    if whole and len(hx) != count:
        raise RuntimeError(
            f"{cell.name} expects {'two' if count == 2 else count} hidden states "
            f"({', '.join(cell.states)}), got {len(hx)} in hx"
        )
    return tuple(hx[k] for k in range(count))


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


def _widths(cell: Cell, weight: Sequence[Tensor], heads: int) -> list[int]:
    """Sizes of the states: what the recurrent weight takes for the first, `H` for the others."""
    hidden = weight[1].size(0) // len(cell.gates) * heads
    return [weight[1].size(1) * heads] + [hidden] * (len(cell.states) - 1)


def _batch_size(x: Tensor, batch_sizes: Tensor | None, order: Tensor | None) -> int:
    if batch_sizes is None:
        return x.size(1)
    # A permutation tells the batch size without reading data, which a compiler could not.
    return int(batch_sizes[0]) if order is None else order.size(0)


def _zeros(
    cell: Cell, x: Tensor, weights: Sequence[Sequence[Tensor]], heads: int, batch: int
) -> tuple[Tensor, ...]:
    count = len(weights) // heads
    return tuple(x.new_zeros(count, batch, n) for n in _widths(cell, weights[0], heads))


def _check_sizes(
    cell: Cell,
    input: Tensor,
    hx: States | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    bidirectional: bool,
    heads: int,
    batch_first: bool,
) -> None:
    if not weights or len(weights) % (heads * (2 if bidirectional else 1)):
        raise ValueError(
            f"weights must hold one list for every layer and direction, got {len(weights)} "
            f"with bidirectional={bidirectional}"
            + (f", and for every one of heads={heads}" if heads > 1 else "")
        )
    check_dtype(input, weights[0][0])
    check_input(input, weights[0][0].size(1), batch_sizes)
    if hx is None:
        return
    batch = input.size(0 if batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
    states = [hx] if isinstance(hx, Tensor) else hx
    for s, width in zip(states, _widths(cell, weights[0], heads), strict=True):
        expected = (len(weights) // heads, batch, width)
        if s.size() != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {list(s.size())}")


def _check_lengths(lengths: Tensor | Sequence[int], x: Tensor, batched: bool) -> Tensor:
    """`lengths` as int64 [B] beside `x` [T, B, I]."""
    steps, batch = x.size(0), x.size(1)
    try:
        length = torch.as_tensor(lengths, device=None if isinstance(lengths, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"lengths must be a tensor or sequence of integers, one for each of the {batch} "
            f"sequences of the batch: {error}"
        ) from error
    if isinstance(lengths, Tensor) or length.numel():  # an empty list makes a float tensor
        integral = not (length.is_floating_point() or length.is_complex())
        if not integral or length.dtype == torch.bool:
            raise TypeError(
                f"lengths must be integers, got dtype {length.dtype}; convert with "
                f"{'lengths.long()' if isinstance(lengths, Tensor) else 'int(...)'}"
            )
    if length.dim() == 0 and not batched:
        length = length.unsqueeze(0)
    if length.dim() != 1 or length.size(0) != batch:
        raise ValueError(
            f"lengths must have one entry for each of the {batch} sequences of the batch, "
            f"got shape {tuple(length.shape)}"
        )
    if _readable(length) and batch:
        low, high = (int(v) for v in torch.aminmax(length))
        if low < 0 or high > steps:
            raise ValueError(
                f"lengths must be between 0 and the {steps} steps of the input, "
                f"got values from {low} to {high}"
            )
    return length.to(device=x.device, dtype=torch.int64)


def _check_resets(
    resets: Tensor | PackedSequence,
    x: Tensor,
    batch_sizes: Tensor | None,
    order: Tensor | None,
    swap: bool,
) -> Tensor:
    """`resets` in the layout of `x` without its features."""
    if isinstance(resets, PackedSequence):
        if batch_sizes is None:
            raise ValueError("resets is a PackedSequence, but the input is not")
        same = resets.batch_sizes is batch_sizes
        if not same and not torch.equal(resets.batch_sizes, batch_sizes):
            raise ValueError("resets must be packed with the same lengths as the input")
        theirs = resets.sorted_indices
        if theirs is not order and theirs is not None and order is not None:
            readable = _readable(theirs) and _readable(order)
            if readable and not torch.equal(theirs, order):
                raise ValueError(
                    "resets must be packed in the order of the input: sorted_indices differ; "
                    "pack both with the same lengths, or use "
                    "input._replace(data=...) with flags in the input's order"
                )
        resets = resets.data
    elif not isinstance(resets, Tensor):
        raise TypeError(
            f"resets must be a bool tensor, got {type(resets).__name__}; "
            "convert with torch.tensor(resets, dtype=torch.bool)"
        )
    if resets.dtype != torch.bool:
        raise TypeError(f"resets must be bool, got {resets.dtype}; convert with resets.bool()")
    if batch_sizes is None and resets.dim() == 1 and x.size(1) == 1:
        resets = resets.unsqueeze(1)
    elif swap and resets.dim() == 2:
        resets = resets.transpose(0, 1)
    if resets.shape != x.shape[:-1]:
        raise ValueError(
            "resets must have the shape of the input without its last dimension, "
            f"{_caller(x.shape[:-1], swap)}, got {_caller(resets.shape, swap)}"
        )
    return resets.to(x.device)


def _caller(shape: torch.Size, swap: bool) -> tuple[int, ...]:
    return tuple(reversed(shape)) if swap else tuple(shape)


def _readable(t: Tensor) -> bool:
    """Whether values may be looked at: no compiler, transform or tracer, no device to wait for."""
    return (
        not torch.compiler.is_compiling()
        and type(t) is Tensor
        and t.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )
