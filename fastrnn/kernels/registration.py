"""Derives and compiles a cell, and registers it with the operator."""

from __future__ import annotations

from typing import NamedTuple

from fastrnn.cells import Cell
from fastrnn.compiler import jit
from fastrnn.compiler.derive import Underivable, derive
from fastrnn.compiler.emit_cpp import key as key_of
from fastrnn.extension import _C
from fastrnn.kernels.reference import warn_of_loop

__all__ = ["Registered", "add_facts", "register"]


class Registered(NamedTuple):
    """What `register` did.

    Attributes:
        key: the key by which the operator now knows the cell, or None if that failed.
        reason: why it failed.
        derived: whether the cell could be derived, so that its compilation failed.
    """

    key: str | None
    reason: str = ""
    derived: bool = True


def register(cell: Cell, format: str | None) -> Registered:
    """Compile the cell in a format of products, or register it without code for CPUs if that is
    None. If it fails, a warning says why."""
    try:
        return Registered(add_facts(cell) if format is None else _load(cell, format))
    except (Underivable, jit.CompilationFailed) as error:
        warn_of_loop(cell.name, str(error))
        return Registered(None, str(error), not isinstance(error, Underivable))


def add_facts(cell: Cell) -> str:
    """Register a cell without code for CPUs with the operator; returns its key.

    Raises:
        Underivable: if no code can be derived from it.
    """
    key, derived = key_of(cell), derive(cell)
    try:
        _C.add_cell_facts(
            key,
            gates=len(derived.gates),
            states=len(derived.states),
            saved=len(derived.saved),
            params=len(derived.params),
            summed=sum(summed << gate for gate, summed in enumerate(derived.summed)),
            shared_params=sum(shared << k for k, shared in enumerate(derived.shared)),
            projectable=derived.projectable,
            gate_params=derived.gate_params(),
            stages=derived.stages,
            rows=len(derived.rows),
            draws=len(derived.draws),
            input_gates=len(derived.inputs),
            recurrent_gates=len(derived.recurrent),
        )
    except RuntimeError as error:
        raise Underivable(str(error)) from error
    return key


def _load(cell: Cell, format: str) -> str:
    """Compile a cell for the instruction set in use, unless the operator has this code already."""
    key = key_of(cell)
    if not _C.has_code(key, format):
        derived = derive(cell)
        library = jit.compile_cell(derived, key, format)
        try:
            _C.load_cells(str(library), jit.SYMBOL)
        except RuntimeError as damaged:
            library = jit.compile_cell(derived, key, format, fresh=True)
            try:
                _C.load_cells(str(library), jit.SYMBOL)
            except RuntimeError:
                raise jit.CompilationFailed(f"it cannot be loaded: {damaged}") from damaged
    return key
