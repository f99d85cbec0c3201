"""One pure plan: which kernel runs a problem on a device, and how.

All decisions are made here, from numbers alone. No function imports torch, keeps state or touches
a device, so decisions about any machine are tested on any other. Each kernel has a module with two
functions: `refuse` returns why it cannot run a problem on a device, or None, and `configure`
returns the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastrnn.plan import cpu, cuda, triton
from fastrnn.plan.cpu import step_threads
from fastrnn.plan.formats import FORMATS
from fastrnn.plan.problem import (
    SIGNIFICANT_BITS,
    WEIGHT_LAYOUTS,
    CpuConfig,
    CpuFacts,
    CudaConfig,
    CudaFacts,
    Device,
    Plan,
    Problem,
    TritonConfig,
    TritonFacts,
)
from fastrnn.plan.triton import alternatives

__all__ = [
    "FORMATS",
    "KERNELS",
    "SIGNIFICANT_BITS",
    "WEIGHT_LAYOUTS",
    "CpuConfig",
    "CpuFacts",
    "CudaConfig",
    "CudaFacts",
    "Device",
    "KernelRefused",
    "Plan",
    "Problem",
    "TritonConfig",
    "TritonFacts",
    "alternatives",
    "choose",
    "refusal",
    "step_threads",
]


class KernelRefused(RuntimeError):
    """The kernel that was asked for by name cannot run this problem."""


def choose(problem: Problem, device: Device) -> Plan:
    """The plan for `problem` on `device`, of the first kernel that does not refuse.

    Raises:
        KernelRefused: if `device.forced` names a kernel that refuses.
        ValueError: if `device.forced` is not the name of a kernel.
    """
    problem = problem.rounded()
    if device.forced is not None:
        if device.forced not in _KERNELS:
            raise ValueError(f"no kernel named {device.forced!r}; there are: {', '.join(_KERNELS)}")
        refuse, configure = _KERNELS[device.forced]
        reason = refuse(problem, device)
        if reason is not None:
            raise KernelRefused(f"kernel {device.forced!r} was asked for but refuses: {reason}")
        return configure(problem, device)
    refused: list[tuple[str, str]] = []
    for name, (refuse, configure) in _KERNELS.items():
        reason = refuse(problem, device)
        if reason is None:
            return replace(configure(problem, device), refused=tuple(refused))
        refused.append((name, reason))
    raise AssertionError("the reference refuses nothing")


def refusal(kernel: str, problem: Problem, device: Device) -> str | None:
    """Why `kernel` does not run `problem` on `device`, or None if it does."""
    return _KERNELS[kernel][0](problem, device)


# The reference runs plain torch operations (fastrnn/kernels/reference.py) and refuses nothing.


def _reference_refuse(problem: Problem, device: Device) -> str | None:
    return None


def _reference_configure(problem: Problem, device: Device) -> Plan:
    return Plan(kernel="reference")


_Refuse = Callable[[Problem, Device], "str | None"]
_Configure = Callable[[Problem, Device], Plan]

# In order of preference.
_KERNELS: dict[str, tuple[_Refuse, _Configure]] = {
    "cpu": (cpu.refuse, cpu.configure),
    "cuda": (cuda.refuse, cuda.configure),
    "triton": (triton.refuse, triton.configure),
    "reference": (_reference_refuse, _reference_configure),
}
KERNELS = tuple(_KERNELS)
