"""Plans of the CPU kernel: a SIMD sweep in C++ (csrc/cpu/kernels.cpp)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastrnn.plan import dtypes
from fastrnn.plan.problem import CpuConfig, Device, Plan, Problem

__all__ = ["configure", "refuse", "step_threads"]

# In more steps weights are packed, whatever the number of rows.
_FEW_STEPS = 4
_LARGE_WEIGHTS = 8 << 20


@dataclass(frozen=True)
class _Few:
    """Up to how many rows of a call weights are read as they lie, since packing them takes longer:
    pairs of a number of rows and the bytes of recurrent weights from which on it counts."""

    inference: tuple[tuple[int, int], ...]
    training: tuple[tuple[int, int], ...]  # its forward pass: packed copies need caches, too
    backward: tuple[tuple[int, int], ...]
    batch: int | None = None  # the most sequences of a forward pass

    def most(self, problem: Problem, weight_bytes: int) -> int:
        forward = self.training if problem.tape else self.inference
        levels = self.backward if problem.backward else forward
        return next(rows for rows, least in reversed(levels) if weight_bytes >= least)


# Measured on a Zen 4 with AVX-512, and with AVX2 and SSE2, whose squares of weights, transposed,
# leave fewer registers for the sums of rows.
_FEW = _Few(
    inference=((8, 0), (32, _LARGE_WEIGHTS)),
    training=((8, 0), (32, _LARGE_WEIGHTS)),
    backward=((128, 0), (8, _LARGE_WEIGHTS)),
)
_FEW_NARROW = _Few(
    inference=((4, 0), (8, _LARGE_WEIGHTS)),
    training=((4, 0), (8, 2 << 20)),
    backward=((128, 0), (12, 2 << 20), (4, _LARGE_WEIGHTS)),
    batch=4,
)
# With fewer multiply-adds, waking up and synchronizing threads costs more than it saves.
_WORK_FOR_THREADS = 1 << 17
_STEP_WORK_FOR_UNIT_SPLIT = 1 << 13  # multiply-adds in float32, as the two above
# A thread whose core serves other work waits for some time slices, about 10 ms. With fewer
# multiply-adds than one thread does in that time, a second thread is worth less than the wait.
_WORK_FOR_CONTENDED_THREADS = 1 << 29
# Fewer rows of a thread do not pay for reading weights that exceed its cache.
_ROWS_FOR_SEQUENCE_SPLIT = 4
# What meeting costs two threads, as bytes that one could read from the other's cache meanwhile.
_BYTES_OF_A_MEETING = 1 << 10
_UNITS_OF_A_BLOCK = 64  # of reductions, in csrc/cpu/reductions.h
_FORWARD_SHARE = 4  # u gets a quarter of the cache; weights and h get the rest
# A core reads these from its cache in about 0.9 us; handing work to another thread takes 0.2 us.
_STEP_BYTES_PER_THREAD = 1 << 17
_BACKWARD_ROWS = 384  # depth at which the products for weight gradients are efficient


def refuse(problem: Problem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"it runs on CPUs, the tensors are on {device.kind}"
    if not device.cpu.compiled:
        return f"there is no compiled code for cell {problem.cell!r}"
    if (reason := dtypes.unsupported(problem.dtype)) is not None:
        return reason
    if problem.projected and not problem.projectable:
        return f"cell {problem.cell!r} reads state 0 unit by unit, so it cannot be projected"
    if problem.projected and problem.stages > 1 and problem.hidden == 0:
        return "there are no hidden units to reduce over"
    return None


def configure(problem: Problem, device: Device) -> Plan:
    weights = "prepacked" if problem.frozen or problem.stages > 1 else _weights(problem, device)
    recurrences, sequences, units = _split(problem, device, shared=weights == "prepacked")
    config = CpuConfig(
        weights,
        split_recurrences=recurrences,
        split_sequences=sequences,
        split_units=units,
    )
    return Plan("cpu", config, chunk_rows=_chunk_rows(problem, device))


def _weights(problem: Problem, device: Device) -> str:
    """The layout in which a call reads weights that were not packed before it.

    Packing costs about three passes over the weights. In torch's layout the forward pass
    transposes them for every tile of rows, the backward pass does not.
    """
    size = _recurrent_bytes(problem)
    few = _FEW if device.cpu.vector_bytes > 32 else _FEW_NARROW
    few_steps = problem.steps <= _FEW_STEPS and problem.products.in_torchs_layout
    few_sequences = problem.backward or few.batch is None or problem.batch <= few.batch
    if few_steps and few_sequences and problem.live_rows <= few.most(problem, size):
        return "unpacked"
    panels = 0 if problem.backward else 2 if size >= _LARGE_WEIGHTS else 1
    return "panels" if problem.steps <= panels else "prepacked"


def _recurrent_bytes(problem: Problem) -> int:
    recurrent = problem.gates_of_v * problem.hidden * problem.hidden
    return recurrent * problem.products.weight_bytes


def _split(problem: Problem, device: Device, shared: bool) -> tuple[int, int, int]:
    """Threads over recurrences, sequences and units.

    Recurrences need no exchange, so they are split first. Threads that share sequences need none
    in the steps, but each reads what the others packed, and if threads do not share packed weights,
    or have few sequences and larger weights than their cache holds, each reads all of them. Units
    are split if that takes longer than their exchanges, if a step has enough work to pay for
    the synchronization, and if all threads have cores: each exchange waits for the latest.
    """
    threads = device.cpu.threads
    contended = device.cpu.contended
    depth = problem.gates_of_v * problem.hidden
    if not problem.backward or problem.gates_of_v == 0:  # the products that decide
        depth += problem.gates_of_u * problem.inputs
    per_row = problem.hidden * depth // problem.products.products
    least = _WORK_FOR_CONTENDED_THREADS if contended else _WORK_FOR_THREADS
    if threads <= 1 or per_row * problem.live_rows * problem.recurrences < least:
        return 1, 1, 1
    recurrences = math.gcd(problem.recurrences, threads)
    remaining = threads // recurrences
    sequences = min(remaining, problem.batch) if shared else 1
    if _recurrent_bytes(problem) >= device.cpu.l2_bytes:
        sequences = max(1, min(sequences, problem.batch // _ROWS_FOR_SEQUENCE_SPLIT))
    if sequences < remaining and problem.steps > 1:
        sequences = 1 if problem.batch < 2 * remaining else sequences
    if contended:
        return recurrences, sequences, 1
    units = _units(problem, device, remaining, sequences=1)
    if units == remaining and _exchanged(problem, units) < _handed_over(problem):
        return recurrences, 1, units
    return recurrences, sequences, _units(problem, device, remaining // sequences, sequences)


def _units(problem: Problem, device: Device, threads: int, sequences: int) -> int:
    """Over how many of these threads units are split, each for a part of the sequences."""
    work = problem.gates_of_v * problem.hidden * problem.hidden * problem.batch // sequences
    step_work = work // problem.products.products // problem.stages  # between two exchanges
    most = _unit_parts(problem, device)
    return min(threads, most) if step_work >= _STEP_WORK_FOR_UNIT_SPLIT else 1


def _handed_over(problem: Problem) -> int:
    """Bytes of weights that a call packs. Of n threads that share sequences, each reads all but an
    n-th of them from the caches of the others."""
    if problem.frozen:
        return 0
    columns = problem.gates_of_u * problem.inputs + problem.gates_of_v * problem.hidden
    return columns * problem.hidden * problem.products.weight_bytes


def _exchanged(problem: Problem, threads: int) -> int:
    """Bytes that a call exchanges if threads share units: each reads as large a part of them.

    The forward pass of training is split as the backward pass, which reads what it wrote.
    """
    training = problem.backward or problem.tape
    numbers = problem.gates_of_v * problem.hidden if training else problem.hidden
    rows = problem.live_rows * numbers * problem.itemsize
    meetings = problem.steps * (threads - 1) * _BYTES_OF_A_MEETING
    return problem.stages * (rows + meetings)


def _unit_parts(problem: Problem, device: Device) -> int:
    """The most parts that units can be cut into."""
    if problem.stages > 1:
        return -(-problem.hidden // _UNITS_OF_A_BLOCK)
    vectors = -(-problem.hidden * problem.itemsize // device.cpu.vector_bytes)
    return -(-vectors // (1 if problem.backward else _unit_vectors(problem)))


def _unit_vectors(problem: Problem) -> int:
    """Vectors of units in a panel, as in csrc/cpu/prepacked.h."""
    of_u, of_v = problem.gates_of_u, problem.gates_of_v
    return next((n for n in (4, 2) if n * of_v <= 4 and n * of_u <= 6), 1)


def step_threads(weight_bytes: int, device: Device, stages: int = 1) -> int:
    """Threads for a stepper: few enough that each reads `_STEP_BYTES_PER_THREAD` in a step."""
    if stages > 1:
        return 1
    return max(1, min(device.cpu.threads, weight_bytes // _STEP_BYTES_PER_THREAD))


def _chunk_rows(problem: Problem, device: Device) -> int:
    """Rows of a chunk: what is projected or differentiated at a time should fit a core's cache."""
    gates = problem.gates_of_u
    if problem.backward and not problem.all_summed:  # du and dv
        gates += problem.gates_of_v
    row = max(1, gates * problem.hidden * problem.itemsize)
    if problem.backward:
        return max(device.cpu.l2_bytes // row, _BACKWARD_ROWS)
    return max(1, device.cpu.l2_bytes // (_FORWARD_SHARE * row))
