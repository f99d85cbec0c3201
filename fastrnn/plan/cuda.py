"""Plans of the CUDA kernels, for the built-in cells (csrc/cuda, kernels/gpu/cuda.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fastrnn.plan import dtypes
from fastrnn.plan.problem import CudaConfig, CudaFacts, Device, Plan, Problem
from fastrnn.plan.tables import Tables

__all__ = [
    "Layout",
    "configurations",
    "configure",
    "cycles",
    "lay_out",
    "refuse",
    "row_group",
    "steps_alike",
]

_CHUNK_BYTES = 64 << 20  # bytes of u or du: a launch loads all weights, so it should be long
_CLUSTERS = (2, 4, 8, 16)  # blocks
_FEW_STEPS = 2  # these end before a persistent kernel would have loaded its weights


def refuse(problem: Problem, device: Device) -> str | None:
    gpu = device.cuda
    if device.kind == "cpu" and not isinstance(gpu, str) and gpu.simulated:
        if device.forced != "cuda":
            return "on CPUs it runs in a simulator, and only when it is asked for by name"
    elif device.kind != "cuda":
        return f"it runs on NVIDIA's GPUs, the tensors are on {device.kind}"
    if isinstance(gpu, str):
        return gpu
    if problem.cell not in gpu.cells:
        return f"it has no code for cell {problem.cell!r}; triton runs custom cells"
    if (reason := dtypes.unsupported(problem.dtype)) is not None:
        return reason
    if problem.projected:
        return "it does not project the output (proj_size)"
    if problem.stages > 1:
        return (
            f"a step of cell {problem.cell!r} has {problem.stages} stages and this kernel runs "
            "one; triton runs them"
        )
    if problem.draws:
        return f"cell {problem.cell!r} draws random numbers and this kernel none; triton does"
    if not problem.has_all_rows:
        return (
            f"cell {problem.cell!r} has gates without rows, and this kernel has a block of both "
            "matrices for every gate"
        )
    if problem.reset_states:
        return "its resets lead to zeros; triton takes given states (reset_states=)"
    if problem.every_step:
        return "it reads no gradients of the states of every step (return_states); triton does"
    if problem.hidden == 0:
        return "there are no hidden units"
    if gpu.capability < 80:
        major, minor = divmod(gpu.capability, 10)
        return f"it needs compute capability 8.0, this GPU has {major}.{minor}"
    return None


def configure(problem: Problem, device: Device) -> Plan:
    gpu = device.cuda
    assert isinstance(gpu, CudaFacts), gpu
    row = problem.gates * problem.hidden * problem.recurrences * dtypes.BYTES[problem.dtype]
    # The choice depends on no other field, so sequences of all lengths share a plan.
    steps = min(problem.steps, _FEW_STEPS + 1)
    relevant = replace(problem, steps=steps, inputs=0, rows=-1, tape=False, frozen=False)
    config = _best(relevant, gpu, device.tf32)
    return Plan("cuda", config, chunk_rows=max(1, _CHUNK_BYTES // row))


def steps_alike(plan: Plan, steps: int, batch: int) -> tuple[int, int]:
    """The least and the most steps of calls that have the plan of a call of `steps` steps, which
    are one chunk, and are one chunk themselves."""
    if steps <= _FEW_STEPS:
        return steps, steps
    return _FEW_STEPS + 1, plan.chunk_rows // batch


@lru_cache(maxsize=1024)
def _best(problem: Problem, gpu: CudaFacts, tf32: bool) -> CudaConfig:
    """The configuration with the least estimated time of a step."""
    configs = configurations(problem, gpu, tf32)
    return min(configs, key=lambda config: cycles(problem, gpu, config))


def configurations(problem: Problem, gpu: CudaFacts, tf32: bool) -> list[CudaConfig]:
    """All configurations that can run a problem."""
    configs = _steps(problem, gpu.tables, tf32)
    if problem.dtype != "float64" and problem.batch and problem.steps > _FEW_STEPS:
        configs += _resident(problem, gpu, tf32)
    return configs


def _precision(problem: Problem, tf32: bool) -> str:
    if problem.dtype != "float32":
        return problem.dtype
    return "tf32" if tf32 else "tf32x3"


def _steps(problem: Problem, tables: Tables, tf32: bool) -> list[CudaConfig]:
    """Configurations of the residency "step", one launch per step, with several batch tiles."""
    precision = _precision(problem, tf32)
    if precision == "tf32x3" and problem.steps <= _FEW_STEPS and problem.batch <= 16:
        precision = "float32"  # a small product in full precision costs no more
    least = tables.step_tiles[0]
    tiles = [rows for rows in tables.step_tiles if rows == least or rows < 2 * problem.batch]
    if problem.dtype == "float64":
        tiles = [rows for rows in tiles if rows < 64]
    return [CudaConfig(precision=precision, residency="step", batch_tile=rows) for rows in tiles]


def _resident(problem: Problem, gpu: CudaFacts, tf32: bool) -> list[CudaConfig]:
    """Every persistent configuration whose groups can hold all weights of a recurrence."""
    precision = _precision(problem, tf32)
    resident = dict(gpu.clusters)
    octets = -(-problem.hidden // 8)
    block_counts = {-(-octets // share) for share in range(1, octets + 1)}
    configs = []
    tables = gpu.tables
    for tile in tables.batch_tiles:
        if tile > tables.batch_tiles[0] and tile >= 2 * problem.batch:
            break
        for residency, choices in (
            ("block", [1]),
            ("cluster", [n for n in _CLUSTERS if n <= octets and resident.get(n)]),
            ("grid", [n for n in sorted(block_counts) if 1 < n <= gpu.multiprocessors]),
        ):
            if residency == "grid" and not gpu.cooperative:
                continue
            for blocks in choices:
                config = CudaConfig(
                    precision=precision,
                    residency=residency,
                    batch_tile=tile,
                    blocks=blocks,
                    warps=tables.warps,
                    groups=gpu.multiprocessors // blocks,
                )
                config = replace(config, row_group=row_group(problem, config, tables))
                layout = lay_out(problem, config, tables)
                if layout is not None and layout.shared_bytes <= gpu.shared_bytes:
                    configs.append(config)
    return configs


@dataclass(frozen=True)
class Layout:
    """How a block holds its weights, as `lay_out` of csrc/cuda/persistent/layout.cuh computes it
    and in its words. A test compares the two.

    Attributes:
        rows: rows of weights, a multiple of 16.
        row_bytes: bytes of a row, a whole number of k-blocks.
        spilled: bytes of weights in shared memory, because registers are full.
        exchanged: bytes that a block receives at each step.
        shared_bytes: all shared memory of a block.
    """

    rows: int
    row_bytes: int
    spilled: int
    exchanged: int
    shared_bytes: int


def lay_out(problem: Problem, config: CudaConfig, tables: Tables) -> Layout | None:
    """The layout of a block; None if there is no kernel for it, or if a block would have more row
    groups than warps."""
    units, backward = config.row_group, problem.backward
    columns = config.batch_tile // 8
    tiles = units * (1 if backward else problem.gates) // 16  # tiles of 16 weight rows
    tile = tables.batch_tiles.index(config.batch_tile)
    registers = tables.registers[backward][config.precision == "tf32x3"][tile][min(tiles, 4) - 1]
    groups = _row_groups(problem, config.blocks, units)
    if registers == 0 or groups > tables.warps:
        return None
    size = min(4, dtypes.BYTES[problem.dtype])
    values = -(-problem.hidden // 8) * 8  # per exchanged row: h, or dv of all gates
    pieces, own = units * size // tables.piece_bytes, 0  # per 8 columns; bytes a row group keeps
    if backward:
        values *= problem.gates
        pieces = problem.gates * 8 * size // tables.piece_bytes
        own = tables.gradient_bytes * tiles * columns * problem.states
        own += tables.stop_bytes * config.batch_tile
    in_place = backward and config.residency == "grid"

    k_blocks = -(-values * size // tables.k_block_bytes)
    slices = min(max(1, min(config.warps, tables.warps) // groups), k_blocks)
    depth = -(-k_blocks // slices)
    slices = -(-k_blocks // depth)
    resident = max(1, registers // (tables.k_block_registers * tiles))
    spilled = 2 * tables.fragment_bytes * tiles * groups * slices * max(0, depth - resident)
    row_bytes = k_blocks * tables.k_block_bytes
    operand = config.batch_tile * (row_bytes + tables.row_pad_bytes)
    operands = 0 if in_place else operand * (1 if config.residency == "grid" else 2)
    sums = tables.fragment_bytes * tiles * columns * groups * (slices if own else slices - 1)
    staged = 8 * tables.piece_bytes * pieces + tables.staged_gap_bytes[pieces % 4]
    staging = staged * groups * (slices if own else 1) + own * groups
    return Layout(
        rows=16 * tiles * groups,
        row_bytes=row_bytes,
        spilled=spilled,
        exchanged=config.batch_tile * values * size * (groups if in_place else 1),
        shared_bytes=operands + spilled + sums + staging + tables.barrier_bytes,
    )


def _row_groups(problem: Problem, blocks: int, units: int) -> int:
    """Row groups of a block, if `blocks` blocks share all units."""
    groups = -(-problem.hidden // units)
    return -(-groups // blocks)


def row_group(problem: Problem, config: CudaConfig, tables: Tables) -> int:
    """Units of a row group: the fewest for which there are kernels and enough warps.

    In the backward pass of a grid, every warp reads the operand itself. If a block then has several
    row groups, larger ones read it less often.
    """
    least, *larger = tables.units(problem.backward, problem.gates, config.batch_tile)
    groups = _row_groups(problem, config.blocks, least)
    if problem.backward:
        second, *larger = larger
        rereads = config.residency == "grid" and groups > 1
        if rereads and _row_groups(problem, config.blocks, second) <= tables.warps:
            return second
    return larger[0] if groups > tables.warps and larger else least


# Estimates from published measurements of an H100. Speeds are per multiprocessor.
_MATRIX_SPEED = {"bfloat16": 1300, "float16": 1300, "tf32": 650, "tf32x3": 220}  # terms per cycle
_OTHER_SPEED = 64  # terms per cycle without matrix units
_SHARED_SPEED = 128  # bytes per cycle
_EXCHANGE = {"block": 60, "cluster": 250, "grid": 1400}  # cycles per step
_EXCHANGE_SPEED = {"block": 128, "cluster": 16, "grid": 35}  # bytes per cycle
_CELL = 250  # cycles per step for the cell's arithmetic and all else outside the product
_LAUNCH = 4000  # cycles to launch the kernel of one step
_CACHE_SPEED = 2000  # bytes of weights per cycle that the whole GPU reads from its cache


def cycles(problem: Problem, gpu: CudaFacts, config: CudaConfig) -> float:
    """The estimated cycles of a step."""
    if config.residency == "step":
        return _step_cycles(problem, gpu, config)
    layout = lay_out(problem, config, gpu.tables)
    assert layout is not None
    groups = problem.recurrences * -(-problem.batch // config.batch_tile)
    at_once = config.groups
    if config.residency == "cluster":
        at_once = dict(gpu.clusters)[config.blocks]
    waves = -(-groups // max(1, at_once))
    weights = layout.rows * layout.row_bytes // min(4, dtypes.BYTES[problem.dtype])
    product = max(
        weights * config.batch_tile / _MATRIX_SPEED[config.precision],
        layout.spilled / _SHARED_SPEED,
    )
    exchange = _EXCHANGE[config.residency] + layout.exchanged / _EXCHANGE_SPEED[config.residency]
    return waves * (product + exchange + _CELL)


def _step_cycles(problem: Problem, gpu: CudaFacts, config: CudaConfig) -> float:
    size, multiprocessors = dtypes.BYTES[problem.dtype], max(1, gpu.multiprocessors)
    tables = gpu.tables
    units = tables.step_units[problem.backward][tables.step_tiles.index(config.batch_tile)]
    tiles = -(-problem.batch // config.batch_tile) * -(-problem.hidden // units)
    waves = -(-problem.recurrences * tiles // multiprocessors)
    row = problem.gates * problem.hidden  # weights of a unit
    depth = row if problem.backward else problem.hidden
    rows = min(config.batch_tile, problem.batch)
    read = (units * row + rows * depth) * size / _EXCHANGE_SPEED["grid"]
    product = config.batch_tile * units * row / _MATRIX_SPEED.get(config.precision, _OTHER_SPEED)
    all_weights = problem.recurrences * row * problem.hidden * size / _CACHE_SPEED
    return _LAUNCH + max(waves * max(read, product), all_weights)
