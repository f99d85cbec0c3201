"""Plans of the Triton kernels, for any cell: a launch per chunk (kernels/gpu/triton)."""

from __future__ import annotations

from dataclasses import replace

from fastrnn.plan import dtypes
from fastrnn.plan.problem import Device, Plan, Problem

__all__ = ["alternatives", "configure", "refuse"]

_DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs cuda as well
_MATRIX_ROWS = 16  # the least that a product of tiles takes
# Of the 255 registers of a thread, those for the blocks that a step holds, and for weights where
# no matrix unit multiplies them; addresses and the cell's arithmetic take the others.
_BLOCK_REGISTERS = 160
_PARTS_REGISTERS = 96  # the same for float32 in parts
_WEIGHT_REGISTERS = 128
_REGISTERS = 64 << 10  # of a multiprocessor of NVIDIA's
_OTHER_SHARED_BYTES = 8 << 10
_CHUNK_BYTES = 4 << 20  # of u: it should come from the cache
_STRETCH_BYTES = 64 << 20  # of du, whose products want many rows


def refuse(problem: Problem, device: Device) -> str | None:
    if device.triton is not None:
        return device.triton
    if (reason := dtypes.unsupported(problem.dtype)) is not None:
        return reason
    if device.kind == "cpu" and device.interpreted:
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
    """Tiles and warps. Of T and B only `batch_tile` depends on B, and takes one of few values, so
    that nothing is compiled anew for the lengths and sizes of batches."""
    itemsize = dtypes.BYTES[problem.dtype]
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
    most = _STRETCH_BYTES if problem.backward else _CHUNK_BYTES
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
