"""The constants that a library of CUDA kernels was compiled with, as the library exports them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RowGroup", "Tables"]


@dataclass(frozen=True)
class RowGroup:
    """A row group for which there are persistent kernels, in every precision for which
    `Tables.registers` is not 0.

    Attributes:
        backward: whether the kernels are those of the backward pass.
        gates: G of the cell.
        batch_tile: rows of the batch that a group of blocks handles.
        units: units of the row group; `CudaConfig.row_group` is this number.
    """

    backward: bool
    gates: int
    batch_tile: int
    units: int

    @property
    def tiles(self) -> int:
        """Tiles of 16 weight rows: a unit has a row per gate in the forward pass, else one row."""
        return self.units * (1 if self.backward else self.gates) // 16


@dataclass(frozen=True)
class Tables:
    """The compiled constants that a plan depends on: `CudaTables` of csrc/cuda/contract.h.

    Index [pass] is 0 for the forward and 1 for the backward pass, [precision] is 1 for "tf32x3",
    which splits a number in parts, and 0 for all others, and [batch tile] follows `batch_tiles`.

    Attributes:
        recurrences: most recurrences of a sweep.
        warps: most warps of a block, and most row groups of a block.
        k_block_bytes: bytes of a k-block; a row of an operand has a whole number of these.
        piece_bytes: bytes of an operand that are copied as one.
        row_pad_bytes: padding after a row of an operand in shared memory.
        fragment_bytes: bytes of a tile of weights by half a k-block, and of its sums in 8 columns.
        gradient_bytes: bytes of a state's gradients for 16 units in 8 columns, backward pass.
        stop_bytes: bytes for the number of steps of a column of a row group, backward pass.
        barrier_bytes: bytes of the barriers at the end of a block's shared memory.
        k_block_registers: registers per thread for a k-block of a tile of weights.
        staged_gap_bytes: [4], padding after n pieces of 8 columns that a warp collects, at n % 4.
        batch_tiles: [3], rows of the batch.
        registers: [pass][precision][batch tile][4], registers per thread for weights, by the tiles
            of a row group: 1, 2, 3, and 4 or more. 0 if there is no such kernel.
        row_groups: all row groups, sorted by pass, gates, batch tile and units.
        step_tiles: [3], rows of the batch in a block, for kernels that are launched once per step.
        step_units: [pass][3], units of such a block, in the order of `step_tiles`.
    """

    recurrences: int = 0
    warps: int = 0
    k_block_bytes: int = 0
    piece_bytes: int = 0
    row_pad_bytes: int = 0
    fragment_bytes: int = 0
    gradient_bytes: int = 0
    stop_bytes: int = 0
    barrier_bytes: int = 0
    k_block_registers: int = 0
    staged_gap_bytes: tuple[int, ...] = ()
    batch_tiles: tuple[int, ...] = ()
    registers: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...] = ()
    row_groups: tuple[RowGroup, ...] = ()
    step_tiles: tuple[int, ...] = ()
    step_units: tuple[tuple[int, ...], ...] = ()

    def units(self, backward: bool, gates: int, batch_tile: int) -> tuple[int, ...]:
        """Units of the row groups for this pass, cell and batch tile, in ascending order."""
        wanted = backward, gates, batch_tile
        return tuple(
            group.units
            for group in self.row_groups
            if (group.backward, group.gates, group.batch_tile) == wanted
        )
