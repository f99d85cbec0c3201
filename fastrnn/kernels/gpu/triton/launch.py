"""The sweeps in Triton: compiles their kernels for a cell and launches them.

Triton is imported only when a kernel first runs. If the environment variable `TRITON_INTERPRET=1`
is set before that, the kernels run in Triton's interpreter on CPU tensors, slowly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrnn import cache
from fastrnn.kernels.gpu.sweeps import BackwardBuffers, ForwardBuffers, Scan, Tape
from fastrnn.kernels.gpu.triton import tune
from fastrnn.plan import TritonConfig, alternatives

if TYPE_CHECKING:
    from fastrnn.compiler.derive import Derived

__all__ = [
    "cell_module",
    "compile_options",
    "interpreted",
    "kernel",
    "meta_arguments",
    "sweeps",
]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cell_module(derived: Derived) -> ModuleType:
    """The module with the cell's functions. Triton reads their source from a file."""
    from fastrnn.compiler import emit_triton

    return _cell_module(emit_triton.module(derived), derived.name)


@functools.cache
def _cell_module(source: str, name: str) -> ModuleType:
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = cache.folder() / f"triton_{re.sub(r'[^0-9A-Za-z]', '_', name)}_{digest}.py"
    if not _is_there(path, source):
        cache.write(path, source)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    # An import could take compiled code from a folder beside the file, so this runs the text.
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _is_there(path: Path, source: str) -> bool:
    try:
        return cache.file_refusal(path) is None and path.read_text(encoding="utf-8") == source
    except FileNotFoundError:
        return False


def meta_arguments(
    derived: Derived,
    config: TritonConfig,
    hidden: int,
    *,
    backward: bool = False,
    bias: bool = False,
    tape: bool = False,
    dy: bool = True,
    dsteps: bool = False,
    packed: bool = False,
    ragged: bool = False,
    resets: bool = False,
    given: bool = False,
    ordered: bool = False,
    halved: bool = False,
    projected: int | None = None,
) -> dict[str, Any]:
    """The arguments of type `constexpr`, which a kernel is compiled for.

    `given` tells whether episodes begin in given states, `ordered` whether the numbers of sequences
    follow the thresholds in `noise`, and `halved` whether tensors have 16 bits. `projected` is the
    width of state 0, or None if it is not projected.
    """
    from fastrnn.compiler import layout

    cell = cell_module(derived)
    width = derived.tape_width(projected is not None, hidden, 2 if halved else 1)
    common = {
        "CELL": cell.backward if backward else cell.forward,
        "H": hidden,
        "GU": len(derived.inputs),
        "GV": len(derived.recurrent),
        "S": len(derived.states),
        "K": len(derived.saved),
        "L": len(derived.params),
        "D": len(derived.draws),
        "PER_SEQUENCE": sum((d.per == "sequence") << k for k, d in enumerate(derived.draws)),
        "SCALED": sum(d.scaled << k for k, d in enumerate(derived.draws)),
        "ORDERED": ordered,
        "SUMMED": sum(summed << g for g, summed in enumerate(derived.summed)),
        "TAPE_WIDTH": width,
        "PACKED": packed,
        "RAGGED": ragged,
        "RESETS": resets,
        "GIVEN": given,
        "PRECISION": config.precision,
        "DOT": config.matrix_units,
        "BB": config.batch_tile,
        "BN": config.unit_tile,
        "BK": config.depth_tile,
    }
    if config.resident or derived.programs:
        common["PROGRAM"] = layout.shape(derived, forward=not backward)
    if not config.resident:
        common |= {
            "Q": hidden if projected is None else projected,
            "PROJECTED": projected is not None,
        }
    if backward:
        return common | {"DY": dy, "DSTEPS": dsteps, "LIMIT": derived.limit or 0.0}
    return common | {"INPUT_OF": derived.input_of(), "BIAS": bias, "TAPE": tape}


def compile_options(config: TritonConfig) -> dict[str, Any]:
    """The options of Triton's compiler for a kernel."""
    options: dict[str, Any] = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    if config.registers:
        # Without a limit the compiler spills to make room for a second program on the
        # multiprocessor.
        options["maxnreg"] = config.registers
    return options


class _Sweeps:
    """`sweeps.Sweeps` in Triton."""

    takes_states = False

    def forward(self, scan: Scan, begin: int, end: int, buffers: ForwardBuffers) -> None:
        u, b_hh, carry, y, tape, begins, _ = buffers
        none = scan.w_hh  # a missing tensor may be any pointer; it is never dereferenced
        flags = {"bias": b_hh is not None, "tape": tape is not None}
        optional = [b_hh, scan.params, scan.operands.noise, begins]
        tensors = [none if each is None else each for each in optional]
        buffered = _two_buffers(scan, carry)
        tensors += [buffered, y, none if tape is None else tape]
        if _walks_over_stages(scan):
            tensors += [_scratch(scan, False), none if scan.w_hr is None else scan.w_hr]
        elif not scan.plan.triton.resident:
            size = scan.recurrences, scan.batch, scan.hidden
            tensors += [none] * 2 if scan.w_hr is None else [scan.w_hr, carry.new_empty(size)]
        run_time = _run_time(scan, begin, end)
        _launch(False, scan, flags, [buffered], u, scan.w_hh, *tensors, *run_time)
        _take_first(buffered, carry)

    def backward(
        self, scan: Scan, begin: int, end: int, buffers: BackwardBuffers, tape: Tape
    ) -> None:
        dy, dsteps, s0, ds, y, du, dv, h_prev, dh, dp, operands, begins, dbegins, *_ = buffers
        none = scan.w_hh
        optional = [scan.params, scan.operands.noise, begins, s0, dbegins]
        tensors = [none if each is None else each for each in optional]
        buffered = _two_buffers(scan, ds)
        tensors += [buffered, y, tape.values, du, dv, h_prev, none if dp is None else dp]
        if scan.plan.triton.resident or scan.derived.programs:
            tensors += [none if operands is None else operands]
        if _walks_over_stages(scan):
            tensors += [_scratch(scan, True)]
        if not scan.plan.triton.resident:
            tensors += [none if scan.w_hr is None else scan.w_hr, none if dh is None else dh]
        first = [none if each is None else each for each in (dy, dsteps)]
        flags = {"dy": dy is not None, "dsteps": dsteps is not None}
        run_time = _run_time(scan, begin, end)
        changed = [buffered, *([] if dbegins is None else [dbegins])]
        _launch(True, scan, flags, changed, *first, scan.w_hh, *tensors, *run_time)
        _take_first(buffered, ds)


sweeps = _Sweeps()


def _walks_over_stages(scan: Scan) -> bool:
    """Whether the kernels are those of `streamed_stages.py`."""
    return bool(scan.derived.programs) and not scan.plan.triton.resident


def _two_buffers(scan: Scan, states: Tensor) -> Tensor:
    """[2, S, P, B, W] whose first half is that of `states`, for kernels that need two buffers; for
    others `states` itself."""
    if not _walks_over_stages(scan):
        return states
    own = states[: scan.states]
    return torch.stack([own, own])


def _take_first(buffered: Tensor, states: Tensor) -> None:
    if buffered is not states:
        states[: buffered.size(1)] = buffered[0]


def _scratch(scan: Scan, backward: bool) -> Tensor:
    """Memory for what lies between the stages of a step and its end, of all rows."""
    from fastrnn.compiler import layout

    sizes = layout.shape(scan.derived, forward=not backward)
    count = sizes.temporaries + (sizes.sites if backward else scan.recurrent_gates)
    count += scan.w_hr is not None
    size = scan.recurrences, scan.batch, count, scan.hidden
    return torch.empty(size, dtype=scan.compute, device=scan.device)


def _meta(scan: Scan, config: TritonConfig, backward: bool, **flags: bool) -> dict[str, Any]:
    noise = scan.operands.noise
    return meta_arguments(
        scan.derived,
        config,
        scan.hidden,
        backward=backward,
        packed=scan.first is not None,
        ragged=scan.length is not None,
        resets=scan.resets is not None,
        given=scan.resets is not None and bool(scan.operands.reset_states),
        halved=scan.dtype.itemsize == 2,
        ordered=noise is not None and noise.numel() > 1 + len(scan.derived.draws),
        projected=None if scan.w_hr is None else scan.recurrent,
        **flags,
    )


def _run_time(scan: Scan, begin: int, end: int) -> tuple[Any, ...]:
    """The arguments of a launch from `first` on."""
    none = scan.w_hh
    return (
        none if scan.first_on_device is None else scan.first_on_device,
        none if scan.length is None else scan.length,
        none if scan.resets is None else scan.resets,
        scan.steps,
        scan.batch,
        begin,
        end,
        scan.row_range(begin, end, False)[0],
        scan.row_range(begin, end, True)[0],
        scan.chunk_rows,
        scan.reverse,
        *(() if scan.plan.triton.resident else (scan.hidden, scan.recurrent)),
    )


def kernel(config: TritonConfig, backward: bool, stages: bool = False) -> Any:
    """The kernel that a configuration asks for; `stages` tells whether the cell's step has any."""
    direction = "backward" if backward else "forward"
    walks = stages and not config.resident
    file = "streamed_stages" if walks else direction
    module = importlib.import_module(f"fastrnn.kernels.gpu.triton.{file}")
    way = "streamed_stages" if walks else "resident" if config.resident else "streamed"
    return getattr(module, f"{direction}_{way}")


def _launch(
    backward: bool, scan: Scan, flags: dict[str, bool], changed: Sequence[Tensor], *arguments: Any
) -> None:
    """Run a kernel; `changed` are those of the arguments that a launch reads and changes."""
    device = scan.operands.x.device

    def run(config: TritonConfig) -> None:
        grid = (-(-scan.batch // config.batch_tile), scan.recurrences)
        meta = _meta(scan, config, backward, **flags)
        options = compile_options(config)
        stages = bool(scan.derived.programs)
        kernel(config, backward, stages)[grid](*arguments, **meta, **options)

    with _on(device):
        chosen = scan.plan.triton
        if tune.wanted() and device.type != "cpu":
            chosen = _fastest(backward, scan, run, changed)
        run(chosen)


_tuner = tune.Tuner()


def _fastest(
    backward: bool, scan: Scan, run: Callable[[TritonConfig], None], changed: Sequence[Tensor]
) -> TritonConfig:
    """The configuration that runs such a launch fastest, as measured earlier or now."""
    triton, errors = (importlib.import_module(name) for name in ("triton", "triton.errors"))
    x, library = scan.operands.x, getattr(torch, scan.operands.x.device.type)
    before = [each.clone() for each in changed]

    def restore() -> None:
        for each, old in zip(changed, before, strict=True):
            each.copy_(old)

    def seconds(config: TritonConfig) -> float:
        times = []
        try:
            for _ in range(5):  # the first one includes compilation
                restore()
                start, end = (library.Event(enable_timing=True) for _ in range(2))
                start.record()
                run(config)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
        except errors.TritonError as error:
            raise RuntimeError(str(error)) from error
        finally:
            restore()
        return min(times)

    capturing = getattr(library, "is_current_stream_capturing", lambda: False)()
    key = (
        *(library.get_device_name(x.device), triton.__version__, scan.cell, backward, scan.hidden),
        *(scan.recurrent, str(x.dtype), scan.plan.triton.precision),
    )
    configs = alternatives(scan.plan.triton)
    return _tuner.best(key, configs, None if capturing else seconds)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current one, on which Triton launches kernels."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return context
