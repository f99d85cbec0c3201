"""The input and the output of a decision: `Problem` and `Device`, and the `Plan`.

`Device` and `Plan` have a part for each kernel, so that a kernel's module reads only its own part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastrnn.plan.dtypes import computed_bytes
from fastrnn.plan.formats import FORMATS, Format
from fastrnn.plan.tables import Tables

__all__ = [
    "SIGNIFICANT_BITS",
    "CpuConfig",
    "CpuFacts",
    "CudaConfig",
    "CudaFacts",
    "Device",
    "Plan",
    "Problem",
    "TritonConfig",
    "TritonFacts",
]

# A plan hardly depends on lengths, but making one takes longer than a small batch runs. So numbers
# of steps and rows are rounded to their leading bits, that is to one part in eight.
SIGNIFICANT_BITS = 4


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
    recurrences: int = 1  # P, independent scans: directions, heads
    rows: int = -1  # R, rows that are computed; -1 means T*B (not packed, no lengths)
    dtype: str = "float32"
    tape: bool = False  # saves what BPTT needs
    backward: bool = False
    frozen: bool = False  # weights were prepacked before the call
    format: str = ""  # of products on a CPU, one of `FORMATS`; "" for that of the dtype in float
    projected: bool = False  # state 0 goes through weight_hr
    projectable: bool = True  # the cell reads state 0 only through `v`
    stages: int = 1  # of a step of the cell, between which units of a row need each other
    draws: int = 0  # random numbers that the cell draws for a unit and step
    values: int = 0  # of a unit in a step, besides gates and states: `compiler.layout.values`
    reset_states: bool = False  # whether episodes begin in given states
    every_step: bool = False  # whether states past the first have gradients after every step
    input_gates: int = -1  # gates with rows in weight_ih; -1 for all
    recurrent_gates: int = -1  # gates with rows in weight_hh; -1 for all
    all_summed: bool = True  # the gradients of u are those of v

    @property
    def gates_of_u(self) -> int:
        """The number of gates with rows in weight_ih."""
        return self.gates if self.input_gates < 0 else self.input_gates

    @property
    def gates_of_v(self) -> int:
        """The number of gates with rows in weight_hh."""
        return self.gates if self.recurrent_gates < 0 else self.recurrent_gates

    @property
    def has_all_rows(self) -> bool:
        """Whether every gate has rows in both matrices."""
        return self.gates_of_u == self.gates_of_v == self.gates

    @property
    def live_rows(self) -> int:
        return self.steps * self.batch if self.rows < 0 else self.rows

    @property
    def itemsize(self) -> int:
        """Bytes of a number in computation."""
        return computed_bytes(self.dtype)

    @property
    def products(self) -> Format:
        """The format of products on a CPU."""
        plain = "float64" if self.dtype == "float64" else "float32"
        return FORMATS[self.format or plain]

    def rounded(self) -> Problem:
        """The representative of all problems that share a plan with this one."""
        return replace(self, steps=_leading_bits(self.steps), rows=_leading_bits(self.rows))


def _leading_bits(number: int) -> int:
    dropped = max(0, number.bit_length() - SIGNIFICANT_BITS)
    return number >> dropped << dropped


@dataclass(frozen=True)
class CpuFacts:
    """A CPU, and whether the cell is compiled for it.

    Attributes:
        threads: threads that a call may use, at most one for each core that the process may use.
        contended: whether threads came late a short time ago, because other work has their cores.
        vector_bytes: bytes of a vector in the instruction set in use.
        l2_bytes: bytes of a core's second-level cache.
        compiled: whether the cell has compiled code.
    """

    threads: int = 1
    contended: bool = False
    vector_bytes: int = 16
    l2_bytes: int = 1 << 20
    compiled: bool = True


@dataclass(frozen=True)
class CudaFacts:
    """An NVIDIA GPU, and the library of CUDA kernels.

    Attributes:
        cells: names of the cells that the library has kernels for.
        simulated: whether the kernels run on CPUs, in the simulator of the tests.
        capability: 90 for compute capability 9.0; 0 if there is no GPU.
        multiprocessors: number of multiprocessors.
        shared_bytes: most shared memory of a block.
        tables: the constants that the kernels were compiled with.
        clusters: `(blocks, count)` for each cluster size: `count` clusters of `blocks` blocks run
            at the same time, with one block per multiprocessor.
        cooperative: whether all blocks of a grid as large as the GPU run at the same time. Another
            process on it may prevent that.
    """

    cells: tuple[str, ...] = ()
    simulated: bool = False
    capability: int = 0
    multiprocessors: int = 0
    shared_bytes: int = 48 << 10
    tables: Tables = field(default_factory=Tables)
    clusters: tuple[tuple[int, int], ...] = ()
    cooperative: bool = True


@dataclass(frozen=True)
class TritonFacts:
    """A GPU as Triton programs it.

    Attributes:
        nvidia: whether its matrix units multiply float32 as TF32, and its compiler accepts a limit
            of registers.
        interpreted: whether Triton runs in its interpreter, on a CPU.
        shared_bytes: most shared memory of a program.
        warp: threads of a warp.
    """

    nvidia: bool = True
    interpreted: bool = False
    shared_bytes: int = 48 << 10
    warp: int = 32


@dataclass(frozen=True)
class Device:
    """The machine as one call sees it.

    Attributes:
        kind: torch's name for the device: "cpu", "cuda", "xpu", …
        forced: the one kernel that the user allows, or None.
        tf32: whether float32 may be multiplied as TF32.
        cpu, cuda, triton: facts for the kernel of that name, or why it cannot run here.
    """

    kind: str = "cpu"
    forced: str | None = None
    tf32: bool = False
    cpu: CpuFacts = field(default_factory=CpuFacts)
    cuda: CudaFacts | str = "the CUDA kernels are not built"
    triton: TritonFacts | str = "Triton is not installed"


# In the order of `WeightLayout` in csrc/cpu/contract.h.
WEIGHT_LAYOUTS = ("unpacked", "panels", "prepacked")


@dataclass(frozen=True)
class CpuConfig:
    """How the CPU kernel runs: `CpuPlan` of csrc/cpu/contract.h.

    Attributes:
        weights: how weights are read, one of `WEIGHT_LAYOUTS`: "unpacked" in torch's layout, for
            few rows; "panels" packed panel by panel at each step, into memory that stays in the
            cache; "prepacked" packed before the first step.
        split_recurrences, split_sequences, split_units: factors of the number of threads.
    """

    weights: str = "prepacked"
    split_recurrences: int = 1
    split_sequences: int = 1
    split_units: int = 1

    @property
    def threads(self) -> int:
        return self.split_recurrences * self.split_sequences * self.split_units


@dataclass(frozen=True)
class CudaConfig:
    """How the CUDA kernels run: `CudaPlan` of csrc/cuda/contract.h.

    Attributes:
        precision: how numbers are stored and multiplied.
        residency: where the recurrent weights stay: "step", "block", "cluster" or "grid".
        batch_tile: rows of the batch in a block.
        blocks: blocks of a group, which share the units of one batch tile.
        warps: most warps of a block.
        groups: groups that run at the same time if the residency is "grid".
        row_group: units that one warp computes, or several warps that split the depth of the
            product; 0 in the residency "step".
    """

    precision: str = ""
    residency: str = ""
    batch_tile: int = 1
    blocks: int = 1
    warps: int = 4
    groups: int = 1
    row_group: int = 0


@dataclass(frozen=True)
class TritonConfig:
    """How the Triton kernels run.

    Attributes:
        precision: precision of float32 products, as `tl.dot` names it.
        resident: whether the recurrent weights stay in a program for the whole sweep.
        matrix_units: whether matrix units multiply the tiles, which needs 16 rows or more.
        batch_tile: rows of the batch in a program.
        unit_tile: units that a program computes at a time; all units if weights are resident.
        depth_tile: units of the previous step that it multiplies at a time.
        warps: warps of a program.
        stages: tiles of weights that are loaded at the same time.
        registers: most registers of a thread; 0 for the hardware's limit.
    """

    precision: str = "ieee"
    resident: bool = False
    matrix_units: bool = True
    batch_tile: int = 1
    unit_tile: int = 1
    depth_tile: int = 1
    warps: int = 4
    stages: int = 1
    registers: int = 240


@dataclass(frozen=True)
class Plan:
    """How a problem runs.

    Attributes:
        kernel: name of the kernel.
        config: how that kernel runs; None for the reference.
        chunk_rows: rows of input that are projected, or differentiated, at a time.
        refused: (name, reason) of each preferred kernel that refused.
    """

    kernel: str
    config: CpuConfig | CudaConfig | TritonConfig | None = None
    chunk_rows: int = 1
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def cpu(self) -> CpuConfig:
        """The configuration; the plan must be for the CPU kernel."""
        assert isinstance(self.config, CpuConfig), self
        return self.config

    @property
    def cuda(self) -> CudaConfig:
        """The configuration; the plan must be for the CUDA kernels."""
        assert isinstance(self.config, CudaConfig), self
        return self.config

    @property
    def triton(self) -> TritonConfig:
        """The configuration; the plan must be for the Triton kernels."""
        assert isinstance(self.config, TritonConfig), self
        return self.config

    def chunk_steps(self, steps: int, batch: int) -> int:
        """Time steps of a chunk: as many as `chunk_rows` hold, and at least one."""
        return max(1, min(steps, self.chunk_rows // max(1, batch)))
