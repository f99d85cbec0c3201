"""Plans of the Triton kernels, for any cell, with one launch per chunk (kernels/gpu/triton)."""

from __future__ import annotations

from dataclasses import replace

from fastrnn.plan import dtypes
from fastrnn.plan.problem import Device, Plan, Problem, TritonConfig, TritonFacts

__all__ = ["alternatives", "configure", "refuse"]

_DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs cuda as well
_MATRIX_ROWS = 16  # fewest rows of a product of tiles
_LEAST_NUMBERS = 4  # of a block in a thread: a warp multiplies no smaller tiles
# A thread has 255 registers. These many may hold the blocks of a step, or weights that no matrix
# unit multiplies; addresses and the cell's arithmetic need the others.
_BLOCK_REGISTERS = 160
_PARTS_REGISTERS = 100  # for the blocks of a step, if float32 is multiplied in parts
_DEEP_BLOCKS = 24  # most blocks of a step that streams weights in the deepest tiles
_AHEAD_BLOCKS = 32  # and of one that loads as many tiles ahead as others
# Most blocks of a step whose threads have 128 registers, if addresses take many of these: those of
# given states and of their gradients, or those of more than 128 units.
_FEW_BLOCKS = 8
_WEIGHT_REGISTERS = 128
_ONE_ROW_REGISTERS = 190  # those weights, and the blocks of one row
_REGISTERS = 64 << 10  # registers of an NVIDIA multiprocessor
_OTHER_SHARED_BYTES = 8 << 10
_CHUNK_BYTES = 4 << 20  # bytes of u, which should stay in the cache
_BACKWARD_CHUNK_BYTES = 64 << 20  # bytes of du, whose products need many rows


def refuse(problem: Problem, device: Device) -> str | None:
    if isinstance(device.triton, str):
        return device.triton
    if (reason := dtypes.unsupported(problem.dtype)) is not None:
        return reason
    if device.kind == "cpu" and device.triton.interpreted:
        if device.forced != "triton":
            return "on CPUs it runs in Triton's interpreter, and only when it is asked for by name"
        if problem.dtype == "bfloat16":
            return "Triton's interpreter computes bfloat16 wrongly"
    elif device.kind not in _DEVICES:
        return f"it runs on GPUs, the tensors are on {device.kind}"
    if problem.projected and not problem.projectable:
        return f"cell {problem.cell!r} reads state 0 unit by unit, so it cannot be projected"
    if problem.hidden == 0:
        return "there are no hidden units"
    return None


def configure(problem: Problem, device: Device) -> Plan:
    """Tiles and warps. They do not depend on T, and only `batch_tile` depends on B and has few
    values, so new lengths and batch sizes compile no new kernel."""
    gpu = device.triton
    assert isinstance(gpu, TritonFacts), gpu
    row = problem.gates * problem.hidden * dtypes.BYTES[problem.dtype] * problem.recurrences
    most = _BACKWARD_CHUNK_BYTES if problem.backward else _CHUNK_BYTES
    precision = _precision(problem, device)
    config = _resident(problem, gpu, precision) or _streamed(problem, gpu, precision)
    if not gpu.nvidia:
        config = replace(config, registers=0)
    return Plan("triton", config, chunk_rows=max(1, most // row))


def _precision(problem: Problem, device: Device) -> str:
    """How float32 is multiplied. NVIDIA's matrix units multiply it as TF32 if torch may do so too,
    else as three products of TF32 parts, in nearly full precision. Other GPUs use float32."""
    gpu = device.triton
    assert isinstance(gpu, TritonFacts), gpu
    if problem.dtype != "float32" or not gpu.nvidia:
        return "ieee"
    return "tf32" if device.tf32 else "tf32x3"


def _padded(problem: Problem) -> int:
    return max(_MATRIX_ROWS, _power_of_two(problem.hidden))


def _warps(problem: Problem, gpu: TritonFacts) -> int:
    return 4 if _padded(problem) <= 32 or gpu.warp > 32 else 8


def _in_registers(problem: Problem, gpu: TritonFacts) -> bool:
    """Whether a program's registers can hold all weights in the dtype of the computation."""
    words = max(1, problem.itemsize // 4)
    weights = problem.gates_of_v * _padded(problem) ** 2
    return weights * words <= _warps(problem, gpu) * gpu.warp * _WEIGHT_REGISTERS


def _tiles(problem: Problem, gpu: TritonFacts, precision: str) -> TritonConfig:
    """The batch tile, and whether matrix units multiply it. A single row uses every weight once, so
    plain multiply-adds are faster while registers hold all weights. Triton has no matrix units for
    float64."""
    one_row = problem.batch == 1 and _in_registers(problem, gpu)
    matrix_units = dtypes.BYTES[problem.dtype] < 8 and not one_row
    batch_tile = _MATRIX_ROWS if matrix_units else 1
    return TritonConfig(precision, matrix_units=matrix_units, batch_tile=batch_tile)


def _resident(problem: Problem, gpu: TritonFacts, precision: str) -> TritonConfig | None:
    """A configuration with the weights in registers or shared memory for the whole sweep, or None
    if they do not fit."""
    config, padded = _tiles(problem, gpu, precision), _padded(problem)
    if problem.projected or not _fits(problem, gpu, config):
        return None
    warps = _warps(problem, gpu)
    in_parts = config.matrix_units and _in_full(problem, config)
    if problem.backward and in_parts and padded <= 16 and gpu.warp <= 32:
        warps = 8  # with 4, the gradients of an LSTM spill on GPUs of compute capability 8.6
    config = replace(config, resident=True, unit_tile=padded, depth_tile=padded, warps=warps)
    if not config.matrix_units or padded < 128 or gpu.warp > 32:
        return config
    # Use all registers: a few more for each thread, or twice the threads.
    if _twice_the_threads(problem, gpu):
        return replace(config, warps=16, registers=128)
    return replace(config, registers=255)


def _twice_the_threads(problem: Problem, gpu: TritonFacts) -> bool:
    """Whether the gradients of a sweep with resident weights and several rows are those of more
    threads, with half the registers each."""
    return problem.backward and _padded(problem) >= 128 and gpu.warp <= 32


def _blocks(problem: Problem) -> int:
    """How many numbers of a unit are live together: inputs of this and the next step, sums, old
    and new states, and others; on the way back saved gates and gradients of both their parts."""
    if not problem.backward:
        return 3 * problem.gates + 2 * problem.states + problem.values
    apart = 0 if problem.all_summed else problem.gates_of_u
    return 3 * problem.gates + 4 * problem.states + apart + problem.values


def _optional(problem: Problem) -> int:
    """Such numbers of a step back that only some calls have: states in which episodes begin and
    sums of their gradients, and gradients of states after every step."""
    if not problem.backward:
        return 0
    given = 2 * problem.states if problem.reset_states else 0
    return given + (problem.states - 1 if problem.every_step else 0)


def _fits(problem: Problem, gpu: TritonFacts, config: TritonConfig) -> bool:
    padded, itemsize = _padded(problem), dtypes.BYTES[problem.dtype]
    threads = _warps(problem, gpu) * gpu.warp
    words = max(1, problem.itemsize // 4)
    blocks = (_blocks(problem) + _optional(problem)) * words
    if not config.matrix_units:
        # The weights of a gate pass through shared memory into registers.
        through = padded * padded * problem.itemsize
        held = problem.gates_of_v * padded * padded * words // threads + blocks  # by a thread
        fits = _in_registers(problem, gpu) and held <= _ONE_ROW_REGISTERS
        return fits and through <= gpu.shared_bytes
    registers, most = _BLOCK_REGISTERS, 64 if itemsize == 4 else padded
    if _in_full(problem, config):
        registers, most = _PARTS_REGISTERS, 32
    if problem.stages > 1 and gpu.warp > 32:
        registers //= 2
    weights = problem.gates_of_v * padded * padded * itemsize * (1 if itemsize < 4 else 2)
    numbers = max(config.batch_tile * padded, _LEAST_NUMBERS * threads)  # of a block
    addresses = _twice_the_threads(problem, gpu) and (problem.reset_states or padded > 128)
    return (
        blocks * numbers <= threads * registers
        and not (addresses and _blocks(problem) > _FEW_BLOCKS)
        and weights + 2 * config.batch_tile * padded * 4 <= gpu.shared_bytes
        and padded <= most
    )


def _in_full(problem: Problem, config: TritonConfig) -> bool:
    """Whether float32 is not rounded to TF32. It then needs more registers, on NVIDIA's matrix
    units for its two parts."""
    return problem.dtype == "float32" and config.precision != "tf32"


def _streamed(problem: Problem, gpu: TritonFacts, precision: str) -> TritonConfig:
    """A configuration that reads the weights in tiles at every step."""
    config, itemsize = _tiles(problem, gpu, precision), dtypes.BYTES[problem.dtype]
    padded = _padded(problem)
    unit_tile = min(padded, 32)
    if not config.matrix_units:
        return replace(config, unit_tile=unit_tile, depth_tile=unit_tile, warps=8)
    depth_tile, stages = (min(padded, 64), 4) if itemsize == 2 else (min(padded, 32), 2)
    # Sums of units, what crosses between stages, random numbers and many blocks take registers.
    blocks = _blocks(problem)
    more = problem.stages > 1 or (problem.backward and problem.draws > 0) or blocks > _DEEP_BLOCKS
    if _in_full(problem, config) and (problem.projected or more):
        depth_tile = 16
    elif more:
        depth_tile = min(depth_tile, 32)
    # In 16 bits such steps spill with four tiles on the way on NVIDIA's GPUs, with two on AMD's.
    fewer = gpu.nvidia if itemsize == 2 else _in_full(problem, config)
    if blocks > _AHEAD_BLOCKS and fewer:
        stages //= 2
    while (
        # Weights of every gate, and the batch rows that are multiplied by them.
        stages * depth_tile * (problem.gates_of_v * unit_tile + config.batch_tile) * itemsize
        + _OTHER_SHARED_BYTES
        > gpu.shared_bytes
    ):
        if depth_tile > 32:
            depth_tile //= 2
        elif stages > 1:
            stages -= 1
        elif unit_tile > 16:
            unit_tile //= 2
        else:
            break
    return replace(config, unit_tile=unit_tile, depth_tile=depth_tile, warps=8, stages=stages)


def alternatives(chosen: TritonConfig) -> list[TritonConfig]:
    """The configuration, then others that need as much memory; only timing tells the fastest."""
    configs, limit = [chosen], 240 if chosen.registers else 0
    if chosen.warps >= 8:
        configs.append(replace(chosen, warps=chosen.warps // 2, registers=limit))
    if chosen.warps <= 8:
        warps = 2 * chosen.warps
        fewer = min(limit, _REGISTERS // (32 * warps))
        configs.append(replace(chosen, warps=warps, registers=fewer))
    if chosen.stages > 1:
        configs.append(replace(chosen, stages=chosen.stages - 1))
    if not chosen.resident and chosen.depth_tile > 16:
        configs.append(replace(chosen, depth_tile=chosen.depth_tile // 2))
    return configs


def _power_of_two(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
