"""What the compiled operator asks of Python: a plan, the first time it sees a shape, a cell that it
does not know yet, and the kernels that are written in Python.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastrnn import plan
from fastrnn.compiler.derive import derive
from fastrnn.extension import _C
from fastrnn.kernels import device as machine
from fastrnn.kernels import reference
from fastrnn.kernels.gpu import cuda, driver
from fastrnn.kernels.gpu.sweeps import ReplayingSweeps, Scan, Sweeps
from fastrnn.kernels.gpu.triton import launch
from fastrnn.kernels.operands import Needs, Operands
from fastrnn.kernels.prepare import cell_of, find
from fastrnn.plan.dtypes import NAMES

__all__: list[str] = []

# The kernels for GPUs, which are launched from Python.
_SWEEPS: dict[str, Sweeps] = {"cuda": cuda.sweeps, "triton": launch.sweeps}

_logged: set[tuple[plan.Problem, plan.Device]] = set()


def _plan(
    *,
    dtype: str,
    device: str,
    threads: int,
    compiled: bool,
    **rest: Any,
) -> tuple[str, bool, int, int, int, int]:
    problem = plan.Problem(dtype=NAMES.get(dtype, dtype), **rest)
    offered = machine.current(device, threads, compiled)
    chosen = plan.choose(problem, offered)
    if "plan" in os.environ.get("FASTRNN_LOG", "") and (problem, offered) not in _logged:
        _logged.add((problem, offered))
        print(f"fastrnn: {problem}\n      -> {chosen}", file=sys.stderr)
    return (
        chosen.kernel,
        chosen.packed_weights,
        chosen.split_lanes,
        chosen.split_slots,
        chosen.split_units,
        chosen.chunk_rows,
    )


def _forward(
    kernel: str, inputs: tuple[Any, ...], tape: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The forward sweep of a kernel that is written in Python."""
    cell, operands = _taken(inputs)
    if kernel not in _SWEEPS:
        return reference.forward(cell_of(cell), cell, operands, tape)
    given = _with_scans(operands)
    y, states, kept = driver.forward(_SWEEPS[kernel], _scan(cell, given, kernel, tape=tape), tape)
    return y, [s[0] for s in states] if given is not operands else states, kept


def _backward(
    kernel: str,
    inputs: tuple[Any, ...],
    grads: list[Tensor | None],
    y: Tensor,
    tape: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    (cell, operands), need = _taken(inputs), Needs(*needs)
    if kernel not in _SWEEPS:
        # By autograd of the reference, which needs no tape.
        return reference.gradients(cell_of(cell), operands, grads, need, create_graph=False)
    replays = isinstance(_SWEEPS[kernel], ReplayingSweeps)
    if tape.size(2) and not tape.size(0) and y.numel() and not replays:
        tape = _forward(kernel, inputs, True)[2]
    given = _with_scans(operands)
    scan = _scan(cell, given, kernel, tape=True, backward=True)
    if given is operands:
        return driver.backward(_SWEEPS[kernel], scan, grads, y, tape, need)
    grads = [grads[0], *[None if g is None else g.unsqueeze(0) for g in grads[1:]]]
    found = driver.backward(_SWEEPS[kernel], scan, grads, y, tape, need)
    states = len(operands.s0) if need.s0 else 0
    return found[: len(found) - states] + [g[0] for g in found[len(found) - states :]]


def _differentiable_backward(
    inputs: tuple[Any, ...], grads: list[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    cell, operands = _taken(inputs)
    return reference.gradients(cell_of(cell), operands, grads, Needs(*needs), create_graph=True)


def _taken(inputs: tuple[Any, ...]) -> tuple[str, Operands]:
    """What the operator takes before `tape`: the name of the cell, and the operands."""
    cell, *operands = inputs
    return cell, Operands(*operands)


def _with_scans(given: Operands) -> Operands:
    """One step [B, I] as the sweeps know it, with states [1, B, *]; other calls as they are."""
    if given.x.dim() == 3 or given.batch_sizes is not None:
        return given
    return given._replace(s0=[s.unsqueeze(0) for s in given.s0])


def _scan(key: str, given: Operands, kernel: str, *, tape: bool, backward: bool = False) -> Scan:
    """The scan with the plan for it."""
    cell, x = cell_of(key), given.x
    derived = derive(cell)
    problem = plan.Problem(
        cell=key,
        steps=x.size(0) if x.dim() == 3 else 1,
        batch=given.s0[0].size(1) if given.s0 else x.size(-2),
        inputs=x.size(-1),
        hidden=given.w_hh[0].size(0) // len(cell.gates),
        gates=len(cell.gates),
        states=len(cell.states),
        lanes=len(given.w_hh),
        dtype=str(x.dtype).removeprefix("torch."),
        tape=tape,
        backward=backward,
        projected=bool(given.w_hr),
        projectable=derived.projectable,
    )
    # The kernel was chosen for the current device, which may be another one than the tensors'.
    offered = replace(machine.current(x.device.type, index=x.device.index), forced=kernel)
    return Scan(key, derived, plan.choose(problem, offered), given)


_C.set_callbacks(_plan, find, _forward, _backward, _differentiable_backward)
