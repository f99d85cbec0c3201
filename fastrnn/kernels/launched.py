"""Calls of the kernels that Python plans and launches: all except the CPU's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import plan
from fastrnn.compiler.derive import Derived, derive
from fastrnn.compiler.layout import values
from fastrnn.extension import _C
from fastrnn.kernels import device as machine
from fastrnn.kernels import reference
from fastrnn.kernels.gpu import cuda, driver, packed
from fastrnn.kernels.gpu.sweeps import Scan, Shape, Sweeps, tf32_allowed
from fastrnn.kernels.gpu.triton import launch
from fastrnn.kernels.operands import Needs, Operands
from fastrnn.kernels.prepare import cell_of

__all__ = ["backward", "forward", "reference_backward", "tables"]

# The kernels for GPUs, which are launched from Python.
_SWEEPS: dict[str, Sweeps] = {"cuda": cuda.sweeps, "triton": launch.sweeps}


class Planned(Shape):
    """A shape, with the sweeps of its plan's kernel, None for the reference, and with the number
    of times that plans had been forgotten before."""

    epoch = 0

    def __init__(self, cell: str, derived: Derived, chosen: plan.Plan, operands: Operands) -> None:
        super().__init__(cell, derived, chosen, operands)
        self.sweeps = _SWEEPS.get(chosen.kernel)


def forward(inputs: tuple[Any, ...], tape: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """The forward pass of a kernel that Python launches."""
    (key, operands), flags = _split(inputs), (tape, False, False)
    shape = _shape(key, operands, flags)
    if shape.sweeps is None:
        return reference.forward(cell_of(key), operands, tape)
    stacked = _with_recurrences(operands)
    scan = Scan(shape, stacked)
    try:
        y, states, saved = driver.forward(shape.sweeps, scan, tape)
    except cuda.CooperativeLaunchRefused:
        if not machine.go_on_without_grids(operands.x.device):
            raise
        return forward(inputs, tape)
    if shape.sweeps is cuda.sweeps and scan.whole:
        cuda.hand_over(scan, inputs, "forward", shape.epoch)
    return y, [s[0] for s in states] if stacked is not operands else states, saved


def backward(
    inputs: tuple[Any, ...],
    grads: list[Tensor | None],
    y: Tensor,
    tape: Tensor,
    needs: Sequence[bool],
) -> list[Tensor] | None:
    """The gradients by a kernel that Python launches; None if the reference must give them."""
    (key, operands), need = _split(inputs), Needs(*needs)
    *ours, dsteps = grads
    if dsteps is not None and not dsteps.numel():  # there is one state
        dsteps = None
    shape = _shape(key, operands, (True, True, dsteps is not None))
    sweeps = shape.sweeps
    if sweeps is None:
        return None
    rows = y.shape[:-1].numel()
    if tape.size(2) and not tape.size(0) and rows and sweeps is not cuda.sweeps:
        tape = forward(inputs, True)[2]
    stacked = _with_recurrences(operands)
    if stacked is not operands:
        ours = [grads[0], *[None if g is None else g.unsqueeze(0) for g in ours[1:]]]
    scan = Scan(shape, stacked)
    try:
        out = driver.backward(sweeps, scan, ours, dsteps, y, tape, need)
    except cuda.CooperativeLaunchRefused:
        if not machine.go_on_without_grids(operands.x.device):
            raise
        return backward(inputs, grads, y, tape, needs)
    if sweeps is cuda.sweeps and scan.whole:
        cuda.hand_over(scan, inputs, "backward", shape.epoch)
    if stacked is operands:
        return out
    states = len(operands.s0) if need.s0 else 0
    states += len(operands.reset_states) if need.reset_states else 0
    return out[: len(out) - states] + [g[0] for g in out[len(out) - states :]]


def reference_backward(
    inputs: tuple[Any, ...],
    grads: list[Tensor | None],
    needs: Sequence[bool],
    differentiable: bool,
) -> list[Tensor]:
    """The gradients by autograd of the reference, which needs no tape."""
    (key, operands), need = _split(inputs), Needs(*needs)
    return reference.gradients(cell_of(key), operands, grads, need, create_graph=differentiable)


def tables(sizes: Tensor, batch: int, device: torch.device) -> tuple[Tensor, int]:
    """The tables of a packed batch for the current stream, and the stream of their copy to the
    device, for calls that C++ launches."""
    made = packed.tables(sizes, batch, device)
    return made.on_device, 0 if made.stream is None else made.stream.cuda_stream


def _split(inputs: tuple[Any, ...]) -> tuple[str, Operands]:
    """Split the inputs of the operator into the key of the cell and the operands."""
    key, *operands = inputs
    return key, Operands(*operands)


def _with_recurrences(operands: Operands) -> Operands:
    """Operands with states [1, B, *], if they are those of one step [B, I]; else unchanged."""
    if operands.x.dim() == 3 or operands.batch_sizes is not None:
        return operands
    s0, begins = ([s.unsqueeze(0) for s in group] for group in operands.lists()[-2:])
    return operands._replace(s0=s0, reset_states=begins)


# A plan takes longer than a small layer, so each shape is planned once. As in C++,
# `forget_plans` ends all plans.
_MOST_SHAPES = 1024
_shapes: dict[Any, Planned] = {}


def _shape(key: str, operands: Operands, flags: tuple[bool, bool, bool]) -> Planned:
    """What this call has in common with others that have the same plan and sizes. `flags` tell
    whether it makes or uses a tape, whether it is a backward pass, and whether the states after
    every step have gradients in it."""
    x, w_hh, sizes = operands.x, operands.w_hh, operands.batch_sizes
    packed = None if sizes is None else (sizes.numel(), operands.s0[0].size(-2))
    kind = key, x.shape, x.dtype, x.device, flags, packed, operands.reverse
    weights = (
        len(w_hh),
        operands.w_ih[0].shape,
        w_hh[0].shape,
        bool(operands.w_hr),
        bool(operands.reset_states),
    )
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    epoch = _C.plans_forgotten()
    name = kind, weights, tf32, epoch
    found = _shapes.get(name)
    if found is None:
        if len(_shapes) >= _MOST_SHAPES:
            _shapes.clear()
        found = _shapes[name] = _planned(key, operands, *flags)
        found.epoch = epoch
    return found


def _planned(key: str, operands: Operands, tape: bool, backward: bool, every_step: bool) -> Planned:
    cell, x, sizes = cell_of(key), operands.x, operands.batch_sizes
    if sizes is not None:
        steps, batch, rows = sizes.numel(), operands.s0[0].size(1), x.size(0)
    else:
        steps, batch, rows = x.size(0) if x.dim() == 3 else 1, x.size(-2), -1
    derived = derive(cell)
    problem = plan.Problem(
        cell=key,
        steps=steps,
        batch=batch,
        inputs=x.size(-1),
        hidden=cell.hidden_size(operands.w_ih[0]),
        gates=len(cell.gates),
        input_gates=len(cell.inputs),
        recurrent_gates=len(cell.recurrent),
        states=len(cell.states),
        recurrences=len(operands.w_hh),
        rows=rows,
        dtype=str(x.dtype).removeprefix("torch."),
        tape=tape,
        backward=backward,
        projected=bool(operands.w_hr),
        projectable=derived.projectable,
        stages=derived.stages,
        all_summed=derived.all_summed,
        draws=len(derived.draws),
        values=values(derived, forward=not backward),
        reset_states=bool(operands.reset_states),
        every_step=every_step,
    )
    compiled = _C.has_code(key, "float64" if x.dtype == torch.float64 else "float32")
    offered = machine.current(x.device.type, compiled=compiled, index=x.device.index)
    chosen = plan.choose(problem, offered)
    machine.log(problem, offered, chosen)
    return Planned(key, derived, chosen, operands)
