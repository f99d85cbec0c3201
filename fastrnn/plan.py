"""One pure plan: which kernel runs a problem on a device, and how.

Everything that is decided is decided here, from numbers alone: no torch, no state, no device is
touched, so that decisions about any machine are tested on any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Device", "KernelRefused", "Plan", "Problem", "choose"]


@dataclass(frozen=True)
class Problem:
    """One call of `scan` or `scan_backward`."""

    cell: str
    steps: int  # T
    batch: int  # B
    inputs: int  # I
    hidden: int  # H
    gates: int  # G
    states: int = 1  # S
    lanes: int = 1  # P, independent scans: directions, heads
    rows: int = -1  # live rows; T*B unless packed or with lengths
    dtype: str = "float32"
    tape: bool = False  # keeps what BPTT needs
    backward: bool = False
    frozen: bool = False  # weights were packed before the call
    projected: bool = False  # state 0 goes through weight_hr
    projectable: bool = True  # the cell reads state 0 through `v` alone

    @property
    def live_rows(self) -> int:
        return self.steps * self.batch if self.rows < 0 else self.rows

    @property
    def itemsize(self) -> int:
        """Bytes of a number as computed."""
        return 8 if self.dtype == "float64" else 4


@dataclass(frozen=True)
class Device:
    """What a machine offers to one call."""

    kind: str = "cpu"
    threads: int = 1
    vector_bytes: int = 16
    l2_bytes: int = 1 << 20  # of one core
    compiled: bool = True  # this cell has compiled code for this device
    forced: str | None = None  # the one kernel the user allows


@dataclass(frozen=True)
class Plan:
    """How a problem runs. Fields past `kernel` are for the CPU kernel."""

    kernel: str
    packed_weights: bool = True  # False: few rows, weights are read once, as they lie
    split_lanes: int = 1  # threads = split_lanes * split_slots * split_units
    split_slots: int = 1
    split_units: int = 1
    chunk_rows: int = 1  # rows a thread projects, or all differentiate, at a time
    refused: tuple[tuple[str, str], ...] = ()  # kernels that came before, and why not them

    @property
    def threads(self) -> int:
        return self.split_lanes * self.split_slots * self.split_units


class KernelRefused(RuntimeError):
    """The kernel that was asked for by name cannot run this problem."""


def choose(problem: Problem, device: Device) -> Plan:
    """The plan for `problem` on `device`: the first kernel that does not refuse.

    Raises:
        KernelRefused: when `device.forced` names a kernel and it refuses.
        ValueError: when `device.forced` names no kernel.
    """
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


# cpu: SIMD sweep in C++ (csrc/cpu_scan.cpp)

_CPU_DTYPES = ("float32", "float64", "bfloat16", "float16")
# A weight read as it lies costs one pass; packing costs about three more before any row is done.
_UNPACKED_ROWS = 3
# Below this many multiply-adds the wake-up and hand-over of threads cost more than they save.
_WORK_FOR_THREADS = 1 << 17
_STEP_WORK_FOR_UNIT_SPLIT = 1 << 13
_FORWARD_SHARE = 4  # of the cache: u for a quarter, weights and h for the rest
# Read from a core's cache in about 0.9 us; handing a part over to another thread takes 0.2.
_STEP_BYTES_PER_THREAD = 1 << 17
_BACKWARD_ROWS = 512  # depth at which the products for weight gradients are efficient


def _cpu_refuse(problem: Problem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"it runs on CPUs, the tensors are on {device.kind}"
    if not device.compiled:
        return f"there is no compiled code for cell {problem.cell!r}"
    if problem.dtype not in _CPU_DTYPES:
        return f"it computes {', '.join(_CPU_DTYPES)}, not {problem.dtype}"
    if problem.projected and not problem.projectable:
        return f"cell {problem.cell!r} reads state 0 unit by unit, so it cannot be projected"
    return None


def _cpu_configure(problem: Problem, device: Device) -> Plan:
    lanes, slots, units = _cpu_split(problem, device)
    return Plan(
        kernel="cpu",
        packed_weights=(problem.frozen or problem.backward or problem.live_rows > _UNPACKED_ROWS),
        split_lanes=lanes,
        split_slots=slots,
        split_units=units,
        chunk_rows=_cpu_chunk_rows(problem, device),
    )


def _cpu_split(problem: Problem, device: Device) -> tuple[int, int, int]:
    """Threads over lanes, slots and units. Lanes and slots need no exchange, so they come first;
    units are shared only when a step is worth a hand-over."""
    depth = problem.hidden if problem.backward else problem.hidden + problem.inputs
    per_row = problem.gates * problem.hidden * depth
    if device.threads <= 1 or per_row * problem.live_rows * problem.lanes < _WORK_FOR_THREADS:
        return 1, 1, 1
    lanes = math.gcd(problem.lanes, device.threads)
    left = device.threads // lanes
    slots = min(left, problem.batch)
    if slots < left and problem.steps > 1:
        slots = 1 if problem.batch < 2 * left else slots
    left //= slots
    vectors = -(-problem.hidden * problem.itemsize // device.vector_bytes)
    unit_vectors = max(1, 4 // problem.gates) if not problem.backward else 1
    panels = -(-vectors // unit_vectors)
    step_work = problem.gates * problem.hidden * problem.hidden * problem.batch // slots
    units = min(left, panels) if step_work >= _STEP_WORK_FOR_UNIT_SPLIT else 1
    return lanes, slots, units


def step_threads(weight_bytes: int, device: Device) -> int:
    """Threads for a stepper, of those it may have: each should read enough weights in a step."""
    return max(1, min(device.threads, weight_bytes // _STEP_BYTES_PER_THREAD))


def _cpu_chunk_rows(problem: Problem, device: Device) -> int:
    """What is projected or differentiated at a time should stay in a core's cache."""
    row = max(1, problem.gates * problem.hidden * problem.itemsize)
    if problem.backward:
        return max(device.l2_bytes // row, _BACKWARD_ROWS)
    return max(1, device.l2_bytes // (_FORWARD_SHARE * row))


# reference: torch operations (fastrnn/reference.py); refuses nothing


def _reference_refuse(problem: Problem, device: Device) -> str | None:
    return None


def _reference_configure(problem: Problem, device: Device) -> Plan:
    return Plan(kernel="reference")


_Refuse = Callable[[Problem, Device], "str | None"]
_Configure = Callable[[Problem, Device], Plan]

# In order of preference.
_KERNELS: dict[str, tuple[_Refuse, _Configure]] = {
    "cpu": (_cpu_refuse, _cpu_configure),
    "reference": (_reference_refuse, _reference_configure),
}
KERNELS = tuple(_KERNELS)
