"""The table of kernels: what plans run, and what this machine offers them.

The compiled library calls back into this file to plan a call the first time it sees its shape,
and for the kernels that are written in Python.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import cells, plan
from fastrnn.cells import Cell
from fastrnn.compiler import emit_cpp, jit
from fastrnn.compiler.derive import Derived, Underivable, derive
from fastrnn.extension import _C
from fastrnn.kernels import reference
from fastrnn.kernels.gpu import cuda as cuda_scan
from fastrnn.kernels.gpu import driver as gpu_scan
from fastrnn.kernels.gpu.triton import launch as triton_scan

__all__ = ["device", "prepare", "use"]

_DTYPES = {"Float": "float32", "Double": "float64", "BFloat16": "bfloat16", "Half": "float16"}


class _Call(NamedTuple):
    """What the op takes before `tape`, in its order; `reference.scan` documents it."""

    cell: str
    x: Tensor
    w_ih: list[Tensor]
    w_hh: list[Tensor]
    b_ih: list[Tensor]
    b_hh: list[Tensor]
    w_hr: list[Tensor]
    s0: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    reverse: int


_prepared: dict[str, Cell] = {name: cells.get(name) for name in cells.names()}
_keys: dict[Cell, str] = {cell: name for name, cell in _prepared.items()}
_compiled = (set(_keys), set(_keys))  # for CPUs: in float, and in double
_refused: dict[tuple[Cell, bool], str] = {}  # why: to be compiled for CPUs (True), or at all
_preparing = threading.Lock()
_forced: list[str] = []
_logged: set[tuple[plan.Problem, plan.Device]] = set()


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Run everything inside the block with this kernel, as FASTRNN_KERNEL=name does.

    It holds for the whole process, other threads included.

    Raises:
        ValueError: when there is no kernel of that name.
        plan.KernelRefused: from the first call inside that the kernel cannot run.
    """
    if kernel not in plan.KERNELS:
        raise ValueError(f"no kernel named {kernel!r}; there are: {', '.join(plan.KERNELS)}")
    _forced.append(kernel)
    _C.forget_plans()
    try:
        yield
    finally:
        _forced.pop()
        _C.forget_plans()


def prepare(cell: Cell, kind: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """The name under which the op knows `cell`, or None where only the reference can run it on
    devices of this kind.

    A user's cell is derived on its first use, and compiled on its first use on a CPU, once to
    compute in float and once, for tensors of float64, in double: kernels for GPUs need no C++
    compiler. If that fails, a warning says why.

    Raises:
        plan.KernelRefused: for such a cell, when a kernel was asked for by name.
    """
    if torch.compiler.is_compiling():
        # In parts: to the compiler of torch 2.11 the cell as a whole is no constant.
        return _prepared_once(cell.name, cell.gates, cell.states, cell.function, kind, dtype)
    return _prepared_now(cell, kind, dtype)


def _prepared_once(
    name: str,
    gates: tuple[str, ...],
    states: tuple[str, ...],
    function: Callable[..., Any],
    kind: str,
    dtype: torch.dtype,
) -> str | None:
    return _prepared_now(Cell(name, gates, states, function), kind, dtype)


# All that `torch.compiler.assume_constant_result` does, but for importing the compiler, which takes
# a second.
_prepared_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _prepared_now(cell: Cell, kind: str, dtype: torch.dtype) -> str | None:
    in_double = dtype == torch.float64
    if cell in _compiled[in_double]:
        return _keys[cell]
    forced = _asked_for()
    compiled = kind == "cpu" and forced in (None, "cpu", "reference")
    if not compiled and cell in _keys:
        return _keys[cell]
    with _preparing:
        if cell not in _compiled[in_double] and (cell, compiled) not in _refused:
            _prepare(cell, compiled, in_double)
    reason = _refused.get((cell, compiled))
    if reason is None:
        return _keys[cell]
    if forced not in (None, "reference"):
        raise plan.KernelRefused(f"kernel {forced!r} was asked for but refuses: {reason}")
    return None


def _prepare(cell: Cell, compiled: bool, in_double: bool) -> None:
    try:
        _keys[cell] = _load(cell, in_double) if compiled else _add_facts(cell)
        if compiled:
            _compiled[in_double].add(cell)
    except (Underivable, jit.CompilationFailed) as error:
        reason = f"cell {cell.name!r} is not compiled: {error}"
        _refused[cell, compiled] = reason
        if isinstance(error, Underivable):
            _refused[cell, not compiled] = reason
        warnings.warn(
            f"cell {cell.name!r} runs as a loop of torch operations, many times slower than "
            f"compiled: {error}",
            UserWarning,
            stacklevel=_callers_level(),
        )


def _add_facts(cell: Cell) -> str:
    """Make the op know a cell without code of its own for CPUs."""
    key, derived = emit_cpp.key(cell), derive(cell)
    tied = sum(tied << gate for gate, tied in enumerate(derived.tied))
    sizes = len(derived.gates), len(derived.states), len(derived.kept)
    try:
        _C.add_cell_facts(key, *sizes, tied, derived.projectable)
    except RuntimeError as error:
        raise Underivable(str(error)) from error
    _prepared[key] = cell
    return key


def _load(cell: Cell, in_double: bool) -> str:
    """Compile a cell for the instruction set in use, unless the op knows such code already."""
    key = emit_cpp.key(cell)
    if not _C.has_code(key, in_double):
        derived, number = derive(cell), "double" if in_double else "float"
        library = jit.compile_cell(derived, key, number)
        try:
            _C.load_cells(str(library), jit.SYMBOL)
        except RuntimeError as damaged:
            library = jit.compile_cell(derived, key, number, fresh=True)
            try:
                _C.load_cells(str(library), jit.SYMBOL)
            except RuntimeError:
                raise jit.CompilationFailed(f"it cannot be loaded: {damaged}") from damaged
    _prepared[key] = cell
    return key


def _callers_level() -> int:
    """`stacklevel` of the first frame that belongs neither to this package nor to torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "fastrnn",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level


def _find(key: str, kind: str, in_double: bool) -> None:
    """Prepare the declared cell that an exported program knows by `key`, or one that is known but
    not compiled in this number; if only the reference can run it, the op has it run that."""
    cell = _prepared.get(key)
    if cell is None:
        name, _, digest = key.rpartition("-")
        if not digest or name not in cells.names():
            return
        cell = cells.get(name)
    dtype = torch.float64 if in_double else torch.float32
    if _prepared_now(cell, kind, dtype) is None and (cell, False) not in _refused:
        _add_facts(cell)


def _asked_for() -> str | None:
    """The one kernel that the user allows."""
    return _forced[-1] if _forced else os.environ.get("FASTRNN_KERNEL") or None


def device(
    kind: str = "cpu", threads: int | None = None, compiled: bool = True, index: int | None = None
) -> plan.Device:
    """What this machine offers to a call of `threads` threads, torch's number by default, on the
    current device of its kind or the one of that index."""
    return plan.Device(
        kind=kind,
        **_triton_facts(kind, index, triton_scan.interpreted())
        | _cuda_facts(kind, index, cuda_scan.library()),
        tf32=gpu_scan.tf32_allowed(),
        threads=torch.get_num_threads() if threads is None else threads,
        vector_bytes=_C.vector_bytes(),
        l2_bytes=_l2_bytes(),
        compiled=compiled,
        forced=_asked_for(),
    )


@cache
def _triton_facts(kind: str, index: int | None, interpreted: bool) -> dict[str, Any]:
    """What `plan.Device` tells about Triton."""
    if importlib.util.find_spec("triton") is None:
        return {}
    facts: dict[str, Any] = {"triton": None, "interpreted": interpreted}
    if kind in ("cuda", "xpu") and getattr(torch, kind).is_available():
        properties = getattr(torch, kind).get_device_properties(index)
        for name, known in {
            "shared_bytes": ("shared_memory_per_block_optin", "local_mem_size"),
            "warp": ("warp_size",),
        }.items():
            values = [getattr(properties, k) for k in known if hasattr(properties, k)]
            facts |= {name: int(values[0])} if values else {}
    return facts


# A simulator has the multiprocessors and clusters that tests ask for.
_SIMULATED = {
    "simulated": True,
    "capability": 90,
    "multiprocessors": 132,
    "shared_bytes": 227 << 10,
    "clusters": ((2, 66), (4, 32), (8, 15), (16, 6)),
}


@cache
def _cuda_facts(kind: str, index: int | None, library: cuda_scan.Library | str) -> dict[str, Any]:
    """What `plan.Device` tells about the CUDA kernels."""
    if isinstance(library, str):
        return {"cuda": library}
    facts: dict[str, Any] = {"cuda": None, "cuda_cells": library.cells}
    if library.simulated:
        return facts | _SIMULATED
    if kind != "cuda" or not torch.cuda.is_available():
        return facts
    if torch.version.hip is not None:
        return {"cuda": "it runs on NVIDIA's GPUs, and torch is built for AMD's"}
    with torch.cuda.device(index):
        properties: Any = torch.cuda.get_device_properties(index)
        shared = int(properties.shared_memory_per_block_optin)
        counts = [(n, library.resident_clusters(n, 256, shared)) for n in (2, 4, 8, 16)]
    return facts | {
        "capability": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "shared_bytes": shared,
        "registers": int(properties.regs_per_multiprocessor),
        "clusters": tuple((blocks, count) for blocks, count in counts if count > 0),
    }


@cache
def _l2_bytes() -> int:
    """L2 cache of a core; 1 MiB where the system does not tell."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    try:
        return int(size.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 1 << 20


def _plan(
    *,
    dtype: str,
    device: str,
    threads: int,
    compiled: bool,
    **rest: Any,
) -> tuple[str, bool, int, int, int, int]:
    problem = plan.Problem(dtype=_DTYPES.get(dtype, dtype), **rest)
    machine = _device(device, threads, compiled)
    chosen = plan.choose(problem, machine)
    if "plan" in os.environ.get("FASTRNN_LOG", "") and (problem, machine) not in _logged:
        _logged.add((problem, machine))
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
    call = _Call(*inputs)
    if kernel not in _SWEEPS:
        return _reference_forward(call, tape)
    given = _with_scans(call)
    y, states, kept = gpu_scan.forward(_SWEEPS[kernel], *_for_gpu(given, kernel, tape=tape), tape)
    return y, [s[0] for s in states] if given is not call else states, kept


def _backward(
    kernel: str,
    inputs: tuple[Any, ...],
    grads: list[Tensor | None],
    y: Tensor,
    tape: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    call = _Call(*inputs)
    if kernel not in _SWEEPS:
        # By autograd of the reference, which needs no tape.
        return _gradients(call, grads, needs, create_graph=False)
    replays = isinstance(_SWEEPS[kernel], gpu_scan.ReplayingSweeps)
    if tape.size(2) and not tape.size(0) and y.numel() and not replays:
        tape = _forward(kernel, inputs, True)[2]
    given = _with_scans(call)
    if given is call:
        operands = _for_gpu(call, kernel, tape=True, backward=True)
        return gpu_scan.backward(_SWEEPS[kernel], *operands, grads, y, tape, needs)
    operands = _for_gpu(given, kernel, tape=True, backward=True)
    grads = [grads[0], *[None if g is None else g.unsqueeze(0) for g in grads[1:]]]
    found = gpu_scan.backward(_SWEEPS[kernel], *operands, grads, y, tape, needs)
    states = len(call.s0) if needs[5] else 0
    return found[: len(found) - states] + [g[0] for g in found[len(found) - states :]]


def _with_scans(call: _Call) -> _Call:
    """One step [B, I] as the sweeps know it, with states [1, B, *]; other calls as they are."""
    if call.x.dim() == 3 or call.batch_sizes is not None:
        return call
    return call._replace(s0=[s.unsqueeze(0) for s in call.s0])


# The kernels for GPUs, which are launched from Python.
_SWEEPS: dict[str, gpu_scan.Sweeps] = {"cuda": cuda_scan.sweeps, "triton": triton_scan.sweeps}


def _for_gpu(
    call: _Call, kernel: str, *, tape: bool, backward: bool = False
) -> tuple[Derived, plan.Plan, gpu_scan.Operands]:
    """The cell's derivation, the plan and the operands."""
    cell, x = _prepared[call.cell], call.x
    derived = derive(cell)
    problem = plan.Problem(
        cell=call.cell,
        steps=x.size(0) if x.dim() == 3 else 1,
        batch=call.s0[0].size(1) if call.s0 else x.size(-2),
        inputs=x.size(-1),
        hidden=call.w_hh[0].size(0) // len(cell.gates),
        gates=len(cell.gates),
        states=len(cell.states),
        lanes=len(call.w_hh),
        dtype=str(x.dtype).removeprefix("torch."),
        tape=tape,
        backward=backward,
        projected=bool(call.w_hr),
        projectable=derived.projectable,
    )
    # The kernel was chosen for the current device, which may be another one than the tensors'.
    machine = replace(device(x.device.type, index=x.device.index), forced=kernel)
    chosen = plan.choose(problem, machine)
    return derived, chosen, gpu_scan.Operands(*call)


def _reference_forward(call: _Call, tape: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    cell, x = _prepared[call.cell], call.x
    _, states, kept = _C.cell_facts(call.cell)
    hidden = call.w_hh[0].size(0) // len(cell.gates)
    rows = x.shape[:-1].numel() if tape else 0
    layout = x.new_zeros(rows, len(call.w_hh), states - 1 + kept + bool(call.w_hr), hidden)
    first = _first_rows(call)

    def record(
        p: int, t: int, u: Tensor, v: Tensor, before: list[Tensor], after: list[Tensor]
    ) -> None:
        values = after[1:]
        if kept:
            gates = u.split(hidden, -1), v.split(hidden, -1)
            values += derive(cell).forward(*gates, before)[1]
        if call.w_hr:
            values.append(after[0])
        for k, value in enumerate(values):
            if call.lengths is not None:
                value = torch.where((call.lengths > t).unsqueeze(-1), value, 0)
            layout[first[t] : first[t] + value.size(0), p, k] = value

    y, last = reference.scan(cell, *call[1:], record=record if tape else None)
    return y, last, layout


def _first_rows(call: _Call) -> list[int]:
    """First row of every time step."""
    if call.batch_sizes is not None:
        return [0, *call.batch_sizes.cumsum(0).tolist()]
    x = call.x
    return [t * x.size(1) for t in range(x.size(0))] if x.dim() == 3 else [0]


def _differentiable_backward(
    inputs: tuple[Any, ...], grads: list[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    return _gradients(_Call(*inputs), grads, needs, create_graph=True)


def _gradients(
    call: _Call, grads: list[Tensor | None], needs: Sequence[bool], create_graph: bool
) -> list[Tensor]:
    def alias(tensor: Tensor) -> Tensor:
        # One tensor may stand in several places (tied weights): each has a gradient of its own.
        return tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()

    need_x, *need_lists = needs[0], needs[1], needs[2], needs[3], needs[3], needs[4], needs[5]
    lists = [call.w_ih, call.w_hh, call.b_ih, call.b_hh, call.w_hr, call.s0]
    with torch.enable_grad():
        x = alias(call.x) if need_x else call.x
        lists = [
            [alias(t) if need else t for t in tensors]
            for tensors, need in zip(lists, need_lists, strict=True)
        ]
        w_ih, w_hh, b_ih, b_hh, w_hr, s0 = lists
        y, states = reference.scan(
            _prepared[call.cell],
            *(x, w_ih, w_hh, b_ih, b_hh, w_hr, s0),
            *(call.batch_sizes, call.lengths, call.resets, call.reverse),
        )
        wanted = [x] if need_x else []
        for tensors, need in zip(lists, need_lists, strict=True):
            wanted += tensors if need else []
        reached = [
            (out, grad)
            for out, grad in zip([y, *states], grads, strict=True)
            if grad is not None and out.requires_grad
        ]
        if not reached:
            return [torch.zeros_like(t) for t in wanted]
        found = torch.autograd.grad(
            [out for out, _ in reached],
            wanted,
            [grad for _, grad in reached],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return list(found)


_device = device  # `_plan` takes an argument of that name
_C.set_callbacks(_plan, _find, _forward, _backward, _differentiable_backward)
