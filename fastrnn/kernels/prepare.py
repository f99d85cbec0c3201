"""The key by which the operator knows a cell, which is derived and compiled on its first use.

Most programs use built-in cells alone. So the compiler, whose import takes as long as that of all
else, is imported where a cell needs it (`registration.py`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastrnn import cells, plan
from fastrnn.cells import Cell, Param
from fastrnn.extension import _C
from fastrnn.kernels.device import asked_for, current
from fastrnn.kernels.operands import Weights

__all__ = ["OnCpu", "cell_of", "find", "on_cpu", "prepare", "prepared_now"]

_prepared: dict[str, Cell] = {name: cells.get(name) for name in cells.names()}
_keys: dict[Cell, str] = {cell: name for name, cell in _prepared.items()}
# Keys of cells with code for CPUs, by the format of its products.
_compiled: dict[str, dict[Cell, str]] = {format: _keys.copy() for format in _C.formats()}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The format of each dtype; float32 for all others, and for those on other devices.
_FORMATS = {d: _C.format_of(torch.empty(0, dtype=d, device="cpu")) for d in _DTYPES}
# Why a cell has no code for CPUs (cell, True), or is unknown to the operator (cell, False).
_refused: dict[tuple[Cell, bool], str] = {}
_preparing = threading.Lock()


def prepare(cell: Cell, kind: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """The key by which the operator knows `cell`, or None if only the reference can run it on
    devices of this kind.

    A custom cell is derived on its first use. It is compiled on its first use on a CPU, once for
    each format of products, which follows from the dtype; kernels for GPUs need no C++ compiler.
    If that fails, a warning says why.

    Raises:
        plan.KernelRefused: if that fails and another kernel was asked for by name.
    """
    if torch.compiler.is_compiling():
        # The compiler of torch 2.11 does not accept a whole cell as a constant, but its parts.
        names, kinds = tuple(cell.params), tuple(p.kind for p in cell.params.values())
        gates = cell.gates, cell.inputs, cell.recurrent
        parts = cell.name, gates, cell.states, cell.function, names, kinds, cell.noise
        key, failure = _prepared_once(*parts, kind, dtype)
        if failure:
            raise RuntimeError(failure)  # or, without fullgraph, eager code raises its own error
        return key
    return prepared_now(cell, kind, dtype)


def _prepared_once(
    name: str,
    gates: tuple[tuple[str, ...], ...],
    states: tuple[str, ...],
    function: Callable[..., Any],
    params: tuple[str, ...],
    kinds: tuple[str, ...],
    noise: bool,
    kind: str,
    dtype: torch.dtype,
) -> tuple[str | None, str]:
    """The key of a cell, and why that failed: what is raised here, Dynamo takes for its own
    failure."""
    learned = {n: Param(param) for n, param in zip(params, kinds, strict=True)}
    every, inputs, recurrent = gates
    rows: Any = {"inputs": inputs, "recurrent": recurrent}
    cell = Cell(name, every, states, function, learned, noise=noise, **rows)
    try:
        return prepared_now(cell, kind, dtype), ""
    except Exception as error:  # of the cell's function, too
        return None, f"{type(error).__name__}: {error}"


# This is what `torch.compiler.assume_constant_result` does, without the import of the compiler,
# which takes a second.
_prepared_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def prepared_now(
    cell: Cell, kind: str, dtype: torch.dtype, format: str | None = None
) -> str | None:
    """`prepare` for a caller that knows that torch is not compiling, since asking takes time. The
    format of products is that of the dtype unless it is given."""
    if format is None:
        format = _FORMATS.get(dtype, "float32")
    if (key := _compiled[format].get(cell)) is not None:
        return key
    forced = asked_for()
    compiled = kind == "cpu" and forced in (None, "cpu", "reference")
    if not compiled and cell in _keys:
        return _keys[cell]
    with _preparing:
        if cell not in _compiled[format] and (cell, compiled) not in _refused:
            _prepare(cell, format if compiled else None)
    reason = _refused.get((cell, compiled))
    if reason is None:
        return _keys[cell]
    if forced not in (None, "reference"):
        raise plan.KernelRefused(f"kernel {forced!r} was asked for but refuses: {reason}")
    return None


class OnCpu(NamedTuple):
    """Whether the CPU kernel runs a layer.

    Attributes:
        key: the key by which the operator knows the cell, or None if it has no code for CPUs.
        refusal: why the kernel does not run the layer, or None.
        problem, device: the input of that decision.
        format: the format of products.
    """

    key: str | None
    refusal: str | None
    problem: plan.Problem
    device: plan.Device
    format: str


def on_cpu(
    cell: Cell,
    weights: Weights,
    threads: int | None = None,
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
) -> OnCpu:
    """Whether the CPU kernel runs a layer with the weights of this recurrence, by default in the
    format of their dtype, for input of `dtype`, by default theirs."""
    w_ih = weights.w_ih
    dtype = dtype or w_ih.dtype
    format = format or _FORMATS.get(dtype, "float32")
    key = prepared_now(cell, w_ih.device.type, dtype, format)
    device = current(w_ih.device.type, threads, compiled=key is not None)
    problem = plan.Problem(
        cell=cell.name,
        steps=1,
        batch=1,
        inputs=w_ih.size(1),
        hidden=cell.hidden_size(w_ih),
        gates=len(cell.gates),
        input_gates=len(cell.inputs),
        recurrent_gates=len(cell.recurrent),
        dtype=str(dtype).removeprefix("torch."),
        format=format,
        stages=_stages(cell) if key is not None else 1,
        projected=weights.w_hr is not None,
        projectable=weights.w_hr is None or key is None or _projectable(cell),
    )
    return OnCpu(key, plan.refusal("cpu", problem, device), problem, device, format)


def _prepare(cell: Cell, format: str | None) -> None:
    """Compile the cell in a format, or make it known without code for CPUs."""
    from fastrnn.kernels import registration  # and with it the compiler

    compiled = format is not None
    made = registration.register(cell, format)
    if made.key is None:
        reason = f"cell {cell.name!r} is not compiled: {made.reason}"
        _refused[cell, compiled] = reason
        if not made.derived:
            _refused[cell, not compiled] = reason
        return
    _prepared[made.key] = cell
    _keys[cell] = made.key
    if format is not None:
        _compiled[format][cell] = made.key


def _add_facts(cell: Cell) -> None:
    from fastrnn.kernels import registration

    _prepared[registration.add_facts(cell)] = cell


def _stages(cell: Cell) -> int:
    """The number of stages of a step. Those of built-in cells are known without the compiler."""
    if cell.is_built_in:
        return 1
    from fastrnn.compiler.derive import derive

    return derive(cell).stages


def _projectable(cell: Cell) -> bool:
    """Whether kernels may project the output. Layers refuse the built-in cells that they may not
    project."""
    if cell.is_built_in:
        return True
    from fastrnn.compiler.derive import derive

    return derive(cell).projectable


def find(key: str, kind: str, format: str) -> None:
    """Prepare the cell that an exported program knows by `key`, or one that is known but has no
    code in this format. A cell that only the reference can run is registered without code."""
    cell = _prepared.get(key)
    if cell is None:
        try:
            cell = cells.get(key.rpartition("-")[0])
        except ValueError:
            return
    if prepared_now(cell, kind, torch.float32, format) is None and (cell, False) not in _refused:
        _add_facts(cell)


def cell_of(key: str) -> Cell:
    """The prepared cell that the operator knows by `key`."""
    return _prepared[key]
