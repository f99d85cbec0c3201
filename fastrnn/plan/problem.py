"""What a decision is made from, and what it is: a problem, a device, a plan.

`Device` and `Plan` have a part for each kernel, so that a kernel's module reads its own part alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastrnn.plan.dtypes import computed_bytes
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

# A plan hardly depends on lengths, and asking for one takes longer than a small batch does: numbers
# of steps and rows count by their leading bits alone, that is to one part in eight.
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
    rows: int = -1  # live rows; T*B unless packed or with lengths
    dtype: str = "float32"
    tape: bool = False  # keeps what BPTT needs
    backward: bool = False
    frozen: bool = False  # weights were prepacked before the call
    projected: bool = False  # state 0 goes through weight_hr
    projectable: bool = True  # the cell reads state 0 through `v` alone

    @property
    def live_rows(self) -> int:
        return self.steps * self.batch if self.rows < 0 else self.rows

    @property
    def itemsize(self) -> int:
        """Bytes of a number as computed."""
        return computed_bytes(self.dtype)

    def rounded(self) -> Problem:
        """The problem with which this one shares a plan."""
        return replace(self, steps=_leading_bits(self.steps), rows=_leading_bits(self.rows))


def _leading_bits(number: int) -> int:
    dropped = max(0, number.bit_length() - SIGNIFICANT_BITS)
    return number >> dropped << dropped


@dataclass(frozen=True)
class CpuFacts:
    """A CPU, and what fastrnn has for it.

    Attributes:
        threads: that a call may use.
        vector_bytes: of the vectors of the instruction set in use.
        l2_bytes: of the second-level cache of a core.
        compiled: whether the cell has compiled code.
    """

    threads: int = 1
    vector_bytes: int = 16
    l2_bytes: int = 1 << 20
    compiled: bool = True


@dataclass(frozen=True)
class CudaFacts:
    """An NVIDIA GPU, and the library of CUDA kernels.

    Attributes:
        cells: names of those that the library has kernels for.
        simulated: whether the kernels run on CPUs, in the simulator of the tests.
        capability: 90 for compute capability 9.0; 0 where there is no GPU.
        multiprocessors: of the GPU.
        shared_bytes: that the threads of a block may share.
        tables: what the kernels were compiled with.
        clusters: `(blocks, count)` for each size of clusters: how many run at the same time, with
            one block to a multiprocessor.
    """

    cells: tuple[str, ...] = ()
    simulated: bool = False
    capability: int = 0
    multiprocessors: int = 0
    shared_bytes: int = 48 << 10
    tables: Tables = field(default_factory=Tables)
    clusters: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TritonFacts:
    """A GPU as Triton programs it.

    Attributes:
        nvidia: whether its matrix units take float32 as TF32, and its compiler a limit of
            registers.
        interpreted: whether Triton runs in its interpreter, on a CPU.
        shared_bytes: that the threads of a program may share.
        warp: threads that run in step.
    """

    nvidia: bool = True
    interpreted: bool = False
    shared_bytes: int = 48 << 10
    warp: int = 32


@dataclass(frozen=True)
class Device:
    """What a machine offers to one call.

    Attributes:
        kind: torch's name for the device: "cpu", "cuda", "xpu", …
        forced: the one kernel that the user allows, or None.
        tf32: whether float32 may be multiplied as TF32.
        cpu, cuda, triton: what the kernel of that name finds, or why it cannot run here.
    """

    kind: str = "cpu"
    forced: str | None = None
    tf32: bool = False
    cpu: CpuFacts = field(default_factory=CpuFacts)
    cuda: CudaFacts | str = "the CUDA kernels are not built"
    triton: TritonFacts | str = "Triton is not installed"


@dataclass(frozen=True)
class CpuConfig:
    """How the CPU kernel runs: `CpuPlan` of csrc/cpu/contract.h.

    Attributes:
        prepacked_weights: False for few rows: weights are read once, as they lie.
        split_recurrences, split_sequences, split_units: factors of the number of threads.
    """

    prepacked_weights: bool = True
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
        residency: where the recurrent weights stay.
        batch_tile: rows of the batch in a block.
        blocks: of a group, which shares the units of a tile of the batch.
        warps: of a block, at most.
        groups: that run at the same time, where blocks wait for each other all over the GPU.
        row_group: units of the share of a warp, or of several that split the depth of the product;
            0 in the residency "step".
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
        precision: of products of float32, as `tl.dot` names it.
        resident: whether the recurrent weights stay in a program for the whole sweep.
        matrix_units: whether products of tiles run there, which takes 16 rows or more.
        batch_tile: rows of the batch in a program.
        unit_tile: units that it computes at a time, all where weights are resident.
        depth_tile: units of the step before that it multiplies at a time.
        warps: of a program.
        stages: tiles of weights that are under way at a time.
        registers: of a thread, at most; 0 for no limit but the hardware's.
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
        kernel: its name.
        config: how that kernel runs; None for the reference.
        chunk_rows: rows of input that are projected, or differentiated, at a time.
        refused: kernels that come before it, and why not them.
    """

    kernel: str
    config: CpuConfig | CudaConfig | TritonConfig | None = None
    chunk_rows: int = 1
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def cpu(self) -> CpuConfig:
        """The configuration, of a plan for the CPU kernel."""
        assert isinstance(self.config, CpuConfig), self
        return self.config

    @property
    def cuda(self) -> CudaConfig:
        """The configuration, of a plan for the CUDA kernels."""
        assert isinstance(self.config, CudaConfig), self
        return self.config

    @property
    def triton(self) -> TritonConfig:
        """The configuration, of a plan for the Triton kernels."""
        assert isinstance(self.config, TritonConfig), self
        return self.config

    def chunk_steps(self, steps: int, batch: int) -> int:
        """Time steps of a chunk: whole ones, as many as `chunk_rows` hold, and at least one."""
        return max(1, min(steps, self.chunk_rows // max(1, batch)))
