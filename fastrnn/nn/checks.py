"""The checks of layers: all checks of torch.nn's layers, in their order and with their words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.cells import Cell
from fastrnn.cells.arguments import Gates, Params, Projection
from fastrnn.extension import _C
from fastrnn.kernels.operands import Weights

__all__ = [
    "Check",
    "States",
    "check_arguments",
    "check_device",
    "check_dtype",
    "check_heads",
    "check_input",
    "check_lengths",
    "check_projected",
    "check_reset_states",
    "check_resets",
    "check_sizes",
    "check_states",
    "different_dtypes",
    "refuse_unknown",
    "states_of",
    "widths",
]

MOST_RECURRENCES = _C.most_recurrences  # in one call of the operator

States = Tensor | Sequence[Tensor]
Check = Callable[[Tensor, "States | None", "Tensor | None", Tensor], None]

# The names of dtypes in torch's errors.
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


def check_dtype(input: Tensor, weight: Tensor) -> None:
    """Raise torch.nn's `ValueError` if the input does not have the dtype of the weights. Under
    autocast any dtype is valid, because the operator casts."""
    if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )


def check_device(input: Tensor, weight: Tensor, states: Sequence[Tensor] = ()) -> None:
    """Raise torch.nn's `RuntimeError` if the states, or then the weights, are not on the input's
    device."""
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
    """Raise torch.nn's `RuntimeError` if the input has wrong dimensions or features."""
    shape = input.shape  # a call of size() would take longer
    expected = 3 if batch_sizes is None else 2
    if len(shape) != expected:
        raise RuntimeError(f"input must have {expected} dimensions, got {len(shape)}")
    if shape[-1] != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {input_size}, got {shape[-1]}"
        )


def check_states(states: Sequence[Tensor], input: Tensor) -> None:
    """Raise `RuntimeError` if the initial states do not have the dtype of the input."""
    for s in states:
        if s.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"{different_dtypes(s, input)}: hx dtype ({s.dtype}) does not match input dtype "
                f"({input.dtype}). Convert hx: hx.to({input.dtype})"
            )


def different_dtypes(one: Tensor, other: Tensor) -> str:
    """torch's message for a matrix product of operands whose dtypes differ."""
    names = (_SCALAR_TYPES.get(t.dtype, str(t.dtype)) for t in (one, other))
    return "mat1 and mat2 must have the same dtype, but got {} and {}".format(*names)


def states_of(cell: Cell, hx: States, rank: int | None, whole: bool) -> tuple[Tensor, ...]:
    """The states in `hx`, checked as in torch.nn.

    Args:
        rank: dimensions that each state must have; None for packed input, whose states torch.nn
            checks by size only.
        whole: whether torch.nn would pass on `hx` itself, so that a wrong number of states is an
            error. Otherwise it indexes `hx`: it takes the first of too many states, or the entries
            of one tensor.
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


def widths(cell: Cell, weight: Weights, heads: int) -> list[int]:
    """Widths of the states: the columns of the recurrent weight for the first, else `H`."""
    hidden = cell.hidden_size(weight.w_ih) * heads
    return [weight.w_hh.size(1) * heads] + [hidden] * (len(cell.states) - 1)


def check_sizes(
    cell: Cell,
    input: Tensor,
    hx: States | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Weights],
    *,
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
    check_dtype(input, weights[0].w_ih)
    check_input(input, weights[0].w_ih.size(1), batch_sizes)
    if hx is None:
        return
    batch = input.size(0 if batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
    states = [hx] if isinstance(hx, Tensor) else hx
    for s, width in zip(states, widths(cell, weights[0], heads), strict=True):
        expected = (len(weights) // heads, batch, width)
        if s.size() != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {list(s.size())}")


def check_lengths(lengths: Tensor | Sequence[int], x: Tensor, batched: bool) -> Tensor:
    """`lengths` as int64 [B] on the device of `x` [T, B, I], checked."""
    steps, batch = x.size(0), x.size(1)
    try:
        # A tensor is not converted: torch.as_tensor would move it to the default device.
        length = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"lengths must be a tensor or sequence of integers, one for each of the {batch} "
            f"sequences of the batch: {error}"
        ) from error
    if isinstance(lengths, Tensor) or length.numel():  # an empty list becomes a float tensor
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


def check_resets(
    resets: Tensor | PackedSequence,
    x: Tensor,
    batch_sizes: Tensor | None,
    order: Tensor | None,
    swap: bool,
) -> Tensor:
    """`resets` in the layout of `x` without features, checked; `swap` means batch first."""
    if isinstance(resets, PackedSequence):
        if batch_sizes is None:
            raise ValueError("resets is a PackedSequence, but the input is not")
        same = resets.batch_sizes is batch_sizes
        if not same and not torch.equal(resets.batch_sizes, batch_sizes):
            raise ValueError("resets must be packed with the same lengths as the input")
        own_order = resets.sorted_indices
        if own_order is not order and own_order is not None and order is not None:
            readable = _readable(own_order) and _readable(order)
            if readable and not torch.equal(own_order, order):
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
            f"{_callers_shape(x.shape[:-1], swap)}, got {_callers_shape(resets.shape, swap)}"
        )
    return resets.to(x.device)


def check_reset_states(
    given: States, sizes: Sequence[tuple[int, int, int]], like: Tensor, batched: bool
) -> list[Tensor]:
    """`reset_states` as tensors of these sizes [L*D, B, *], in the caller's order; checked."""
    states = [given] if isinstance(given, Tensor) else given
    if not isinstance(states, Sequence) or not all(isinstance(s, Tensor) for s in states):
        raise TypeError(
            "reset_states must be tensors in the form of hx, one or a tuple for several states, "
            f"got {given!r}"
        )
    if len(states) != len(sizes):
        raise ValueError(
            f"reset_states must hold a tensor for each of the {len(sizes)} states, "
            f"got {len(states)}"
        )
    whole = []
    for state, size in zip(states, sizes, strict=True):
        full = state if batched else state.unsqueeze(1)
        if full.size() not in (size, (size[0], 1, size[2])):
            shape = size if batched else (size[0], size[2])
            raise ValueError(
                f"reset_states must have the shape of hx, {tuple(shape)}"
                f"{', or a batch of 1' * batched}, got {tuple(state.shape)}"
            )
        if full.dtype != like.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"reset_states must have the dtype of the input, {like.dtype}, got {full.dtype}"
            )
        if full.device != like.device:
            raise ValueError(
                f"reset_states must be on the device of the input, {like.device}, got {full.device}"
            )
        whole.append(full.expand(size))
    return whole


def _callers_shape(shape: torch.Size, swap: bool) -> tuple[int, ...]:
    return tuple(reversed(shape)) if swap else tuple(shape)


def _readable(t: Tensor) -> bool:
    """Whether values can be read: without a compiler, a transform, a tracer or a device to wait
    for."""
    return (
        not torch.compiler.is_compiling()
        and type(t) is Tensor
        and t.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """torch.nn's checks of the arguments of a layer, in its order."""
    dropout, num_layers, proj_size = (arguments[n] for n in ("dropout", "num_layers", "proj_size"))
    number = isinstance(dropout, Number) and not isinstance(dropout, bool)
    if not number or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an "
            f"element being zeroed, got {dropout!r}"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
            f"expects num_layers greater than 1, but got dropout={dropout} and num_layers=1",
            stacklevel=4,
        )
    for name in ("bias", "batch_first"):
        flag = arguments[name]
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__} ({flag!r})")
    for name in ("input_size", "hidden_size", "num_layers"):
        size = arguments[name]
        if not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__} ({size!r})")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero, got {size}")
    if proj_size < 0:
        raise ValueError(
            "proj_size should be a positive integer or zero to disable projections, "
            f"got {proj_size}"
        )
    if proj_size >= arguments["hidden_size"]:
        raise ValueError(
            "proj_size has to be smaller than hidden_size, "
            f"got proj_size={proj_size} and hidden_size={arguments['hidden_size']}"
        )


def check_heads(arguments: Mapping[str, Any]) -> None:
    """Check `heads` against the other arguments of a layer."""
    heads, hidden_size = arguments["heads"], arguments["hidden_size"]
    bidirectional = arguments["bidirectional"]
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"heads should be a positive integer, got {heads!r}")
    if hidden_size % heads:
        raise ValueError(f"heads={heads} should divide hidden_size={hidden_size}")
    if heads > 1 and arguments["proj_size"]:
        raise ValueError(
            "heads are not projected; use proj_size=0, or a torch.nn.Linear behind the layer"
        )
    if heads * (2 if bidirectional else 1) > MOST_RECURRENCES:
        raise ValueError(
            f"a layer runs at most {MOST_RECURRENCES} recurrences side by side, got heads={heads} "
            f"with bidirectional={bidirectional}"
        )


def check_projected(cell: Cell) -> None:
    """Raise unless the cell's output may have another width than its units: it may read the
    previous output through the recurrent weights alone."""
    hidden, projected = 5, 3

    def units(value: float = 0.5, width: int = hidden) -> Tensor:
        return torch.full((2, width), value, device="cpu")

    def multiply(x: Tensor) -> list[Tensor]:
        raise RuntimeError(
            "it multiplies a value of the step by the recurrent weights, which then have "
            "proj_size columns"
        )

    def step(previous: float) -> list[Tensor]:
        arguments: list[Any] = [
            Gates(cell, [units() for _ in cell.inputs]),
            Projection(cell, [units() for _ in cell.recurrent], multiply),
        ]
        if cell.params:
            sizes = (param.size(hidden, len(cell.gates)) for param in cell.params.values())
            arguments.append(Params(cell, [torch.full((n,), 0.5, device="cpu") for n in sizes]))
        states = [units(previous, projected), *(units() for _ in cell.states[1:])]
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = cell.function(*arguments, *states)
        return [out] if isinstance(out, Tensor) else list(out)

    try:
        after, others = step(0.25), step(0.75)
    except Exception as error:  # whatever the function raises at these sizes
        why = f"and then its function fails: {error or type(error).__name__}"
    else:
        same = all(torch.equal(a, b) for a, b in zip(after, others, strict=True))
        if same and all(state.size(-1) in (1, hidden) for state in after):
            return
        why = "and its next states follow from this output itself"
    name = cell.states[0]
    raise ValueError(
        f"cell {cell.name!r} cannot be projected: with proj_size its previous output {name!r} has "
        f"another width than its units, {why}. Such a cell may use {name!r} through the recurrent "
        "weights alone (v); use proj_size=0, or a torch.nn.Linear behind the layer"
    )


def refuse_unknown(layer: nn.Module, unknown: dict[str, Any]) -> None:
    """Raise for unknown keyword arguments of RNN and GRU. torch.nn accepts their `proj_size` only
    by position, and then refuses the call."""
    if "proj_size" in unknown:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in unknown:
        raise TypeError(
            f"{type(layer).__name__}.__init__() got an unexpected keyword argument {name!r}"
        )
