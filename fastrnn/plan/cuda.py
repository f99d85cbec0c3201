"""Plans of the CUDA kernels, for the built-in cells (csrc/cuda_*.cu, kernels/gpu/cuda.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fastrnn.plan import dtypes
from fastrnn.plan.problem import CudaConfig, CudaFacts, Device, Plan, Problem

__all__ = ["Layout", "configure", "cycles", "lay_out", "refuse"]

_LANES = 64  # a bit for each says which way it runs
_CHUNK_BYTES = 64 << 20  # of u and du: a launch loads all weights, so it should be long
_TILES = (8, 16, 32)  # rows of the batch: columns of matrix products, 8 at a time
_CLUSTERS = (2, 4, 8, 16)
# Of a launch a step, rows of the batch in a block, and its units forward and backward.
_STEP_UNITS = {16: (8, 16), 32: (16, 16), 64: (32, 32)}
_FEW_STEPS = 2  # which end before the weights would be loaded


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
        return f"it has no code for cell {problem.cell!r}; triton runs cells of one's own"
    if (reason := dtypes.unsupported(problem.dtype)) is not None:
        return reason
    if problem.projected:
        return "it does not project the output (proj_size)"
    if problem.hidden == 0:
        return "there are no hidden units"
    if problem.lanes > _LANES:
        return f"it runs {_LANES} scans side by side at most, not {problem.lanes}"
    if gpu.capability < 80:
        major, minor = divmod(gpu.capability, 10)
        return f"it needs compute capability 8.0, this GPU has {major}.{minor}"
    return None


def configure(problem: Problem, device: Device) -> Plan:
    gpu = device.cuda
    assert isinstance(gpu, CudaFacts), gpu
    row = problem.gates * problem.hidden * problem.lanes * dtypes.BYTES[problem.dtype]
    # Nothing depends on the other fields, so that sequences of all lengths share a plan.
    steps = min(problem.steps, _FEW_STEPS + 1)
    relevant = replace(problem, steps=steps, inputs=0, rows=-1, tape=False, frozen=False)
    config = _best(relevant, gpu, device.tf32)
    return Plan("cuda", config, chunk_rows=max(1, _CHUNK_BYTES // row))


@lru_cache(maxsize=1024)
def _best(problem: Problem, gpu: CudaFacts, tf32: bool) -> CudaConfig:
    """The regime of the least estimated time of a step."""
    configs = _steps(problem, tf32)
    if problem.dtype != "float64" and problem.batch and problem.steps > _FEW_STEPS:
        configs += _resident(problem, gpu, tf32)
    return min(configs, key=lambda config: cycles(problem, gpu, config))


def _number(problem: Problem, tf32: bool) -> str:
    if problem.dtype != "float32":
        return problem.dtype
    return "tf32" if tf32 else "tf32x3"


def _steps(problem: Problem, tf32: bool) -> list[CudaConfig]:
    """A launch a step, with tiles of the batch of several sizes."""
    number = _number(problem, tf32)
    if number == "tf32x3" and problem.steps <= _FEW_STEPS and problem.batch <= 16:
        number = "float32"  # a small product may as well be exact
    tiles = [rows for rows in _STEP_UNITS if rows == 16 or rows < 2 * problem.batch]
    if problem.dtype == "float64":
        tiles = [rows for rows in tiles if rows < 64]
    return [CudaConfig(number=number, regime="step", batch_tile=rows) for rows in tiles]


def _resident(problem: Problem, gpu: CudaFacts, tf32: bool) -> list[CudaConfig]:
    """Every configuration whose groups hold all weights of a lane, and run at the same time."""
    number = _number(problem, tf32)
    resident = dict(gpu.clusters)
    octets = -(-problem.hidden // 8)
    counts = {-(-octets // each) for each in range(1, octets + 1)}
    found = []
    for tile in _TILES:
        if tile > _TILES[0] and tile >= 2 * problem.batch:
            break
        for regime, choices in (
            ("block", [1]),
            ("cluster", [n for n in _CLUSTERS if n <= octets and resident.get(n)]),
            ("grid", [n for n in sorted(counts) if 1 < n <= gpu.multiprocessors]),
        ):
            for blocks in choices:
                config = CudaConfig(
                    number=number,
                    regime=regime,
                    batch_tile=tile,
                    blocks=blocks,
                    warps=_WARPS,
                    groups=gpu.multiprocessors // blocks,
                )
                layout = lay_out(problem, config)
                if layout is not None and layout.shared_bytes <= gpu.shared_bytes:
                    found.append(config)
    return found


# What csrc/cuda/persistent/product.cuh makes of a plan: a test compares.
_WARPS = 8
_CHUNK = 64  # bytes of an operand's row: two products in depth
_FRAGMENT = 512  # bytes of 16 rows of weights by half a chunk
# Of a thread, for weights: by whether they are split for each use, columns and, in order, tiles.
_REGISTERS = {
    (False, 1): (128, 128, 96, 96),
    (False, 2): (96, 96, 72, 64),
    (False, 4): (48, 48, 24, 32),
    (True, 1): (96, 96, 72, 32),
    (True, 2): (64, 64, 48, 32),
}


@dataclass(frozen=True)
class Layout:
    """How a block holds its weights.

    Attributes:
        rows: of weights, whole tiles of 16.
        row_bytes: of a row, whole chunks.
        spilled: bytes of weights that are in shared memory, because registers are full.
        exchanged: bytes that it receives at each step.
        shared_bytes: of shared memory, all told.
    """

    rows: int
    row_bytes: int
    spilled: int
    exchanged: int
    shared_bytes: int


def lay_out(problem: Problem, config: CudaConfig) -> Layout | None:
    """The layout of a block, or None where a block would have more rows than its warps can take:
    `need` of the traits in csrc/cuda/persistent/forward.cu or csrc/cuda/persistent/backward.cu."""
    size = min(4, dtypes.BYTES[problem.dtype])
    columns, gates, octets = config.batch_tile // 8, problem.gates, -(-problem.hidden // 8)
    if problem.backward:
        choices = [1, 4] if gates == columns == 1 else [1]
        if config.regime == "grid" and octets > 2 * config.blocks:
            choices.insert(0, 2)
        for tiles in choices:  # of 16 units, in a row group
            parts = (6 if tiles * columns >= 8 else 4) if config.number == "tf32x3" else 0
            found = _shares(
                config,
                row_groups=-(-octets // (2 * tiles)),
                exchanged=gates * octets * 8 * size,
                tiles=tiles,
                resident=((8 if columns == 4 else 10) - parts) // tiles,
                staged=_staged(gates * size // 2),
                own=512 * tiles * columns * problem.states + 4 * config.batch_tile,
                in_place=config.regime == "grid",
            )
            if found is not None:
                return found
        return None
    split = config.number == "tf32x3"
    if split and columns > 2:
        return None
    few = 1 if gates % 2 == 0 else 2
    many = 8 // gates // few * few
    for each in [few, many] if many > few and columns <= 2 else [few]:  # octets of a row group
        tiles = gates * each // 2
        registers = _REGISTERS[split, columns][min(tiles, 4) - 1]
        found = _shares(
            config,
            row_groups=-(-octets // each),
            exchanged=octets * 8 * size,
            tiles=tiles,
            resident=max(1, registers // (8 * tiles)),
            staged=_staged(each * size // 2),
            own=0,
        )
        if found is not None:
            return found
    return None


def _staged(pieces: int) -> int:
    """`staged_bytes` of csrc/cuda/persistent/exchange.cuh."""
    return 8 * 16 * pieces + 32 * (3, 0, 1, 0)[pieces % 4]


def _shares(
    config: CudaConfig,
    *,
    row_groups: int,
    exchanged: int,
    tiles: int,
    resident: int,
    staged: int,
    own: int,
    in_place: bool = False,
) -> Layout | None:
    """`lay_out` of csrc/cuda/persistent/product.cuh, whose words these are."""
    groups = -(-row_groups // config.blocks)
    if groups > _WARPS:
        return None
    chunks = -(-exchanged // _CHUNK)
    slices = min(max(1, min(config.warps, _WARPS) // groups), chunks)
    depth = -(-chunks // slices)
    slices = -(-chunks // depth)
    spilled = 2 * _FRAGMENT * tiles * groups * slices * max(0, depth - resident)
    operand = config.batch_tile * (chunks * _CHUNK + 16)
    sums = slices if own else slices - 1
    sums *= _FRAGMENT * tiles * (config.batch_tile // 8) * groups
    staging = staged * groups * (slices if own else 1) + own * groups
    operands = 0 if in_place else operand * (1 if config.regime == "grid" else 2)
    return Layout(
        rows=groups * tiles * 16,
        row_bytes=chunks * _CHUNK,
        spilled=spilled,
        exchanged=config.batch_tile * exchanged * (groups if in_place else 1),
        shared_bytes=operands + spilled + sums + staging + 16,
    )


# Cycles, estimated from published measurements of an H100.
_MATRIX_SPEED = {"bfloat16": 1300, "float16": 1300, "tf32": 650, "tf32x3": 220}  # terms a cycle
_OTHER_SPEED = 64
_SHARED_SPEED = 128  # bytes a cycle
_EXCHANGE = {"block": 60, "cluster": 250, "grid": 1400}
_EXCHANGE_SPEED = {"block": 128, "cluster": 16, "grid": 35}  # bytes a cycle
_CELL = 250  # of a step, for the cell's arithmetic and what else takes no part in the product
_LAUNCH = 4000  # of a kernel for one step
_CACHE_SPEED = 2000  # bytes a cycle, of weights that a step reads on the whole device


def cycles(problem: Problem, gpu: CudaFacts, config: CudaConfig) -> float:
    """An estimate of a step's time."""
    if config.regime == "step":
        return _step_cycles(problem, gpu, config)
    layout = lay_out(problem, config)
    assert layout is not None
    groups = problem.lanes * -(-problem.batch // config.batch_tile)
    at_once = config.groups
    if config.regime == "cluster":
        at_once = dict(gpu.clusters)[config.blocks]
    waves = -(-groups // max(1, at_once))
    weights = layout.rows * layout.row_bytes // min(4, dtypes.BYTES[problem.dtype])
    product = max(
        weights * config.batch_tile / _MATRIX_SPEED[config.number], layout.spilled / _SHARED_SPEED
    )
    exchange = _EXCHANGE[config.regime] + layout.exchanged / _EXCHANGE_SPEED[config.regime]
    return waves * (product + exchange + _CELL)


def _step_cycles(problem: Problem, gpu: CudaFacts, config: CudaConfig) -> float:
    size, multiprocessors = dtypes.BYTES[problem.dtype], max(1, gpu.multiprocessors)
    units = _STEP_UNITS[config.batch_tile][problem.backward]
    tiles = -(-problem.batch // config.batch_tile) * -(-problem.hidden // units)
    waves = -(-problem.lanes * tiles // multiprocessors)
    row = problem.gates * problem.hidden  # of weights, of a unit
    depth = row if problem.backward else problem.hidden
    rows = min(config.batch_tile, problem.batch)
    read = (units * row + rows * depth) * size / _EXCHANGE_SPEED["grid"]
    product = config.batch_tile * units * row / _MATRIX_SPEED.get(config.number, _OTHER_SPEED)
    all_weights = problem.lanes * row * problem.hidden * size / _CACHE_SPEED
    return _LAUNCH + max(waves * max(read, product), all_weights)
