"""The sweep in CUDA C++: its library, and how a call of it is laid out.

The library, `_cuda.so`, has no torch in it and is loaded when its kernels are first asked about.
Environment: `FASTRNN_CUDA_LIBRARY` names another one, for instance that of the tests, which runs
the same kernels on tensors of the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrnn.extension import CUDA_KERNELS
from fastrnn.kernels.gpu.sweeps import Scan, Tape
from fastrnn.plan import Plan

__all__ = ["Library", "RowGroup", "Tables", "library", "sweeps"]


class Sweep(ctypes.Structure):
    """`Sweep` of csrc/cuda/contract.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "batch", "hidden", "lanes", "begin", "end")),
        *((name, ctypes.c_int64) for name in ("base", "base_reverse", "chunk_rows")),
        *((name, ctypes.c_int64) for name in ("tape_base", "tape_base_reverse")),
        ("reverse", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("first", "length", "resets", "w_hh", "u", "b_hh")),
        *((name, ctypes.c_void_p) for name in ("carry", "y", "tape", "v", "dy", "s0", "ds")),
        *((name, ctypes.c_void_p) for name in ("du", "dv")),
        *((name, ctypes.c_void_p) for name in ("previous", "workspace")),
    )


class CudaPlan(ctypes.Structure):
    """`CudaPlan` of csrc/cuda/contract.h."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in ("number", "regime", "batch_tile", "blocks", "warps", "groups", "row_group")
    )


class CudaRowGroup(ctypes.Structure):
    """`CudaRowGroup` of csrc/cuda/contract.h."""

    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("backward", "gates", "batch_tile", "units")
    )


class CudaTables(ctypes.Structure):
    """`CudaTables` of csrc/cuda/contract.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("recurrences", "warps", "chunk_bytes")),
        *((name, ctypes.c_int32) for name in ("piece_bytes", "row_pad_bytes", "fragment_bytes")),
        *((name, ctypes.c_int32) for name in ("gradient_bytes", "stop_bytes", "barrier_bytes")),
        ("chunk_registers", ctypes.c_int32),
        ("staged_gap_bytes", ctypes.c_int32 * 4),
        ("batch_tiles", ctypes.c_int32 * 3),
        ("registers", ctypes.c_int32 * 4 * 3 * 2 * 2),
        ("step_tiles", ctypes.c_int32 * 3),
        ("step_units", ctypes.c_int32 * 3 * 2),
        ("row_group_count", ctypes.c_int32),
        ("row_groups", ctypes.POINTER(CudaRowGroup)),
    )


NUMBERS = {"float64": 0, "float32": 1, "tf32": 2, "tf32x3": 3, "bfloat16": 4, "float16": 5}
REGIMES = {"step": 0, "block": 1, "cluster": 2, "grid": 3}


@dataclass(frozen=True)
class RowGroup:
    """A row group for which there are persistent kernels, of every precision whose
    `Tables.registers` are not 0 for it.

    Attributes:
        backward: whether they are of the backward pass.
        gates: G of the cell.
        batch_tile: rows of the batch that a group of blocks works on.
        units: of a row group; `CudaPlan.row_group` names it by them.
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
    """What the kernels were compiled with and a plan goes by.

    A tuple with an item for each batch tile has them in the order of `batch_tiles`, one for each
    pass has the forward one first, and one for each kind of precision has at 1 the one that splits
    a number in parts ("tf32x3") and at 0 all others.

    Attributes:
        recurrences: the most of a sweep.
        warps: the most of a block, and the most row groups of a block.
        chunk_bytes: of a row of an operand, which is whole chunks.
        piece_bytes: of an operand that travel as one.
        row_pad_bytes: after a row of an operand in shared memory.
        fragment_bytes: of a tile of weights by half a chunk, and of its sums in 8 columns.
        gradient_bytes: of a state's gradients for 16 units in 8 columns, in the backward pass.
        stop_bytes: of the number of steps of a column of a row group, in the backward pass.
        barrier_bytes: at the end of a block's shared memory.
        chunk_registers: of a thread, for a chunk of a tile of weights.
        staged_gap_bytes: [4], after n pieces of 8 columns that a warp collects, at n % 4.
        batch_tiles: [3], rows of the batch.
        registers: [pass][precision][batch tile][4], of a thread for weights, by the tiles of a row
            group: 1, 2, 3, and 4 or more. 0 where there is no such kernel.
        row_groups: all there are, sorted by pass, gates, batch tile and units.
        step_tiles: [3], rows of the batch in a block of a launch a step.
        step_units: [pass][3], units of such a block, in the order of `step_tiles`.
    """

    recurrences: int
    warps: int
    chunk_bytes: int
    piece_bytes: int
    row_pad_bytes: int
    fragment_bytes: int
    gradient_bytes: int
    stop_bytes: int
    barrier_bytes: int
    chunk_registers: int
    staged_gap_bytes: tuple[int, ...]
    batch_tiles: tuple[int, ...]
    registers: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    row_groups: tuple[RowGroup, ...]
    step_tiles: tuple[int, ...]
    step_units: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, given: CudaTables) -> Tables:
        """The same as `given`, in values of Python's."""

        def plain(value: Any) -> Any:
            return tuple(map(plain, value)) if isinstance(value, ctypes.Array) else value

        fields = {name: plain(getattr(given, name)) for name, *_ in CudaTables._fields_}
        groups = fields["row_groups"][: fields.pop("row_group_count")]
        fields["row_groups"] = tuple(
            RowGroup(bool(group.backward), group.gates, group.batch_tile, group.units)
            for group in groups
        )
        return cls(**fields)

    def units(self, backward: bool, gates: int, batch_tile: int) -> tuple[int, ...]:
        """The row groups that there are for such a cell and batch tile, the least first."""
        wanted = backward, gates, batch_tile
        return tuple(
            group.units
            for group in self.row_groups
            if (group.backward, group.gates, group.batch_tile) == wanted
        )


class Library:
    """The functions of csrc/cuda/contract.h.

    Attributes:
        path: where it was loaded from.
        simulated: whether it runs on the CPU, on its tensors.
        cells: names of the cells that it has kernels for.
        tables: what its kernels were compiled with and a plan goes by.

    Raises:
        OSError: if there is no such library, or it cannot be loaded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        loaded = ctypes.CDLL(str(path))
        text, number, size = ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
        call = (text, ctypes.POINTER(Sweep), ctypes.POINTER(CudaPlan))

        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(loaded, f"fastrnn_cuda_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        kinds = ("forward", "backward", "previous", "replay")
        self._launch = {kind: function(kind, number, *call, ctypes.c_void_p) for kind in kinds}
        self._workspace_bytes = function("workspace_bytes", size, *call, number)
        self._shared_bytes = function("shared_bytes", size, *call, number)
        self._resident_clusters = function("resident_clusters", number, number, number, size)
        self._error = function("error", text, number)
        self.simulated = bool(function("simulated", number)())
        self.cells = tuple(function("cells", text)().decode().split())
        self.tables = Tables.of(function("tables", ctypes.POINTER(CudaTables))().contents)

    def workspace_bytes(self, cell: str, sweep: Sweep, plan: CudaPlan, backward: bool) -> int:
        return int(self._workspace_bytes(cell.encode(), sweep, plan, backward))

    def shared_bytes(self, cell: str, sweep: Sweep, plan: CudaPlan, backward: bool) -> int:
        """Of a block of a persistent kernel; negative where none can do its part of the plan."""
        return int(self._shared_bytes(cell.encode(), sweep, plan, backward))

    def launch(
        self, kind: str, cell: str, sweep: Sweep, plan: CudaPlan, stream: int | None
    ) -> None:
        """Launch the kernels of a sweep, "forward" or "backward", or those that make its tape
        again, "previous" and "replay", without waiting for them.

        Raises:
            RuntimeError: with what CUDA says, if it does not take the launch.
        """
        self._check(self._launch[kind](cell.encode(), sweep, plan, stream))

    def resident_clusters(self, blocks: int, threads: int, shared_bytes: int) -> int:
        """How many clusters of so many blocks the current device runs at the same time."""
        count = int(self._resident_clusters(blocks, threads, shared_bytes))
        return max(count, 0)

    def _check(self, error: int) -> None:
        if error:
            text = self._error(error)
            said = "no text" if text is None else text.decode(errors="replace")
            raise RuntimeError(f"the CUDA kernels of fastrnn failed: {said} (error {error})")


def library() -> Library | str:
    """The kernels, or why there are none."""
    return _library(os.environ.get("FASTRNN_CUDA_LIBRARY", ""))


@functools.cache
def _library(named: str) -> Library | str:
    path = Path(named) if named else CUDA_KERNELS
    if not named and not path.is_file():
        return "fastrnn was built without its CUDA kernels; FASTRNN_CUDA=1 builds them, with nvcc"
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        return f"the library of CUDA kernels cannot be loaded: {error}"


class _Sweeps:
    """`sweeps.ReplayingSweeps` in CUDA C++."""

    def forward(
        self,
        scan: Scan,
        begin: int,
        end: int,
        u: Tensor,
        b_hh: Tensor | None,
        carry: Tensor,
        y: Tensor,
        tape: Tensor | None,
    ) -> None:
        given = None if tape is None else Tape(tape)
        _launch("forward", scan, begin, end, given, u=u, b_hh=b_hh, carry=carry, y=y)

    def backward(
        self,
        scan: Scan,
        begin: int,
        end: int,
        dy: Tensor | None,
        s0: Tensor,
        ds: Tensor,
        y: Tensor,
        tape: Tape,
        du: Tensor,
        dv: Tensor,
        previous: Tensor,
        dh: Tensor | None,
    ) -> None:
        assert dh is None, "the plan asks for no projection"
        _launch(
            "backward", scan, begin, end, tape,
            dy=dy, s0=s0, ds=ds, y=y, du=du, dv=dv, previous=previous,
        )  # fmt: skip

    def previous(
        self, scan: Scan, begin: int, end: int, s0: Tensor, y: Tensor, previous: Tensor
    ) -> None:
        _launch("previous", scan, begin, end, None, s0=s0, y=y, previous=previous)

    def replay(
        self,
        scan: Scan,
        begin: int,
        end: int,
        u: Tensor,
        v: Tensor,
        b_hh: Tensor | None,
        previous: Tensor,
        carry: Tensor,
        tape: Tape | None,
    ) -> None:
        _launch(
            "replay", scan, begin, end, tape,
            u=u, v=v, b_hh=b_hh, previous=previous, carry=carry,
        )  # fmt: skip


sweeps = _Sweeps()


# What each kind of launch writes; that was allocated for this call, and so is aligned.
_WRITTEN = {
    "forward": ("carry", "y", "tape"),
    "backward": ("ds", "du", "dv", "previous"),
    "previous": ("previous",),
    "replay": ("carry", "tape"),
}


def _launch(
    kind: str, scan: Scan, begin: int, end: int, tape: Tape | None, **tensors: Tensor | None
) -> None:
    found = library()
    assert isinstance(found, Library), found
    tensors |= {
        "tape": None if tape is None else tape.values,
        "w_hh": scan.w_hh,
        "first": scan.first_on_device,
        "length": scan.length,
        "resets": scan.resets,
    }
    held = {
        name: tensor if name in _WRITTEN[kind] else _aligned(tensor)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    sweep = Sweep(
        steps=scan.steps,
        batch=scan.batch,
        hidden=scan.hidden,
        lanes=scan.lanes,
        begin=begin,
        end=end,
        base=scan.stretch(begin, end, False)[0],
        base_reverse=scan.stretch(begin, end, True)[0],
        chunk_rows=scan.chunk_rows,
        tape_base=0 if tape is None else tape.base[0],
        tape_base_reverse=0 if tape is None else tape.base[1],
        reverse=scan.reverse,
        **{name: tensor.data_ptr() for name, tensor in held.items()},
    )
    plan = cuda_plan(scan.plan)
    x = scan.given.x
    with _on(x.device):
        if kind in ("forward", "backward"):
            size = found.workspace_bytes(scan.cell, sweep, plan, kind == "backward")
            if size > 0:
                held["workspace"] = torch.empty(size, dtype=torch.uint8, device=x.device)
                sweep.workspace = held["workspace"].data_ptr()
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        found.launch(kind, scan.cell, sweep, plan, stream)


def cuda_plan(plan: Plan) -> CudaPlan:
    sizes = plan.batch_tile, plan.blocks, plan.warps, plan.groups
    return CudaPlan(NUMBERS[plan.number], REGIMES[plan.regime], *sizes)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, at an address that vectors of 16 bytes may be read from."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
