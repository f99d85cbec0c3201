"""The sweep in Triton on tensors: memory, chunks of time steps, launches, and the products around.

Imports Triton when a kernel first runs, and not before. Environment: under `TRITON_INTERPRET=1`,
set before Triton is imported, the kernels run in Triton's interpreter on CPU tensors, slowly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn import codegen, jit
from fastrnn.codegen import Derived
from fastrnn.plan import Plan

__all__ = [
    "Operands",
    "backward",
    "cell_module",
    "compile_options",
    "forward",
    "interpreted",
    "meta_arguments",
    "precision",
]


@dataclass(frozen=True)
class Operands:
    """One scan, as `reference.scan` documents it; without a projection of state 0."""

    x: Tensor
    w_ih: Sequence[Tensor]
    w_hh: Sequence[Tensor]
    b_ih: Sequence[Tensor]
    b_hh: Sequence[Tensor]
    s0: Sequence[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    reverse: int


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cell_module(derived: Derived) -> ModuleType:
    """The module with the cell's functions in Triton, which reads their source from a file."""
    return _cell_module(codegen.triton(derived), derived.name)


@functools.cache
def _cell_module(source: str, name: str) -> ModuleType:
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = jit.cache_folder() / f"triton_{re.sub(r'[^0-9A-Za-z]', '_', name)}_{digest}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != source:
        # Other processes see the file whole or not at all.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as work:
            made = Path(work) / path.name
            made.write_text(source, encoding="utf-8")
            os.replace(made, path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def meta_arguments(
    derived: Derived,
    plan: Plan,
    hidden: int,
    precision: str,
    backward: bool = False,
    bias: bool = False,
    tape: bool = False,
    dy: bool = True,
    packed: bool = False,
    ragged: bool = False,
    resets: bool = False,
) -> dict[str, Any]:
    """What a kernel is compiled for: its arguments of type `constexpr`."""
    cell = cell_module(derived)
    common = {
        "CELL": cell.backward if backward else cell.forward,
        "H": hidden,
        "G": len(derived.gates),
        "S": len(derived.states),
        "K": len(derived.kept),
        "TIED": sum(tied << g for g, tied in enumerate(derived.tied)),
        "PACKED": packed,
        "RAGGED": ragged,
        "RESETS": resets,
        "PRECISION": precision,
        "DOT": plan.matrix_units,
        "BB": plan.batch_tile,
        "BN": plan.unit_tile,
        "BK": plan.depth_tile,
    }
    return common | ({"DY": dy} if backward else {"BIAS": bias, "TAPE": tape})


def compile_options(plan: Plan, nvidia: bool) -> dict[str, Any]:
    """How a kernel is compiled, besides its arguments."""
    options: dict[str, Any] = {
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        "enable_fp_fusion": True,
    }
    if nvidia:
        # Of 255. Without a limit the compiler spills to make room for a second program on the
        # multiprocessor, and with the highest one it spills some before the sweep begins.
        options["maxnreg"] = 240
    return options


class _Scan:
    """What both sweeps need to know of a call."""

    def __init__(self, derived: Derived, given: Operands, chunk_rows: int) -> None:
        self.derived, self.given = derived, given
        x = given.x
        self.gates, self.states = len(derived.gates), len(derived.states)
        self.lanes = len(given.w_hh)
        self.hidden = given.w_hh[0].size(0) // self.gates
        self.inputs = x.size(-1)
        self.compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.rows = x.shape[:-1].numel()
        self.first: list[int] | None = None  # row at which a step begins, of packed input
        self.first_on_device = self.length = None
        if given.batch_sizes is not None:
            sizes = given.batch_sizes
            self.steps, self.batch = sizes.numel(), given.s0[0].size(1)
            first = torch.zeros(self.steps + 1, dtype=torch.int64)
            torch.cumsum(sizes, 0, out=first[1:])
            self.first = first.tolist()
            slots = torch.arange(self.batch)
            length = (sizes > slots.unsqueeze(1)).sum(1)
            self.first_on_device = first.to(x.device, non_blocking=True)
            self.length = length.to(x.device, non_blocking=True)
        else:
            self.steps, self.batch = (x.size(0), x.size(1)) if x.dim() == 3 else (1, x.size(0))
            self.length = given.lengths
        self.resets = None if given.resets is None else given.resets.contiguous().view(torch.uint8)
        self.backward_lanes = [bool(given.reverse >> p & 1) for p in range(self.lanes)]
        self.chunk_steps = max(1, min(self.steps, chunk_rows // max(1, self.batch)))
        self.chunk_rows = min(self.rows, self.chunk_steps * self.batch)
        self.w_hh = _stacked(given.w_hh)
        self.w_ih = _stacked(given.w_ih)

    def row(self, t: int) -> int:
        return t * self.batch if self.first is None else self.first[t]

    def stretch(self, begin: int, end: int, backward: bool) -> tuple[int, int]:
        """First and past-the-last row of some steps of a scan."""
        if backward:
            begin, end = self.steps - end, self.steps - begin
        return self.row(begin), self.row(end)

    def x_rows(self, rows: tuple[int, int]) -> Tensor:
        """[n, I] of the input, with zeros for what must not be read."""
        x, (low, high) = self.given.x, rows
        if x.dim() == 2:
            return x[low:high]
        batch = max(1, self.batch)
        times = slice(low // batch, high // batch)
        part = x[times]
        if self.given.lengths is not None:
            t = torch.arange(times.start, times.stop, device=x.device).unsqueeze(1)
            part = torch.where((self.given.lengths > t).unsqueeze(-1), part, 0)
        return part.reshape(high - low, self.inputs)

    def run_time(self, begin: int, end: int) -> tuple[Any, ...]:
        """Arguments of a launch from `first` to `reverse`."""
        none = self.w_hh  # any pointer, never followed
        return (
            none if self.first_on_device is None else self.first_on_device,
            none if self.length is None else self.length,
            none if self.resets is None else self.resets,
            self.steps,
            self.batch,
            begin,
            end,
            self.stretch(begin, end, False)[0],
            self.stretch(begin, end, True)[0],
            self.chunk_rows,
            self.given.reverse,
        )

    def flags(self) -> dict[str, bool]:
        return {
            "packed": self.first is not None,
            "ragged": self.length is not None,
            "resets": self.resets is not None,
        }

    def launch(self, kernel: str, plan: Plan, meta: dict[str, Any], *arguments: Any) -> None:
        if not self.batch:
            return
        from fastrnn import triton_sweep

        grid = (-(-self.batch // plan.batch_tile), self.lanes)
        options = compile_options(plan, _is_nvidia(self.given.x.device))
        with _on(self.given.x.device):
            getattr(triton_sweep, kernel)[grid](*arguments, **meta, **options)


def forward(
    derived: Derived, plan: Plan, given: Operands, tape: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, final states and, where asked for, the tape, as `torch.ops.fastrnn.scan`."""
    scan = _Scan(derived, given, plan.chunk_rows)
    x, lanes, hidden = given.x, scan.lanes, scan.hidden
    make = torch.empty if given.lengths is None else torch.zeros  # zeros past the end of a row
    y = make(*x.shape[:-1], lanes * hidden, dtype=x.dtype, device=x.device)
    width = scan.states - 1 + len(derived.kept)
    saved = make(scan.rows if tape else 0, lanes, width, hidden, dtype=x.dtype, device=x.device)
    carry = x.new_zeros(scan.states + 1, lanes, scan.batch, hidden, dtype=scan.compute)
    for j, state in enumerate(given.s0):
        carry[j] = state
    # A gate that the cell knows by the sum of u and v takes both biases in u.
    b_ih, b_hh = (_stacked(b) if b else None for b in (given.b_ih, given.b_hh))
    apart = not all(derived.tied)
    if b_ih is not None and b_hh is not None:
        b_ih = b_ih.clone()
        for g, tied in enumerate(derived.tied):
            if tied:
                part = slice(g * hidden, (g + 1) * hidden)
                b_ih[:, part] += b_hh[:, part]
    meta = meta_arguments(
        derived,
        plan,
        hidden,
        precision(x.dtype, _is_nvidia(x.device)),
        bias=apart and b_hh is not None,
        tape=tape,
        **scan.flags(),
    )
    u = x.new_empty(lanes, scan.chunk_rows, scan.gates * hidden)
    kernel = "forward_resident" if plan.resident else "forward_streamed"
    for begin in range(0, scan.steps, scan.chunk_steps):
        end = min(scan.steps, begin + scan.chunk_steps)
        _project(scan, u, b_ih, begin, end)
        none = scan.w_hh
        scan.launch(
            kernel,
            plan,
            meta,
            u,
            scan.w_hh,
            none if b_hh is None else b_hh,
            carry,
            y,
            saved,
            *scan.run_time(begin, end),
        )
    return y, [carry[j].to(x.dtype) for j in range(scan.states)], saved


def _project(scan: _Scan, u: Tensor, bias: Tensor | None, begin: int, end: int) -> None:
    """u = x * w_ih^T + b for the rows of a chunk, of every scan in its direction."""
    for p, lanes in _runs(scan.backward_lanes):
        low, high = scan.stretch(begin, end, scan.backward_lanes[p])
        x = scan.x_rows((low, high))
        w = scan.w_ih[lanes].transpose(1, 2)
        out = u[lanes, : high - low]
        if w.size(0) == 1:
            if bias is None:
                torch.mm(x, w[0], out=out[0])
            else:
                torch.addmm(bias[p], x, w[0], out=out[0])
        elif bias is None:
            torch.bmm(x.expand(w.size(0), *x.shape), w, out=out)
        else:
            torch.baddbmm(bias[lanes].unsqueeze(1), x.expand(w.size(0), *x.shape), w, out=out)


def backward(
    derived: Derived,
    plan: Plan,
    given: Operands,
    grads: Sequence[Tensor | None],
    y: Tensor,
    tape: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, w_ih, w_hh, b_ih, b_hh and s0, those that `needs` picks, as
    `torch.ops.fastrnn.scan_backward`."""
    need_x, need_ih, need_hh, need_bias, _, need_s0 = needs
    scan = _Scan(derived, given, plan.chunk_rows)
    x, lanes, hidden, compute = given.x, scan.lanes, scan.hidden, scan.compute
    dy = None if grads[0] is None else grads[0].contiguous()
    s0 = x.new_zeros(scan.states, lanes, scan.batch, hidden, dtype=compute)
    ds = torch.zeros_like(s0)
    for j in range(scan.states):
        if given.s0:
            s0[j] = given.s0[j]
        grad = grads[1 + j]
        if grad is not None:
            ds[j] = grad
    make = torch.empty if given.lengths is None else torch.zeros  # rows past an end have none
    depth = scan.gates * hidden
    dv = make(lanes, scan.chunk_rows, depth, dtype=x.dtype, device=x.device)
    du = dv if all(derived.tied) else make(dv.shape, dtype=x.dtype, device=x.device)
    previous = make(lanes, scan.chunk_rows, hidden, dtype=x.dtype, device=x.device)

    found = _Gradients(scan, need_x, need_ih, need_hh, need_bias)
    meta = meta_arguments(
        derived,
        plan,
        hidden,
        precision(x.dtype, _is_nvidia(x.device)),
        True,
        dy=dy is not None,
        **scan.flags(),
    )
    kernel = "backward_resident" if plan.resident else "backward_streamed"
    y, tape = y.contiguous(), tape.contiguous()
    for end in range(scan.steps, 0, -scan.chunk_steps):
        begin = max(0, end - scan.chunk_steps)
        if given.lengths is not None and end < scan.steps:
            for each in (dv, du, previous):
                each.zero_()
        scan.launch(
            kernel,
            plan,
            meta,
            y if dy is None else dy,
            scan.w_hh,
            s0,
            ds,
            y,
            tape,
            du,
            dv,
            previous,
            *scan.run_time(begin, end),
        )
        found.add(begin, end, du, dv, previous)
    out = found.all()
    if need_s0:
        out += [ds[j].to(x.dtype) for j in range(len(given.s0))]
    return out


class _Gradients:
    """Gradients of the weights, the biases and x, summed up over the stretches of the sweep."""

    def __init__(
        self, scan: _Scan, need_x: bool, need_ih: bool, need_hh: bool, need_bias: bool
    ) -> None:
        self.scan = scan
        lanes, depth, x = scan.lanes, scan.gates * scan.hidden, scan.given.x
        biased = need_bias and bool(scan.given.b_ih)

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return x.new_zeros(shape, dtype=scan.compute) if wanted else None

        self.x = zeros(need_x, scan.rows, scan.inputs)
        self.w_ih = zeros(need_ih, lanes, depth, scan.inputs)
        self.w_hh = zeros(need_hh, lanes, depth, scan.hidden)
        self.b_ih = zeros(biased, lanes, depth)
        self.b_hh = zeros(biased, lanes, depth)

    def add(self, begin: int, end: int, du: Tensor, dv: Tensor, previous: Tensor) -> None:
        scan = self.scan
        for p, lanes in _runs(scan.backward_lanes):
            low, high = scan.stretch(begin, end, scan.backward_lanes[p])
            count = high - low
            u, v, h = (each[lanes, :count] for each in (du, dv, previous))
            if self.w_ih is not None:
                x = scan.x_rows((low, high))
                self.w_ih[lanes] += torch.bmm(u.transpose(1, 2), x.expand(u.size(0), *x.shape))
            if self.w_hh is not None:
                self.w_hh[lanes] += torch.bmm(v.transpose(1, 2), h)
            if self.b_ih is not None and self.b_hh is not None:
                self.b_ih[lanes] += u.sum(1, dtype=scan.compute)
                self.b_hh[lanes] += v.sum(1, dtype=scan.compute)
            if self.x is not None:
                for lane, gradient in enumerate(u, p):
                    self.x[low:high] += torch.mm(gradient, scan.w_ih[lane])

    def all(self) -> list[Tensor]:
        dtype, shape = self.scan.given.x.dtype, self.scan.given.x.shape
        out = [] if self.x is None else [self.x.view(shape).to(dtype)]
        for group in (self.w_ih, self.w_hh, self.b_ih, self.b_hh):
            out += [] if group is None else list(group.to(dtype).unbind(0))
        return out


def _runs(backward: Sequence[bool]) -> list[tuple[int, slice]]:
    """Scans side by side that run in the same direction: `(first, slice)` each."""
    edges = [p for p in range(len(backward)) if p == 0 or backward[p] != backward[p - 1]]
    ends = [*edges[1:], len(backward)]
    return [(p, slice(p, end)) for p, end in zip(edges, ends, strict=True)]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[P, ...], contiguous; without a copy for one scan."""
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0).contiguous()
    return torch.stack(list(tensors))


def precision(dtype: torch.dtype, nvidia: bool) -> str:
    """How float32 is multiplied: with TF32 where torch does that too; otherwise in full, which on
    NVIDIA's matrix units are three products of TF32 parts."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3" if dtype == torch.float32 and nvidia else "ieee"


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return context
