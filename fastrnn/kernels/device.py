"""The facts about this machine that a plan needs, and the kernel that the user allows."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from fastrnn import hardware, plan
from fastrnn.extension import _C

if TYPE_CHECKING:
    from fastrnn.kernels.gpu import cuda

__all__ = ["asked_for", "current", "go_on_without_grids", "log", "use"]

_forced: list[str] = []
_logged: set[tuple[plan.Problem, plan.Device]] = set()


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Run every call inside the block with this kernel, as FASTRNN_KERNEL=name does.

    It affects the whole process, including other threads.

    Args:
        kernel: "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError: if there is no kernel of that name.
        plan.KernelRefused: from the first call inside the block that the kernel cannot run.
    """
    if kernel not in plan.KERNELS:
        raise ValueError(f"no kernel named {kernel!r}; there are: {', '.join(plan.KERNELS)}")
    _forced.append(kernel)
    _C.forget_plans()
    try:
        yield
    finally:
        _forced.pop()
        _C.forget_plans()


def asked_for() -> str | None:
    """The only kernel that the user allows, or None for all."""
    return _forced[-1] if _forced else os.environ.get("FASTRNN_KERNEL") or None


def current(
    kind: str = "cpu",
    threads: int | None = None,
    compiled: bool = True,
    index: int | None = None,
    *,
    contended: bool = False,
) -> plan.Device:
    """The facts about this machine for a call with `threads` CPU threads, by default torch's
    number, on the device `kind:index`, by default the current one. `compiled` tells whether the
    cell has code for CPUs, `contended` whether threads came late a short time ago."""
    # Imported with the first plan, because they take a third of the time of `import fastrnn`.
    from fastrnn.kernels.gpu import cuda, sweeps
    from fastrnn.kernels.gpu.triton import launch

    if threads is None:
        threads = torch.get_num_threads()
    return plan.Device(
        kind=kind,
        forced=asked_for(),
        tf32=sweeps.tf32_allowed(),
        cpu=plan.CpuFacts(
            threads=min(threads, hardware.cores()),
            contended=contended,
            vector_bytes=_C.vector_bytes(),
            l2_bytes=hardware.cache_bytes().get("L2", 1 << 20),
            compiled=compiled,
        ),
        cuda=_without_grids(kind, index, _cuda_facts(kind, index, cuda.library())),
        triton=_triton_facts(kind, index, launch.interpreted()),
    )


def log(problem: plan.Problem, device: plan.Device, chosen: plan.Plan) -> None:
    """Print a plan once, if FASTRNN_LOG=plan asks for it."""
    if "plan" in os.environ.get("FASTRNN_LOG", "") and (problem, device) not in _logged:
        _logged.add((problem, device))
        busy = f"\n      on {device.cpu} because threads came late" * device.cpu.contended
        print(f"fastrnn: {problem}{busy}\n      -> {chosen}", file=sys.stderr)


_refused: set[tuple[str, int | None]] = set()  # devices that refused a cooperative launch


def go_on_without_grids(device: torch.device) -> bool:
    """From now on no plan for this device has the residency "grid". Returns whether this is new."""
    name = device.type, device.index
    if name in _refused:
        return False
    _refused.add(name)
    _C.forget_plans()
    return True


def _without_grids(
    kind: str, index: int | None, facts: plan.CudaFacts | str
) -> plan.CudaFacts | str:
    if isinstance(facts, str) or (kind, index) not in _refused:
        return facts
    return replace(facts, cooperative=False)


@cache
def _triton_facts(kind: str, index: int | None, interpreted: bool) -> plan.TritonFacts | str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    nvidia = kind == "cuda" and torch.version.hip is None
    facts = plan.TritonFacts(nvidia=nvidia, interpreted=interpreted)
    if kind not in ("cuda", "xpu") or not getattr(torch, kind).is_available():
        return facts
    properties = getattr(torch, kind).get_device_properties(index)

    def first(names: tuple[str, ...], otherwise: int) -> int:
        return next(
            (int(getattr(properties, n)) for n in names if hasattr(properties, n)), otherwise
        )

    return replace(
        facts,
        shared_bytes=first(("shared_memory_per_block_optin", "local_mem_size"), facts.shared_bytes),
        warp=first(("warp_size",), facts.warp),
    )


# The simulator of the tests stands for an H100.
_SIMULATED = plan.CudaFacts(
    simulated=True,
    capability=90,
    multiprocessors=132,
    shared_bytes=227 << 10,
    clusters=((2, 66), (4, 32), (8, 15), (16, 6)),
)


@cache
def _cuda_facts(kind: str, index: int | None, library: cuda.Library | str) -> plan.CudaFacts | str:
    if isinstance(library, str):
        return library
    if library.simulated:
        facts = replace(_SIMULATED, cells=library.cells, tables=library.tables)
        return library.usable() or facts
    if kind != "cuda" or not torch.cuda.is_available():
        return plan.CudaFacts(library.cells, tables=library.tables)
    if torch.version.hip is not None:
        return "it runs on NVIDIA's GPUs, and torch is built for AMD's"
    with torch.cuda.device(index):
        if (reason := library.usable()) is not None:
            return reason
        properties: Any = torch.cuda.get_device_properties(index)
        shared = int(properties.shared_memory_per_block_optin)
        counts = [(n, library.resident_clusters(n, 256, shared)) for n in (2, 4, 8, 16)]
    return plan.CudaFacts(
        library.cells,
        capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=shared,
        tables=library.tables,
        clusters=tuple((blocks, count) for blocks, count in counts if count > 0),
    )
