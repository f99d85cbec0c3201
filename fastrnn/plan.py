"""One pure plan: which kernel runs a problem on a device, and how.

Everything that is decided is decided here, from numbers alone: no torch, no state, no device is
touched, so that decisions about any machine are tested on any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

__all__ = ["Device", "KernelRefused", "Plan", "Problem", "alternatives", "choose"]


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
    compiled: bool = True  # this cell has compiled code for CPUs
    forced: str | None = None  # the one kernel the user allows
    triton: str | None = "Triton is not installed"  # why this cell has no kernel in Triton
    interpreted: bool = False  # Triton runs in its interpreter
    shared_bytes: int = 48 << 10  # memory that the threads of a block may share
    warp: int = 32  # threads that run in step
    cuda: str | None = "the CUDA kernels are not built"  # why they cannot run here
    cuda_cells: tuple[str, ...] = ()  # those that they were built for
    simulated: bool = False  # the CUDA kernels run on CPUs, in the simulator of the tests
    tf32: bool = False  # float32 may be multiplied as TF32
    capability: int = 0  # of CUDA, 90 for 9.0
    multiprocessors: int = 0
    registers: int = 64 << 10  # of a multiprocessor, 32 bits each
    # (blocks, clusters of so many that run at the same time), one block to a multiprocessor
    clusters: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Plan:
    """How a problem runs. The first fields are for the CPU kernel, then come those of Triton's and,
    at last, those that only the CUDA kernels have."""

    kernel: str
    packed_weights: bool = True  # False: few rows, weights are read once, as they lie
    split_lanes: int = 1  # threads = split_lanes * split_slots * split_units
    split_slots: int = 1
    split_units: int = 1
    chunk_rows: int = 1  # rows a thread projects, or all differentiate, at a time
    resident: bool = False  # the recurrent weights stay in a program for the whole sweep
    matrix_units: bool = True  # products of tiles run there, which takes 16 rows or more
    batch_tile: int = 1  # rows of the batch in a program
    unit_tile: int = 1  # units that it computes at a time, all where weights are resident
    depth_tile: int = 1  # units of the step before that it multiplies at a time
    warps: int = 4
    stages: int = 1  # tiles of weights that are under way at a time
    registers: int = 240  # of a thread, at most
    number: str = ""  # how numbers are stored and multiplied: `Number` of csrc/sweep.h
    regime: str = ""  # where the recurrent weights stay: `Regime` of csrc/sweep.h
    blocks: int = 1  # that share the units of a tile of the batch
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


# cuda: the built-in cells in CUDA C++ (csrc/cuda_*.cu, fastrnn/cuda_scan.py)

_CUDA_NUMBERS = {"float32": "", "float64": "float64", "bfloat16": "bfloat16", "float16": "float16"}
_CUDA_STORED = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}  # bytes
_CUDA_LANES = 64  # a bit for each says which way it runs
_CUDA_CHUNK_BYTES = 64 << 20  # of u and du: a launch loads all weights, so it should be long
_CUDA_TILES = (8, 16, 32)  # rows of the batch: columns of matrix products, 8 at a time
_CUDA_CLUSTERS = (2, 4, 8, 16)
_FEW_STEPS = 2  # which end before the weights would be loaded


def _cuda_refuse(problem: Problem, device: Device) -> str | None:
    if device.kind == "cpu" and device.simulated:
        if device.forced != "cuda":
            return "on CPUs it runs in a simulator, and only when it is asked for by name"
    elif device.kind != "cuda":
        return f"it runs on NVIDIA's GPUs, the tensors are on {device.kind}"
    if device.cuda is not None:
        return device.cuda
    if problem.cell not in device.cuda_cells:
        return f"it has no code for cell {problem.cell!r}; triton runs cells of one's own"
    if problem.dtype not in _CUDA_NUMBERS:
        return f"it computes {', '.join(_CUDA_NUMBERS)}, not {problem.dtype}"
    if problem.projected:
        return "it does not project the output (proj_size)"
    if problem.hidden == 0:
        return "there are no hidden units"
    if problem.lanes > _CUDA_LANES:
        return f"it runs {_CUDA_LANES} scans side by side at most, not {problem.lanes}"
    if device.capability < 80:
        major, minor = divmod(device.capability, 10)
        return f"it needs compute capability 8.0, this GPU has {major}.{minor}"
    return None


def _cuda_configure(problem: Problem, device: Device) -> Plan:
    # Nothing depends on the other fields, so that sequences of all lengths share a plan.
    steps = min(problem.steps, _FEW_STEPS + 1)
    relevant = replace(problem, steps=steps, inputs=0, rows=-1, tape=False, frozen=False)
    return _cuda_best(relevant, replace(device, threads=1))


@lru_cache(maxsize=1024)
def _cuda_best(problem: Problem, device: Device) -> Plan:
    """The regime of the least estimated time of a step."""
    row = problem.gates * problem.hidden * problem.lanes * _CUDA_STORED[problem.dtype]
    plans = [_cuda_step(problem, device)]
    if problem.dtype != "float64" and problem.batch and problem.steps > _FEW_STEPS:
        plans += _cuda_resident(problem, device)
    best = min(plans, key=lambda plan: _cuda_cycles(problem, device, plan))
    return replace(best, chunk_rows=max(1, _CUDA_CHUNK_BYTES // row))


def _cuda_step(problem: Problem, device: Device) -> Plan:
    number = _CUDA_NUMBERS[problem.dtype] or ("tf32" if device.tf32 else "float32")
    return Plan("cuda", number=number, regime="step", batch_tile=_cuda_step_tile(problem, device))


def _cuda_step_tile(problem: Problem, device: Device) -> int:
    """Rows of the batch that a block of csrc/cuda_step*.cu works on: every tile reads all weights,
    so there should be few, but blocks enough for the whole device."""
    if problem.batch <= 16:
        return 16
    blocks = problem.lanes * -(-problem.batch // 64) * -(-problem.hidden // 32)
    many = problem.batch > 32 and 4 * blocks >= 3 * device.multiprocessors
    return 64 if many and problem.dtype != "float64" else 32


def _cuda_resident(problem: Problem, device: Device) -> list[Plan]:
    """Every plan whose blocks hold all weights of a lane and run at the same time."""
    number = _CUDA_NUMBERS[problem.dtype] or ("tf32" if device.tf32 else "tf32x3")
    resident = dict(device.clusters)
    octets = -(-problem.hidden // 8)
    counts = {-(-octets // each) for each in range(1, octets + 1)}
    found = []
    for tile in _CUDA_TILES:
        if tile > _CUDA_TILES[0] and tile >= 2 * problem.batch:
            break
        groups = problem.lanes * -(-problem.batch // tile)
        for regime, choices in (
            ("block", [1]),
            ("cluster", [n for n in _CUDA_CLUSTERS if n <= octets and resident.get(n)]),
            ("grid", [n for n in sorted(counts) if n > 1 and n * groups <= device.multiprocessors]),
        ):
            for blocks in choices:
                plan = Plan(
                    "cuda",
                    number=number,
                    regime=regime,
                    batch_tile=tile,
                    blocks=blocks,
                    warps=_CUDA_WARPS,
                )
                layout = _cuda_layout(problem, plan)
                if layout is not None and layout.shared_bytes <= device.shared_bytes:
                    found.append(plan)
    return found


# What csrc/cuda_tile.cuh makes of a plan: a test compares.
_CUDA_WARPS = 8
_CHUNK = 64  # bytes of an operand's row: two products in depth
_FRAGMENT = 512  # bytes of 16 rows of weights by half a chunk
# Of a thread, for weights: by whether they are split for each use, columns and, in order, tiles.
_CUDA_REGISTERS = {
    (False, 1): (128, 128, 96, 96),
    (False, 2): (96, 96, 96, 64),
    (False, 4): (48, 48, 24, 32),
    (True, 1): (96, 96, 72, 32),
    (True, 2): (64, 64, 48, 32),
}


@dataclass(frozen=True)
class _Layout:
    """How a block holds its weights.

    Attributes:
        rows: of weights, whole tiles of 16.
        row_bytes: of a row, whole chunks.
        spilled: bytes of weights that are in shared memory, because registers are full.
        exchanged: bytes that blocks of a group exchange at each step.
        shared_bytes: of shared memory, all told.
    """

    rows: int
    row_bytes: int
    spilled: int
    exchanged: int
    shared_bytes: int


def _cuda_layout(problem: Problem, plan: Plan) -> _Layout | None:
    """The layout of a block, or None where a block would have more rows than its warps can take:
    `lay_out` of csrc/cuda_persistent.cu or csrc/cuda_persistent_backward.cu."""
    size = min(4, _CUDA_STORED[problem.dtype])
    columns, gates, octets = plan.batch_tile // 8, problem.gates, -(-problem.hidden // 8)
    if problem.backward:
        choices = [1, 4] if gates == columns == 1 else [1]
        for tiles in choices:  # of 16 units, in a row group
            found = _cuda_shares(
                plan,
                row_groups=-(-octets // (2 * tiles)),
                exchanged=gates * octets * 8 * size,
                tiles=tiles,
                resident=((8 if columns == 4 else 10) - 4 * (plan.number == "tf32x3")) // tiles,
                staged=64 * gates * size,
                own=512 * tiles * columns * problem.states + 4 * plan.batch_tile,
            )
            if found is not None:
                return found
        return None
    split = plan.number == "tf32x3"
    if split and columns > 2:
        return None
    few = 1 if gates % 2 == 0 else 2
    many = 8 // gates // few * few
    for each in [few, many] if many > few and columns <= 2 else [few]:  # octets of a row group
        tiles = gates * each // 2
        registers = _CUDA_REGISTERS[split, columns][min(tiles, 4) - 1]
        found = _cuda_shares(
            plan,
            row_groups=-(-octets // each),
            exchanged=octets * 8 * size,
            tiles=tiles,
            resident=max(1, registers // (8 * tiles)),
            staged=64 * each * size,
            own=0,
        )
        if found is not None:
            return found
    return None


def _cuda_shares(
    plan: Plan,
    *,
    row_groups: int,
    exchanged: int,
    tiles: int,
    resident: int,
    staged: int,
    own: int,
) -> _Layout | None:
    """`lay_out` of csrc/cuda_tile.cuh, whose words these are."""
    groups = -(-row_groups // plan.blocks)
    if groups > _CUDA_WARPS:
        return None
    chunks = -(-exchanged // _CHUNK)
    slices = min(max(1, min(plan.warps, _CUDA_WARPS) // groups), chunks)
    depth = -(-chunks // slices)
    slices = -(-chunks // depth)
    spilled = 2 * _FRAGMENT * tiles * groups * slices * max(0, depth - resident)
    operand = plan.batch_tile * (chunks * _CHUNK + 16)
    sums = slices if own else slices - 1
    sums *= _FRAGMENT * tiles * (plan.batch_tile // 8) * groups
    staging = staged * groups * (slices if own else 1) + own * groups
    operands = operand * (1 if plan.regime == "grid" else 2)
    return _Layout(
        rows=groups * tiles * 16,
        row_bytes=chunks * _CHUNK,
        spilled=spilled,
        exchanged=plan.batch_tile * exchanged,
        shared_bytes=operands + spilled + sums + staging + 16,
    )


# Cycles, estimated from published measurements of an H100.
_MATRIX_SPEED = {"bfloat16": 1300, "float16": 1300, "tf32": 650, "tf32x3": 220}  # terms a cycle
_SHARED_SPEED = 128  # bytes a cycle
_EXCHANGE = {"block": 60, "cluster": 250, "grid": 1400}
_EXCHANGE_SPEED = {"block": 128, "cluster": 16, "grid": 35}  # bytes a cycle
_CELL = 250  # of a step, for the cell's arithmetic and what else takes no part in the product
_LAUNCH = 4000  # of a kernel for one step
_CACHE_SPEED = 2000  # bytes a cycle, of weights that a step reads on the whole device


def _cuda_cycles(problem: Problem, device: Device, plan: Plan) -> float:
    """An estimate of a step's time."""
    if plan.regime == "step":
        weights = problem.lanes * problem.gates * problem.hidden**2
        bytes_read = weights * _CUDA_STORED[problem.dtype] / _CACHE_SPEED
        speed = _MATRIX_SPEED.get(plan.number, 64) * max(1, device.multiprocessors)
        return _LAUNCH + max(bytes_read, weights * problem.batch / speed)
    layout = _cuda_layout(problem, plan)
    assert layout is not None
    groups = problem.lanes * -(-problem.batch // plan.batch_tile)
    at_once = device.multiprocessors // plan.blocks
    if plan.regime == "cluster":
        at_once = dict(device.clusters)[plan.blocks]
    waves = -(-groups // max(1, at_once))
    weights = layout.rows * layout.row_bytes // min(4, _CUDA_STORED[problem.dtype])
    product = max(
        weights * plan.batch_tile / _MATRIX_SPEED[plan.number], layout.spilled / _SHARED_SPEED
    )
    exchange = _EXCHANGE[plan.regime] + layout.exchanged / _EXCHANGE_SPEED[plan.regime]
    return waves * (product + exchange + _CELL)


# triton: one launch per chunk of steps, for any cell (fastrnn/triton_scan.py)

_TRITON_DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs cuda as well
_TRITON_SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_MATRIX_ROWS = 16  # the least that a product of tiles takes
# Of the 255 registers of a thread, those for the blocks that a step holds, and for weights where
# no matrix unit multiplies them; addresses and the cell's arithmetic take the others.
_BLOCK_REGISTERS = 160
_PARTS_REGISTERS = 96  # the same for float32 in parts
_WEIGHT_REGISTERS = 128
_REGISTERS = 64 << 10  # of a multiprocessor of NVIDIA's
_OTHER_SHARED_BYTES = 8 << 10
_TRITON_CHUNK_BYTES = 4 << 20  # of u: it should come from the cache
_TRITON_STRETCH_BYTES = 64 << 20  # of du, whose products want many rows


def _triton_refuse(problem: Problem, device: Device) -> str | None:
    if device.triton is not None:
        return device.triton
    if problem.dtype not in _TRITON_SIZES:
        return f"it computes {', '.join(_TRITON_SIZES)}, not {problem.dtype}"
    if device.kind == "cpu" and device.interpreted:
        if device.forced != "triton":
            return "on CPUs it runs in Triton's interpreter, and only when it is asked for by name"
        if problem.dtype == "bfloat16":
            return "Triton's interpreter computes bfloat16 wrongly"
    elif device.kind not in _TRITON_DEVICES:
        return f"it runs on GPUs, the tensors are on {device.kind}"
    if problem.projected and not problem.projectable:
        return f"cell {problem.cell!r} reads state 0 unit by unit, so it cannot be projected"
    if problem.hidden == 0:
        return "there are no hidden units"
    return None


def _triton_configure(problem: Problem, device: Device) -> Plan:
    """Tiles and warps. Of T and B only `batch_tile` depends on B, and takes one of few values, so
    that nothing is compiled anew for the lengths and sizes of batches."""
    itemsize = _TRITON_SIZES[problem.dtype]
    words = max(1, problem.itemsize // 4)  # registers of a number as computed
    padded = max(16, _power_of_two(problem.hidden))
    weights = problem.gates * padded * padded
    # One row reads every weight once: multiplying and adding is quicker while registers hold them
    # all. Float64 has no matrix units in Triton.
    warps = 4 if padded <= 32 or device.warp > 32 else 8
    threads = warps * device.warp
    one_row = problem.batch == 1 and weights * words <= threads * _WEIGHT_REGISTERS
    matrix_units = itemsize < 8 and not one_row
    batch_tile = _MATRIX_ROWS if matrix_units else 1
    # Blocks that live at once: inputs of this step and the next, sums, states before and after.
    blocks = (3 * problem.gates + (4 if problem.backward else 2) * problem.states) * words
    # Float32 is split in two parts for matrix units, which take registers as well.
    in_parts = itemsize == 4 and not device.tf32
    if matrix_units:
        fits = (
            blocks * batch_tile * padded
            <= threads * (_PARTS_REGISTERS if in_parts else _BLOCK_REGISTERS)
            and weights * itemsize * (1 if itemsize < 4 else 2) + 2 * batch_tile * padded * 4
            <= device.shared_bytes
            and (itemsize < 4 or padded <= (32 if in_parts else 64))
        )
    else:
        # The weights of a gate pass through shared memory on their way into registers.
        fits = (
            weights * words <= threads * _WEIGHT_REGISTERS
            and padded * padded * problem.itemsize <= device.shared_bytes
        )
    row = problem.gates * problem.hidden * itemsize * problem.lanes
    most = _TRITON_STRETCH_BYTES if problem.backward else _TRITON_CHUNK_BYTES
    plan = Plan(
        kernel="triton",
        matrix_units=matrix_units,
        batch_tile=batch_tile,
        chunk_rows=max(1, most // row),
    )
    if fits and not problem.projected:
        plan = replace(plan, resident=True, unit_tile=padded, depth_tile=padded, warps=warps)
        if not matrix_units or padded < 128 or device.warp > 32:
            return plan
        # All the registers that there are: a few more for each thread, or twice the threads.
        if problem.backward:
            return replace(plan, warps=16, registers=128)
        return replace(plan, registers=255)
    if not matrix_units:
        return replace(plan, unit_tile=min(padded, 32), depth_tile=min(padded, 32), warps=8)
    # Of the weights of every gate, and of what they are multiplied by.
    unit_tile = min(padded, 32)
    depth_tile, stages = (min(padded, 64), 4) if itemsize == 2 else (min(padded, 32), 2)
    if in_parts and problem.projected:  # two products more
        depth_tile = 16
    while (
        stages * depth_tile * (problem.gates * unit_tile + batch_tile) * itemsize
        + _OTHER_SHARED_BYTES
        > device.shared_bytes
    ):
        if depth_tile > 32:
            depth_tile //= 2
        elif stages > 1:
            stages -= 1
        elif unit_tile > 16:
            unit_tile //= 2
        else:
            break
    return replace(plan, unit_tile=unit_tile, depth_tile=depth_tile, warps=8, stages=stages)


def alternatives(chosen: Plan) -> list[Plan]:
    """A plan for Triton, and others for the same memory that may be quicker: which one is depends
    on what no number here tells."""
    found = [chosen]
    if chosen.warps >= 8:
        found.append(replace(chosen, warps=chosen.warps // 2, registers=240))
    if chosen.warps <= 8:
        warps = 2 * chosen.warps
        found.append(replace(chosen, warps=warps, registers=min(240, _REGISTERS // (32 * warps))))
    if chosen.stages > 1:
        found.append(replace(chosen, stages=chosen.stages - 1))
    if not chosen.resident and chosen.depth_tile > 16:
        found.append(replace(chosen, depth_tile=chosen.depth_tile // 2))
    return found


def _power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()


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
    "cuda": (_cuda_refuse, _cuda_configure),
    "triton": (_triton_refuse, _triton_configure),
    "reference": (_reference_refuse, _reference_configure),
}
KERNELS = tuple(_KERNELS)
