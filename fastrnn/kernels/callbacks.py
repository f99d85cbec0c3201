"""The Python functions that the compiled operator calls.

It asks for a plan when it sees a shape on a CPU for the first time, and for a cell that it does not
know yet. All other kernels are Python's: `launched.py` plans and launches them. A CPU needs none of
these, so their import waits for the first such call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastrnn import plan
from fastrnn.extension import _C
from fastrnn.kernels import device as machine
from fastrnn.kernels.prepare import find
from fastrnn.plan.dtypes import NAMES

__all__: list[str] = []


def _cpu_plan(
    *, dtype: str, threads: int, contended: bool, compiled: bool, **problem: Any
) -> tuple[int, int, int, int, int] | None:
    """The fields of C++'s `CpuPlan` for a call on a CPU, or None if another kernel runs it."""
    offered = machine.current("cpu", threads, compiled, contended=contended)
    asked = plan.Problem(dtype=NAMES.get(dtype, dtype), **problem)
    chosen = plan.choose(asked, offered)
    if chosen.kernel != "cpu":
        return None
    machine.log(asked, offered, chosen)
    config = chosen.cpu
    split = config.split_recurrences, config.split_sequences, config.split_units
    return plan.WEIGHT_LAYOUTS.index(config.weights), *split, chosen.chunk_rows


def _forward(inputs: tuple[Any, ...], tape: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    from fastrnn.kernels import launched

    return launched.forward(inputs, tape)


def _backward(
    inputs: tuple[Any, ...],
    grads: list[Tensor | None],
    y: Tensor,
    tape: Tensor,
    needs: Sequence[bool],
) -> list[Tensor] | None:
    from fastrnn.kernels import launched

    return launched.backward(inputs, grads, y, tape, needs)


def _reference_backward(
    inputs: tuple[Any, ...],
    grads: list[Tensor | None],
    needs: Sequence[bool],
    differentiable: bool,
) -> list[Tensor]:
    from fastrnn.kernels import launched

    return launched.reference_backward(inputs, grads, needs, differentiable)


_C.set_callbacks(
    plan=_cpu_plan,
    find=find,
    forward=_forward,
    backward=_backward,
    reference_backward=_reference_backward,
    significant_bits=plan.SIGNIFICANT_BITS,
)
