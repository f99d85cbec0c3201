"""The Python side of the operator `fastrnn::scan`.

C++ registers schemas, autograd and autocast (`csrc/binding/`). This module registers the shapes of
results for tracing, and decides when a call cannot be an opaque operator and runs as plain torch
operations instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from fastrnn import flops
from fastrnn.cells import Cell
from fastrnn.cells.noise import seeded
from fastrnn.extension import _C
from fastrnn.kernels import onnx, reference
from fastrnn.kernels.operands import Needs, Operands, Weights, side_by_side
from fastrnn.kernels.prepare import on_cpu, prepare, prepared_now

__all__ = ["Prepacked", "Ways", "layers", "pack", "run", "scan", "step", "transposed"]


# The scales of the rows of w_ih, w_hh and, if there is one, w_hr, float32.
Scales = tuple[Tensor, ...]


class Prepacked(NamedTuple):
    """One layer's weights in the CPU kernel's layout, and a fingerprint that reveals later changes
    of the originals.

    Attributes:
        weights: one tensor per recurrence, `P`.
        fingerprint: int64; it also records which block was compared last.
        format: the format of products, one of `plan.FORMATS`.
    """

    weights: list[Tensor]
    fingerprint: Tensor
    format: str


def pack(
    cell: Cell,
    weights: Sequence[Weights],
    format: str | None = None,
    scales: Sequence[Scales] = (),
    dtype: torch.dtype | None = None,
) -> Prepacked | None:
    """Prepack the weights of every recurrence of one layer.

    Args:
        weights: floating-point tensors, or matrices in the format, int8 ones with `scales`.
        format: the format of products, by default that of the dtype.
        scales: what the rows of int8 matrices are multiplied by, for every recurrence.
        dtype: the dtype of the layer's input, by default that of the weights.

    Returns:
        None if the CPU kernel would not run the layer.

    Raises:
        RuntimeError: if the shapes of the weights do not fit together.
    """
    key, refusal, *_, format = on_cpu(cell, weights[0], format=format, dtype=dtype)
    if key is None or refusal is not None:
        return None
    packed = [
        _C.pack(key, format, recurrence.flat(), scales[p] if scales else ())
        for p, recurrence in enumerate(weights)
    ]
    mark = _C.fingerprint([t for group in side_by_side(weights) for t in group])
    return Prepacked(packed, mark, format)


def scan(
    cell: Cell,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    *,
    b_ih: Sequence[Tensor] = (),
    b_hh: Sequence[Tensor] = (),
    w_hr: Sequence[Tensor] = (),
    params: Sequence[Tensor] = (),
    s0: Sequence[Tensor] = (),
    reset_states: Sequence[Tensor] = (),
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    noise: Tensor | None = None,
    reverse: int = 0,
    packed: Prepacked | None = None,
    recompute: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Run `P` independent scans of one cell over the same input, with the kernel that the plan
    chooses.

    The arguments are those of `kernels.operands.Operands`, the results those of
    `kernels.reference.scan`, and:

    Args:
        packed: the same weights from `pack`; the CPU kernel then need not pack them. Such a call
            has no gradients.
        recompute: save only the operands and the output for the gradients.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit together; with `packed`, if a gradient
            is needed or the weights have changed since.
        fastrnn.plan.KernelRefused: if a kernel was asked for by name and cannot run this call.
    """
    weights = w_ih, w_hh, b_ih, b_hh, w_hr, params
    rows = batch_sizes, lengths, resets, noise
    operands = Operands(x, *weights, s0, reset_states, *rows, reverse)
    return run(cell, operands, packed, recompute=recompute)[:2]


def run(
    cell: Cell,
    operands: Operands,
    packed: Prepacked | None = None,
    *,
    recompute: bool = False,
    steps: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """`scan` with the operands as one value. With `steps`, the third result holds the states past
    the first after every step, [R, P, S-1, H], with zeros past the end of a sequence."""
    x, w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, begins = operands[:9]
    tensors = (x, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *params, *s0, *begins)
    compiling = torch.compiler.is_compiling()
    if compiling and onnx.is_recording():
        return onnx.scan(cell, operands, steps)
    usable = packed if packed is not None and _can_use_prepacked(x) else None
    if compiling:
        key = prepare(cell, _kind(x), x.dtype)
    else:
        key = prepared_now(cell, _kind(x), x.dtype, usable.format if usable is not None else None)
    if packed is not None and key is not None:
        if torch.is_grad_enabled():
            _refuse_gradients(*tensors)
        if usable is not None:
            if steps or compiling or torch._C._is_torch_function_mode_enabled():
                y, *states = torch.ops.fastrnn.scan_packed.default(
                    key, *_optional(operands), *usable, steps
                )
                return y, states, states.pop() if steps else None
            return *_C.scan_packed(key, *operands, *usable), None
    # Subclasses of Tensor, and modes such as the default device, override functions, so they need
    # an operator that they can see. Transforms come first: they have no rule for the operator.
    transformed = not compiling and _transformed()
    if key is None or transformed:
        return _as_operations(cell, operands, steps)
    if steps or compiling or has_torch_function(tensors):
        y, *states, _ = torch.ops.fastrnn.scan.default(
            key, *_optional(operands), False, recompute, steps
        )
        return y, states, states.pop() if steps else None
    return *_C.scan(key, *operands, recompute), None


def _optional(operands: Operands) -> tuple[Any, ...]:
    """The operands for the schema of the operator, with None in place of empty lists."""
    x, w_ih, w_hh, *others = operands
    return x, w_ih, w_hh, *[None if isinstance(a, Sequence) and not a else a for a in others]


def step(
    cell: Cell,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    packed: Prepacked | None = None,
) -> tuple[Tensor, ...] | None:
    """Run one time step in a fast call for common operands; `scan` accepts all operands.

    Args:
        x: [B, I].
        states: `S` tensors [B, H], none for zeros.
        weights: weights without a projection.
        packed: the same weights from `pack`.

    Returns:
        `S` next states [B, H]. None, without any effect, if `_C` does not run the call by itself:
        see `layers`.

    Raises:
        RuntimeError: if the weights have changed since they were packed.
    """
    if torch.compiler.is_compiling() or _transformed():
        return None
    key = prepared_now(cell, _kind(x), x.dtype)
    if key is None:
        return None
    return _C.step(key, x, tuple(states), weights, packed)


# How layers run: (bidirectional, heads, batch_first, recompute, dropout between layers). To make a
# tuple with names would take a fiftieth of the time of a small layer.
Ways = tuple[bool, int, bool, bool, float]


def layers(
    cell: Cell,
    input: Any,
    hx: Any,
    weights: Sequence[Weights],
    check: Callable[[Any, Any, Any, Tensor], None],
    ways: Ways,
    packed: Sequence[Prepacked | None] = (),
    lengths: Any = None,
    resets: Any = None,
) -> tuple[Any, ...] | None:
    """Run layers one after the other, in a fast call for common operands; `nn.functional.rnn`
    accepts all operands, and documents the arguments.

    Args:
        check: called as `check(input, hx, batch_sizes, w_ih)` before anything is computed, if the
            operands are common. Its errors are those of the call.

    Returns:
        What `nn.functional.rnn` returns. None, without any effect, if it has to run the call: an
        operand is not a plain dense tensor of fitting size and dtype on the device of the input,
        this is a GPU for which C++ knows no launch of the CUDA kernels for such a call, autocast or
        a transform is active, or gradients are needed with `packed` weights.

    Raises:
        RuntimeError: if the weights have changed since they were packed.
    """
    rows = type(input) is PackedSequence
    x = input[0] if rows else input
    if torch.compiler.is_compiling() or not _plain(x) or _transformed():
        return None
    if not x.is_cpu and not x.is_cuda:
        return None
    format = packed[0].format if packed and packed[0] is not None else None
    key = prepared_now(cell, _kind(x), x.dtype, format)
    if key is None:
        return None
    # Drawn once the call is certain to run, so that each layer takes one seed from the generator.
    order = input[2] if rows else None
    noise = functools.partial(seeded, cell.draws, x, order) if cell.noise else None
    thresholds = [draw.threshold for draw in cell.draws] if cell.noise else ()
    drawn = thresholds, noise
    out = _C.layers(key, input, hx, weights, check, lengths, resets, *drawn, ways, packed)
    if rows and out is not None:
        y, last = out
        return PackedSequence(y, *input[1:]), last
    return out


def transposed(y: Tensor) -> Tensor:
    """`y` [T, B, *] as [B, T, *] in the same memory. Autograd does not see a view: `detach_` and
    changes in place work as on the output of torch.nn's GRU and RNN."""
    if torch.compiler.is_compiling() or not _plain(y) or _transformed():
        return y.transpose(0, 1)
    return _C.transposed(y)


def _refuse_gradients(*tensors: Tensor) -> None:
    if any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "this layer is frozen and has no derivative, but its input, states or weights require "
            "gradients. Call it under torch.no_grad() or torch.inference_mode(), or "
            "fastrnn.unfreeze(module), or fastrnn.dequantize_(module), to train it"
        )


def _can_use_prepacked(x: Tensor) -> bool:
    """Whether the operator will get the same tensors that were packed, and compute in their
    dtype."""
    if torch._C._is_any_autocast_enabled():
        return False
    if torch.compiler.is_compiling():
        # An exported program holds copies. This flag is what `is_exporting` returns; Dynamo of
        # torch 2.11 would take a call of that function for true in all compiled code.
        return not torch.compiler._is_exporting_flag
    return _plain(x) and not _transformed()


def _kind(x: Tensor) -> str:
    """The type of x's device. torch builds this string on every call, in a third of a
    microsecond."""
    return "cpu" if x.is_cpu else x.device.type


def _plain(x: Tensor) -> bool:
    """Whether `x` is not of a subclass that may override functions; a mode may still do so."""
    return type(x) in (Tensor, torch.nn.Parameter)


def _transformed() -> bool:
    """Whether a transform is active that must see single operations: torch.func's, or forward-mode
    AD."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def _as_operations(
    cell: Cell, operands: Operands, steps: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Run the reference, under autocast with operands in autocast's dtype."""
    kind = operands.x.device.type
    run = reference.scan_with_steps if steps else _without_steps
    if not torch.is_autocast_enabled(kind):
        return run(cell, operands)
    dtype = _C.autocast_dtype(cell.name, operands.x, operands.s0)

    def cast(operand: Any) -> Any:
        return [t.to(dtype) for t in operand] if isinstance(operand, list | tuple) else operand

    in_dtype = Operands(*map(cast, operands))._replace(x=operands.x.to(dtype))
    with torch.autocast(kind, enabled=False):
        return run(cell, in_dtype)


def _without_steps(cell: Cell, operands: Operands) -> tuple[Tensor, list[Tensor], None]:
    return *reference.scan(cell, operands), None


@torch.library.register_fake("fastrnn::scan")
def _scan_fake(cell: str, *arguments: Any) -> list[Tensor]:
    operands = Operands(*arguments[: len(Operands._fields)])
    tape, _, steps, *_ = *arguments[len(operands) :], False, False, False
    x, w_ih, w_hr, s0 = operands.x, operands.w_ih, operands.w_hr, operands.s0
    for tensors in operands.lists():
        for tensor in tensors or ():
            torch._check(
                tensor.device == x.device,
                lambda tensor=tensor: (
                    f"scan: a weight or state is on {tensor.device} but x is on {x.device}"
                ),
            )
    gates, states, width, results = _C.cell_facts(cell, bool(w_hr))
    recurrences, hidden = len(w_ih), w_ih[0].size(0) // gates
    if results:  # in float32, behind the other values of a row
        width += -(-results * (2 if x.itemsize == 2 else 1) // hidden)
    recurrent = w_hr[0].size(0) if w_hr else hidden
    batch = s0[0].size(-2) if s0 else x.size(-2)
    rows = x.size(0) * x.size(1) if x.dim() == 3 else x.size(0)
    y = x.new_empty(*x.shape[:-1], recurrences * recurrent)
    before = (batch,) if x.dim() == 2 and operands.batch_sizes is None else (recurrences, batch)
    last = [x.new_empty(*before, hidden if s else recurrent) for s in range(states)]
    if steps:
        last.append(x.new_empty(rows, recurrences, states - 1, hidden))
    return [y, *last, x.new_empty(rows if tape else 0, recurrences, width, hidden)]


@torch.library.register_fake("fastrnn::scan_packed")
def _scan_packed_fake(*arguments: Any) -> list[Tensor]:
    count = 1 + len(Operands._fields)
    steps = arguments[count + 3 :] == (True,)
    return _scan_fake(*arguments[:count], False, False, steps)[:-1]


@torch.library.register_fake("fastrnn::scan_backward")
def _scan_backward_fake(
    cell: str,
    dy: Tensor | None,
    dstates: list[Tensor | None],
    dsteps: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    *inputs, _, _, needs = arguments
    operands = Operands(*inputs)
    groups = [operands.x], *operands.lists()
    return [
        t.new_empty(t.shape)
        for group, want in zip(groups, Needs(*needs).groups(), strict=True)
        if want
        for t in group or ()
    ]


flops.register_when_imported()
