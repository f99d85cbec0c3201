"""The Python functions that the compiled operator calls.

It asks for a plan when it sees a shape on a CPU for the first time, and for a cell that it does not
know yet. All other kernels are Python's: `launched.py` plans and launches them. A CPU needs none of
these, so their import waits for the first such call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def _launched(name: str) -> Callable[..., Any]:
    """The function of `launched.py`, which the first call imports."""

    def call(*arguments: Any) -> Any:
        from fastrnn.kernels import launched

        return getattr(launched, name)(*arguments)

    return call


_C.set_callbacks(
    plan=_cpu_plan,
    find=find,
    forward=_launched("forward"),
    backward=_launched("backward"),
    reference_backward=_launched("reference_backward"),
    tables=_launched("tables"),
    significant_bits=plan.SIGNIFICANT_BITS,
)
