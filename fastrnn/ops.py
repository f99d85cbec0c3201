"""The operator `fastrnn::scan` as Python sees it.

Schemas, autograd and autocast are registered in C++ (`csrc/binding/`); here are the shapes of its
results for tracing, and the one place that decides when a call cannot be an opaque operator and
runs as plain torch operations instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from fastrnn import flops
from fastrnn.cells import Cell
from fastrnn.extension import _C
from fastrnn.kernels import reference
from fastrnn.kernels.operands import Needs, Operands, Weights, side_by_side
from fastrnn.kernels.prepare import on_cpu, prepare, prepared_now

__all__ = ["Prepacked", "pack", "run", "scan", "step", "transposed"]


class Prepacked(NamedTuple):
    """The weights of one layer in the layout of the CPU kernel, which knows them when it sees them
    again by their fingerprint."""

    weights: list[Tensor]  # P
    fingerprint: Tensor  # int64; it also remembers what was compared last


def pack(cell: Cell, weights: Sequence[Weights]) -> Prepacked | None:
    """Pack one layer, from the weights of every recurrence in it.

    None where the CPU kernel would not run them.

    Raises:
        RuntimeError: for weights whose shapes do not fit together.
    """
    key, refusal, *_ = on_cpu(cell, weights[0])
    if key is None or refusal is not None:
        return None
    packed = [_C.pack(key, *each) for each in weights]
    return Prepacked(packed, _C.fingerprint([t for group in side_by_side(weights) for t in group]))


def scan(
    cell: Cell,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    *,
    b_ih: Sequence[Tensor] = (),
    b_hh: Sequence[Tensor] = (),
    w_hr: Sequence[Tensor] = (),
    s0: Sequence[Tensor] = (),
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: int = 0,
    packed: Prepacked | None = None,
    recompute: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Run `P` independent scans of one cell over the same input, on the kernel of the plan.

    Arguments and results are those of `kernels.reference.scan`; `packed` are the same weights by
    `pack`, which spares the CPU kernel the packing, and the caller the gradients. With `recompute`
    nothing is saved for a gradient but the operands and the output.

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not fit together; with `packed`, where
            a gradient is asked for, or the weights have changed since.
        fastrnn.plan.KernelRefused: when a kernel was asked for by name and cannot run this.
    """
    operands = Operands(x, w_ih, w_hh, b_ih, b_hh, w_hr, s0, batch_sizes, lengths, resets, reverse)
    return run(cell, operands, packed, recompute=recompute)


def run(
    cell: Cell, operands: Operands, packed: Prepacked | None = None, *, recompute: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """`scan` of operands that are one value already."""
    x, w_ih, w_hh, b_ih, b_hh, w_hr, s0 = operands[:7]
    every = (x, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *s0)
    compiling = torch.compiler.is_compiling()
    key = (prepare if compiling else prepared_now)(cell, _kind(x), x.dtype)
    if packed is not None and key is not None:
        if torch.is_grad_enabled():
            _refuse_gradients(*every)
        if _can_use_prepacked(x):
            if compiling or torch._C._is_torch_function_mode_enabled():
                y, *states = torch.ops.fastrnn.scan_packed.default(
                    key, *_optional(operands), *packed
                )
                return y, states
            return _C.scan_packed(key, *operands, *packed)
    # Functions that are overridden, by a subclass or by a mode such as the default device, need the
    # operator that they can see. A transform goes first: it has no rule for the operator.
    transformed = not compiling and _transformed()
    if key is None or transformed:
        return _as_operations(cell, operands)
    if compiling or has_torch_function(every):
        y, *states, _ = torch.ops.fastrnn.scan.default(key, *_optional(operands), False, recompute)
        return y, states
    return _C.scan(key, *operands, recompute)


def _optional(operands: Operands) -> tuple[Any, ...]:
    """As the schema of the operator has them, with None for the lists that are empty."""
    x, w_ih, w_hh, *rest = operands
    return x, w_ih, w_hh, *[None if isinstance(a, Sequence) and not a else a for a in rest]


def step(
    cell: Cell,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    packed: Prepacked | None = None,
) -> tuple[Tensor, ...] | None:
    """One time step in one call, for what most calls look like: `scan` serves them all.

    Args:
        x: [B, I].
        states: `S` tensors [B, H], none for zeros.
        weights: without a projection.
        packed: the same by `pack`.

    Returns:
        `S` next states [B, H]; None, with nothing done, where an operand is not a plain dense
        tensor of the size and dtype that the others ask for, on a CPU, a transform is active, or
        gradients are asked for by `packed` weights.

    Raises:
        RuntimeError: where the weights have changed since they were packed.
    """
    if torch.compiler.is_compiling() or _transformed():
        return None
    key = prepared_now(cell, _kind(x), x.dtype)
    if key is None:
        return None
    return _C.step(key, x, tuple(states), weights, *(packed or ()))


def transposed(y: Tensor) -> Tensor:
    """`y` [T, B, *] as [B, T, *] on the same memory, and no view to autograd: `detach_` and changes
    in place work on it as on the output of torch.nn's GRU and RNN."""
    if torch.compiler.is_compiling() or not _plain(y) or _transformed():
        return y.transpose(0, 1)
    return _C.transposed(y)


def _refuse_gradients(*tensors: Tensor) -> None:
    if any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "this layer is frozen and has no derivative, but its input, states or weights require "
            "gradients. Call it under torch.no_grad() or torch.inference_mode(), or "
            "fastrnn.unfreeze(module) to train it"
        )


def _can_use_prepacked(x: Tensor) -> bool:
    """Whether the op will find the very tensors that were packed, and compute in their dtype."""
    if torch._C._is_any_autocast_enabled():
        return False
    if torch.compiler.is_compiling():
        # An exported program holds copies. What `is_exporting` returns, which in torch 2.11 is true
        # in whatever is compiled.
        return not torch.compiler._is_exporting_flag
    return _plain(x) and not _transformed()


def _kind(x: Tensor) -> str:
    """The type of its device, which torch spells anew on every call: a third of a microsecond."""
    return "cpu" if x.is_cpu else x.device.type


def _plain(x: Tensor) -> bool:
    """Whether no subclass overrides functions of it; a mode may, such as the default device."""
    return type(x) in (Tensor, torch.nn.Parameter)


def _transformed() -> bool:
    """Whether a transform is active that must see inside: torch.func's, or forward-mode AD."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def _as_operations(cell: Cell, operands: Operands) -> tuple[Tensor, list[Tensor]]:
    """The reference, with operands in autocast's dtype."""
    kind = operands.x.device.type
    if not torch.is_autocast_enabled(kind):
        return reference.scan(cell, **operands._asdict())
    dtype = _C.autocast_dtype(cell.name, operands.x, operands.s0)

    def cast(operand: Any) -> Any:
        return [t.to(dtype) for t in operand] if isinstance(operand, list | tuple) else operand

    given = {name: cast(operand) for name, operand in operands._asdict().items()}
    with torch.autocast(kind, enabled=False):
        return reference.scan(cell, **given | {"x": operands.x.to(dtype)})


@torch.library.register_fake("fastrnn::scan")
def _scan_fake(cell: str, *arguments: Any) -> list[Tensor]:
    operands, tape = Operands(*arguments[: len(Operands._fields)]), False
    if len(arguments) > len(operands):
        tape = arguments[len(operands)]
    x, w_hh, w_hr, s0 = operands.x, operands.w_hh, operands.w_hr, operands.s0
    for tensors in operands[1:7]:
        for each in tensors or ():
            torch._check(
                each.device == x.device,
                lambda each=each: (
                    f"scan: a weight or state is on {each.device} but x is on {x.device}"
                ),
            )
    gates, states, width = _C.cell_facts(cell, bool(w_hr))
    recurrences, hidden = len(w_hh), w_hh[0].size(0) // gates
    recurrent = w_hr[0].size(0) if w_hr else hidden
    batch = s0[0].size(-2) if s0 else x.size(-2)
    rows = x.size(0) * x.size(1) if x.dim() == 3 else x.size(0)
    y = x.new_empty(*x.shape[:-1], recurrences * recurrent)
    before = (batch,) if x.dim() == 2 and operands.batch_sizes is None else (recurrences, batch)
    last = [x.new_empty(*before, hidden if s else recurrent) for s in range(states)]
    return [y, *last, x.new_empty(rows if tape else 0, recurrences, width, hidden)]


@torch.library.register_fake("fastrnn::scan_packed")
def _scan_packed_fake(*arguments: Any) -> list[Tensor]:
    return _scan_fake(*arguments[:-2])[:-1]


@torch.library.register_fake("fastrnn::scan_backward")
def _scan_backward_fake(
    cell: str, dy: Tensor | None, dstates: list[Tensor | None], *arguments: Any
) -> list[Tensor]:
    *inputs, _, _, needs = arguments
    operands = Operands(*inputs)
    return [
        t.new_empty(t.shape)
        for group, want in zip([[operands.x], *operands[1:7]], Needs(*needs).groups(), strict=True)
        if want
        for t in group or ()
    ]


flops.register_when_imported()
