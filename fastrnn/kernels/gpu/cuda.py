"""The sweeps in CUDA C++: loads their library and calls it through ctypes.

The library, `_cuda.so`, does not use torch. It is loaded when a plan first needs to know about its
kernels. The environment variable `FASTRNN_CUDA_LIBRARY` names another library, for instance that of
the tests, which runs the same kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrnn.cells.checks import MAX_STATES
from fastrnn.extension import _C, CUDA_KERNELS
from fastrnn.kernels.gpu.sweeps import (
    BackwardBuffers,
    ForwardBuffers,
    RecomputeBuffers,
    Scan,
    Tape,
)
from fastrnn.plan import CudaConfig
from fastrnn.plan import cuda as plan_of_cuda
from fastrnn.plan.tables import RowGroup, Tables

__all__ = ["CooperativeLaunchRefused", "Library", "hand_over", "library", "read_tables", "sweeps"]


_EachState = ctypes.c_void_p * MAX_STATES


class Sweep(ctypes.Structure):
    """`Sweep` of csrc/cuda/contract.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("steps", "batch", "hidden", "recurrences", "begin", "end")
        ),
        *((name, ctypes.c_int64) for name in ("base", "base_reverse", "chunk_rows")),
        *((name, ctypes.c_int64) for name in ("tape_base", "tape_base_reverse")),
        ("reverse", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("first", "length", "resets", "w_hh")),
        ("s0", _EachState),
        *((name, ctypes.c_void_p) for name in ("u", "b_hh", "carry")),
        ("last", _EachState),
        *((name, ctypes.c_void_p) for name in ("y", "tape", "v", "dy")),
        ("dlast", _EachState),
        ("ds", ctypes.c_void_p),
        ("ds0", _EachState),
        *((name, ctypes.c_void_p) for name in ("du", "dv", "h_prev", "workspace")),
    )


class CudaPlan(ctypes.Structure):
    """`CudaPlan` of csrc/cuda/contract.h."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "precision",
            "residency",
            "batch_tile",
            "blocks",
            "warps",
            "groups",
            "row_group",
        )
    )


class CudaRowGroup(ctypes.Structure):
    """`CudaRowGroup` of csrc/cuda/contract.h."""

    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("backward", "gates", "batch_tile", "units")
    )


class CudaTables(ctypes.Structure):
    """`CudaTables` of csrc/cuda/contract.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("recurrences", "warps", "k_block_bytes")),
        *((name, ctypes.c_int32) for name in ("piece_bytes", "row_pad_bytes", "fragment_bytes")),
        *((name, ctypes.c_int32) for name in ("gradient_bytes", "stop_bytes", "barrier_bytes")),
        ("k_block_registers", ctypes.c_int32),
        ("staged_gap_bytes", ctypes.c_int32 * 4),
        ("batch_tiles", ctypes.c_int32 * 3),
        ("registers", ctypes.c_int32 * 4 * 3 * 2 * 2),
        ("step_tiles", ctypes.c_int32 * 3),
        ("step_units", ctypes.c_int32 * 3 * 2),
        ("row_group_count", ctypes.c_int32),
        ("row_groups", ctypes.POINTER(CudaRowGroup)),
    )


PRECISIONS = {"float64": 0, "float32": 1, "tf32": 2, "tf32x3": 3, "bfloat16": 4, "float16": 5}
RESIDENCIES = {"step": 0, "block": 1, "cluster": 2, "grid": 3}
_TOO_LARGE = 720  # cudaErrorCooperativeLaunchTooLarge


def _tables(exported: CudaTables) -> Tables:
    """The tables that a library exports, as Python values."""

    def plain(value: Any) -> Any:
        return tuple(map(plain, value)) if isinstance(value, ctypes.Array) else value

    fields = {name: plain(getattr(exported, name)) for name, *_ in CudaTables._fields_}
    groups = fields["row_groups"][: fields.pop("row_group_count")]
    fields["row_groups"] = tuple(
        RowGroup(bool(group.backward), group.gates, group.batch_tile, group.units)
        for group in groups
    )
    return Tables(**fields)


def read_tables(loaded: ctypes.CDLL) -> Tables:
    """The constants that the kernels of a library were compiled with."""
    function = loaded.fastrnn_cuda_tables
    function.restype = ctypes.POINTER(CudaTables)
    return _tables(function().contents)


class Library:
    """The functions of csrc/cuda/contract.h.

    Attributes:
        path: the file that it was loaded from.
        simulated: whether it runs on the CPU, on CPU tensors.
        cells: names of the cells that it has kernels for.
        tables: the constants that its kernels were compiled with; a plan needs them.

    Raises:
        OSError: if there is no such library, or it cannot be loaded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        loaded = ctypes.CDLL(str(path))
        text, integer, size = ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
        call = (text, ctypes.POINTER(Sweep), ctypes.POINTER(CudaPlan))

        def function(name: str, result: Any, *arguments: Any) -> Any:
            symbol = getattr(loaded, f"fastrnn_cuda_{name}")
            symbol.restype, symbol.argtypes = result, arguments
            return symbol

        kinds = ("forward", "backward", "h_prev", "recompute")
        self._launch = {kind: function(kind, integer, *call, ctypes.c_void_p) for kind in kinds}
        self._workspace_bytes = function("workspace_bytes", size, *call, integer)
        self._shared_bytes = function("shared_bytes", size, *call, integer)
        self._usable = function("usable", integer, ctypes.POINTER(integer))
        self._resident_clusters = function("resident_clusters", integer, integer, integer, size)
        self._error = function("error", text, integer)
        self._capturing = function("capturing", integer, ctypes.c_void_p)
        self.simulated = bool(function("simulated", integer)())
        self.cells = tuple(function("cells", text)().decode().split())
        self.tables = read_tables(loaded)

    def workspace_bytes(self, cell: str, sweep: Sweep, plan: CudaPlan, backward: bool) -> int:
        return int(self._workspace_bytes(cell.encode(), sweep, plan, backward))

    def shared_bytes(self, cell: str, sweep: Sweep, plan: CudaPlan, backward: bool) -> int:
        """Shared memory per block of a persistent kernel; negative if the plan fits no block."""
        return int(self._shared_bytes(cell.encode(), sweep, plan, backward))

    def launch(
        self, kind: str, cell: bytes, sweep: Sweep, plan: CudaPlan, stream: int | None
    ) -> None:
        """Launch kernels without waiting for them.

        Args:
            kind: "forward" or "backward" for a sweep, "h_prev" or "recompute" for the kernels that
                recompute a tape.

        Raises:
            CooperativeLaunchRefused: if not all blocks of a grid can run at the same time.
            RuntimeError: if CUDA refuses the launch; the message has CUDA's reason.
        """
        if error := self._launch[kind](cell, sweep, plan, stream):
            refused = CooperativeLaunchRefused if error == _TOO_LARGE else RuntimeError
            raise refused(f"the CUDA kernels of fastrnn failed: {self._text(error)}")

    def addresses(self, kind: str) -> dict[str, int | None]:
        """Where the functions are with which C++ launches sweeps of a kind by itself."""
        functions = {
            "run": self._launch[kind],
            "error": self._error,
            "capturing": self._capturing,
        }
        return {n: ctypes.cast(f, ctypes.c_void_p).value for n, f in functions.items()}

    def usable(self) -> str | None:
        """Why the kernels do not run on the current device with its driver, or None."""
        error = int(self._usable(ctypes.c_int()))
        return (
            f"its library cannot run on this GPU and driver: {self._text(error)}" if error else None
        )

    def resident_clusters(self, blocks: int, threads: int, shared_bytes: int) -> int:
        """How many clusters of `blocks` blocks the current device runs at the same time."""
        count = int(self._resident_clusters(blocks, threads, shared_bytes))
        return max(count, 0)

    def _text(self, error: int) -> str:
        text = self._error(error)
        reason = "no text" if text is None else text.decode(errors="replace")
        return f"{reason} (error {error})"


def library() -> Library | str:
    """The library of kernels, or why there is none."""
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


_here: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
_Tensors = dict[str, Tensor | None]  # by their names in `Sweep`


class CooperativeLaunchRefused(RuntimeError):
    """The device does not run all blocks of a grid at the same time, though it is large enough:
    other processes or a part of the device that is set aside limit it."""


class _Sweeps:
    """`sweeps.RecomputingSweeps` in CUDA C++."""

    takes_states = True

    def forward(self, scan: Scan, begin: int, end: int, buffers: ForwardBuffers) -> None:
        u, b_hh, carry, y, tape, begins, last = buffers
        assert begins is None, "the CUDA kernels let episodes begin with zeros"
        read: _Tensors = {"u": u, "b_hh": b_hh}
        written: _Tensors = {"carry": carry, "y": y, "tape": tape}
        _launch("forward", scan, begin, end, read, written, states={"last": last})

    def backward(
        self, scan: Scan, begin: int, end: int, buffers: BackwardBuffers, tape: Tape
    ) -> None:
        dy, dsteps, _, ds, y, du, dv, h_prev, dh, dp, _, begins, _, dlast, ds0 = buffers
        assert dsteps is None, "the CUDA kernels read gradients of final states alone"
        assert begins is None, "the CUDA kernels let episodes begin with zeros"
        assert dh is None, "the CUDA kernels do not project"
        assert dp is None, "the CUDA kernels have no cells with learned parameters"
        read: _Tensors = {"dy": dy, "y": y, "tape": tape.values}
        written: _Tensors = {"ds": ds, "du": du, "dv": dv, "h_prev": h_prev}
        states = {"dlast": dlast, "ds0": ds0}
        _launch("backward", scan, begin, end, read, written, tape.base, states)

    def h_prev(self, scan: Scan, begin: int, end: int, y: Tensor, h_prev: Tensor) -> None:
        _launch("h_prev", scan, begin, end, {"y": y}, {"h_prev": h_prev})

    def recompute(
        self, scan: Scan, begin: int, end: int, buffers: RecomputeBuffers, tape: Tape | None
    ) -> None:
        u, v, b_hh, h_prev, carry = buffers
        read: _Tensors = {"u": u, "v": v, "b_hh": b_hh, "h_prev": h_prev}
        written: _Tensors = {"carry": carry, "tape": None if tape is None else tape.values}
        base = (0, 0) if tape is None else tape.base
        _launch("recompute", scan, begin, end, read, written, base)


sweeps = _Sweeps()


class _Call:
    """What launches of one kind have in common for all calls of a shape."""

    def __init__(self, kind: str, scan: Scan) -> None:
        found = library()
        assert isinstance(found, Library), found
        self.kernels, self.kind, self.cell = found, kind, scan.cell.encode()
        self.plan = cuda_plan(scan.plan.cuda)
        self.sweep = Sweep(
            steps=scan.steps,
            batch=scan.batch,
            hidden=scan.hidden,
            recurrences=scan.recurrences,
            end=scan.steps,
            chunk_rows=scan.chunk_rows,
            reverse=scan.reverse,
        )
        self.workspace = 0
        if kind in ("forward", "backward"):
            backward = kind == "backward"
            self.workspace = found.workspace_bytes(scan.cell, self.sweep, self.plan, backward)


def _launch(
    kind: str,
    scan: Scan,
    begin: int,
    end: int,
    read: _Tensors,
    written: _Tensors,
    tape_base: tuple[int, int] = (0, 0),
    states: dict[str, Sequence[Tensor | None]] | None = None,
) -> None:
    """Launch the kernels for the steps [begin, end). The tensors in `written` were allocated for
    this call, hence they are aligned. `states` has a tensor for each state."""
    call = scan.remembered.get(kind)
    if call is None:
        call = scan.remembered[kind] = _Call(kind, scan)
    sweep = Sweep.from_buffer_copy(call.sweep)
    sweep.begin, sweep.end = begin, end
    if begin or end != scan.steps:
        sweep.base = scan.row_range(begin, end, False)[0]
        sweep.base_reverse = scan.row_range(begin, end, True)[0]
    sweep.tape_base, sweep.tape_base_reverse = tape_base
    one = scan.operands.w_hh[0]
    read["w_hh"] = one if scan.recurrences == 1 and one.is_contiguous() else scan.w_hh
    if scan.first_on_device is not None:
        sweep.first = scan.first_on_device.data_ptr()
    if scan.length is not None:
        read["length"] = scan.length
    if scan.resets is not None:
        read["resets"] = scan.resets
    copies = []  # they live until the launch, after which the stream keeps them

    def address(tensor: Tensor) -> int:
        """That of the tensor or of a copy: vector reads need aligned addresses."""
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            copies.append(tensor)
        return tensor.data_ptr()

    for name, tensor in read.items():
        if tensor is not None:
            setattr(sweep, name, address(tensor))
    for name, each in {"s0": scan.operands.s0, **(states or {})}.items():
        for j, state in enumerate(each):
            if state is not None:
                getattr(sweep, name)[j] = address(state)
    for name, tensor in written.items():
        if tensor is not None:
            setattr(sweep, name, tensor.data_ptr())
    device = scan.device
    if call.workspace > 0:
        workspace = torch.empty(call.workspace, dtype=torch.uint8, device=device)
        sweep.workspace = workspace.data_ptr()
    if device.type != "cuda":
        call.kernels.launch(kind, call.cell, sweep, call.plan, None)
        return
    stream = torch.cuda.current_stream(device).cuda_stream
    with _here if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        call.kernels.launch(kind, call.cell, sweep, call.plan, stream)


def hand_over(scan: Scan, inputs: tuple[Any, ...], kind: str, epoch: int) -> None:
    """Let C++ launch later calls like this one, which was launched here, if it can.

    Args:
        inputs: those of the operator.
        kind: "forward" or "backward".
        epoch: how often plans had been forgotten when this one was asked for.
    """
    call = scan.remembered[kind]
    plan = [getattr(call.plan, name) for name, *_ in CudaPlan._fields_]
    _C.keep_launch(
        *inputs,
        backward=kind == "backward",
        plan=plan,
        workspace=call.workspace,
        steps=plan_of_cuda.steps_alike(scan.plan, scan.steps, scan.batch),
        epoch=epoch,
        **call.kernels.addresses(kind),
    )


def cuda_plan(config: CudaConfig) -> CudaPlan:
    sizes = config.batch_tile, config.blocks, config.warps, config.groups, config.row_group
    return CudaPlan(PRECISIONS[config.precision], RESIDENCIES[config.residency], *sizes)
