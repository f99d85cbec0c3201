"""What a decision is made from, and what it is: a problem, a device, a plan."""

from __future__ import annotations

from dataclasses import dataclass

from fastrnn.plan.dtypes import computed_bytes

__all__ = ["Device", "Plan", "Problem"]


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
        return computed_bytes(self.dtype)


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
    number: str = ""  # how numbers are stored and multiplied: `Number` of csrc/cuda/contract.h
    regime: str = ""  # where the recurrent weights stay: `Regime` of csrc/cuda/contract.h
    blocks: int = 1  # of a group, which shares the units of a tile of the batch
    groups: int = 1  # that run at the same time, where blocks wait for each other all over the GPU
    refused: tuple[tuple[str, str], ...] = ()  # kernels that came before, and why not them

    @property
    def threads(self) -> int:
        return self.split_lanes * self.split_slots * self.split_units
