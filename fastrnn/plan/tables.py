"""What a library of CUDA kernels was compiled with, as it tells itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RowGroup", "Tables"]


@dataclass(frozen=True)
class RowGroup:
    """A row group for which there are persistent kernels, of every precision whose
    `Tables.registers` are not 0 for it.

    Attributes:
        backward: whether they are of the backward pass.
        gates: G of the cell.
        batch_tile: rows of the batch that a group of blocks works on.
        units: of a row group; `CudaConfig.row_group` names it by them.
    """

    backward: bool
    gates: int
    batch_tile: int
    units: int

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows of weights: forward a unit has a row for each gate, backward one."""
        return self.units * (1 if self.backward else self.gates) // 16


@dataclass(frozen=True)
class Tables:
    """What the kernels were compiled with and a plan goes by: `CudaTables` of
    csrc/cuda/contract.h.

    A tuple with an item for each batch tile has them in the order of `batch_tiles`, one for each
    pass has the forward one first, and one for each kind of precision has at 1 the one that splits
    a number in parts ("tf32x3") and at 0 all others.

    Attributes:
        recurrences: the most of a sweep.
        warps: the most of a block, and the most row groups of a block.
        k_block_bytes: of a row of an operand, which is whole k-blocks.
        piece_bytes: of an operand that travel as one.
        row_pad_bytes: after a row of an operand in shared memory.
        fragment_bytes: of a tile of weights by half a k-block, and of its sums in 8 columns.
        gradient_bytes: of a state's gradients for 16 units in 8 columns, in the backward pass.
        stop_bytes: of the number of steps of a column of a row group, in the backward pass.
        barrier_bytes: at the end of a block's shared memory.
        k_block_registers: of a thread, for a k-block of a tile of weights.
        staged_gap_bytes: [4], after n pieces of 8 columns that a warp collects, at n % 4.
        batch_tiles: [3], rows of the batch.
        registers: [pass][precision][batch tile][4], of a thread for weights, by the tiles of a row
            group: 1, 2, 3, and 4 or more. 0 where there is no such kernel.
        row_groups: all there are, sorted by pass, gates, batch tile and units.
        step_tiles: [3], rows of the batch in a block of a launch a step.
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
        """The row groups that there are for such a cell and batch tile, the least first."""
        wanted = backward, gates, batch_tile
        return tuple(
            group.units
            for group in self.row_groups
            if (group.backward, group.gates, group.batch_tile) == wanted
        )
