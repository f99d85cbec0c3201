"""`python -m fastrnn info` and `plan`: this machine, this build, and which kernel runs where."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import cache, cells, hardware, plan
from fastrnn._version import __version__
from fastrnn.compiler import jit
from fastrnn.compiler.derive import Underivable, derive
from fastrnn.compiler.layout import values
from fastrnn.extension import _C, bindings
from fastrnn.kernels import device as machine
from fastrnn.kernels.prepare import prepare
from fastrnn.nn.layers import LSTM
from fastrnn.plan import CpuFacts, CudaFacts, Device, Plan, Problem, TritonFacts
from fastrnn.tools import tolerance

__all__ = [
    "Facts",
    "SelfCheck",
    "collect",
    "plan_for",
    "plan_text",
    "self_check",
    "support_markdown",
    "text",
]


@dataclass(frozen=True)
class SelfCheck:
    """A bidirectional LSTM, forward and backward, compared with `torch.nn.LSTM`.

    Attributes:
        passed: whether every output and gradient keeps the tolerance for float32 gradients.
        error: largest distance of our results from float64.
        torch_error: largest distance of torch's results from float64.
        milliseconds, torch_milliseconds: best time of several runs, forward and backward.
    """

    passed: bool
    error: float
    torch_error: float
    milliseconds: float
    torch_milliseconds: float


@dataclass(frozen=True)
class Facts:
    """This installation on this machine. `kernels` maps each kernel to the reason why it cannot run
    here, or None."""

    versions: dict[str, str]
    system: str
    processor: str
    threads: int
    caches: dict[str, str]
    instruction_sets: list[str]
    instruction_set: str
    formats: list[str]
    binding: str
    bindings: list[str]
    gpus: list[str]
    compiler: str
    compiled_cells: str
    kernels: dict[str, str | None]
    self_check: SelfCheck


def collect() -> Facts:
    """Inspect this machine and run the self-check, which takes about a second."""
    return Facts(
        versions={
            "fastrnn": __version__,
            "torch": torch.__version__,
            "built with torch": _C.built_for,
            "Python": platform.python_version(),
        },
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=hardware.processor(),
        threads=torch.get_num_threads(),
        caches=_caches(),
        instruction_sets=_C.isas(),
        instruction_set=_C.isa(),
        formats=_C.formats(),
        binding=".".join(_C.built_for.split(".")[:2]),
        bindings=[*bindings()],
        gpus=[torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        compiler=_compiler(),
        compiled_cells=_cache_folder(),
        kernels=_usable_kernels(),
        self_check=self_check(),
    )


def _compiler() -> str:
    try:
        compiler = jit.compiler()
    except jit.CompilationFailed as error:
        return f"none: {error}"
    return f"{' '.join(compiler.command)}: {compiler.version.splitlines()[0]}"


def _cache_folder() -> str:
    try:
        return str(cache.folder())
    except OSError as error:
        return f"no folder: {error}"


def _usable_kernels() -> dict[str, str | None]:
    """For every kernel: None if it runs a plain LSTM on a device of this machine, else a reason:
    that for GPUs, if there are any."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    usable: dict[str, str | None] = {}
    for name in plan.KERNELS:
        reasons = [plan.refusal(name, _TYPICAL, machine.current(kind)) for kind in kinds]
        usable[name] = None if None in reasons else reasons[-1]
    return usable


def text(facts: Facts) -> str:
    """The facts as text."""
    check = facts.self_check
    verdict = "passed" if check.passed else "FAILED: please report this with all of the above"
    rows = [
        *facts.versions.items(),
        ("system", facts.system),
        ("processor", facts.processor),
        ("threads", str(facts.threads)),
        ("caches", ", ".join(f"{name} {size}" for name, size in facts.caches.items())),
        ("instruction sets", f"{facts.instruction_set} in use, of {_join(facts.instruction_sets)}"),
        ("formats of products", _join(facts.formats)),
        ("bindings to torch", f"{facts.binding} in use, of {_join(facts.bindings)}"),
        ("GPUs", _join(facts.gpus)),
        ("compiler for custom cells", facts.compiler),
        ("compiled cells are kept in", facts.compiled_cells),
        *(
            (f"kernel {name}", "usable" if reason is None else f"not usable: {reason}")
            for name, reason in facts.kernels.items()
        ),
        (
            "self-check",
            f"{verdict}; LSTM forward and backward {check.milliseconds:.2f} ms, "
            f"torch.nn {check.torch_milliseconds:.2f} ms; off from float64 by at most "
            f"{check.error:.1e}, torch.nn {check.torch_error:.1e}",
        ),
    ]
    return _columns(rows)


def support_markdown() -> str:
    """A Markdown table of what each kernel supports, the same on every machine.

    Each kernel is asked for its own kind of device, unless the row is about devices.
    """
    names = list(plan.KERNELS)
    lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---|" + "---|" * len(names)]
    for label, problem, device in _SUPPORT:
        devices = [
            replace(_ANY_GPU, cpu=device.cpu)
            if name in ("cuda", "triton") and device.kind == "cpu" and "CPU" not in label
            else device
            for name in names
        ]
        reasons = [plan.refusal(n, problem, d) for n, d in zip(names, devices, strict=True)]
        lines.append(f"| {label} | {' | '.join('✓' if r is None else r for r in reasons)} |")
    return "\n".join(lines)


_TYPICAL = Problem("lstm", 100, 32, 64, 256, gates=4, states=2, tape=True)
_ANY_CPU = Device(cpu=CpuFacts(threads=2, vector_bytes=32))
_NO_COMPILER = replace(_ANY_CPU, cpu=CpuFacts(compiled=False))
_ANY_GPU = Device(
    kind="cuda",
    cuda=CudaFacts(
        cells=("rnn_tanh", "rnn_relu", "lstm", "gru"),
        capability=80,
        multiprocessors=108,
        shared_bytes=99 << 10,
    ),
    triton=TritonFacts(shared_bytes=99 << 10),
)
_SUPPORT: tuple[tuple[str, Problem, Device], ...] = (
    ("float32", _TYPICAL, _ANY_CPU),
    ("float64", replace(_TYPICAL, dtype="float64"), _ANY_CPU),
    ("bfloat16", replace(_TYPICAL, dtype="bfloat16"), _ANY_CPU),
    ("float16, computed in float32", replace(_TYPICAL, dtype="float16"), _ANY_CPU),
    ("back-propagation through time", replace(_TYPICAL, backward=True), _ANY_CPU),
    ("both directions at once", replace(_TYPICAL, recurrences=2), _ANY_CPU),
    ("packed sequences, `lengths=`", replace(_TYPICAL, rows=2000), _ANY_CPU),
    ("projected output (`proj_size`)", replace(_TYPICAL, projected=True), _ANY_CPU),
    ("custom cell", replace(_TYPICAL, cell="yours"), _ANY_CPU),
    (
        "custom cell, no compiler",
        replace(_TYPICAL, cell="yours"),
        _NO_COMPILER,
    ),
    ("tensors on a CPU", _TYPICAL, replace(_ANY_GPU, kind="cpu")),
    ("tensors on a GPU", _TYPICAL, _ANY_GPU),
    ("tensors on a GPU, no Triton", _TYPICAL, replace(_ANY_CPU, kind="cuda")),
)


def plan_for(
    cell: str,
    shape: tuple[int, int, int, int],
    *,
    dtype: str = "float32",
    directions: int = 1,
    tape: bool = False,
    backward: bool = False,
    kind: str = "cpu",
) -> tuple[Problem, Device, Plan]:
    """The plan of one layer with `shape` (T, B, I, H) on this machine.

    Raises:
        ValueError: if the cell is unknown.
        plan.KernelRefused: if FASTRNN_KERNEL asks for a kernel that cannot run it.
    """
    declared = cells.get(cell)
    if tape or backward:
        declared = declared.noisy
    known = prepare(declared, kind, getattr(torch, dtype)) is not None
    problem = Problem(
        cell,
        *shape,
        gates=len(declared.gates),
        input_gates=len(declared.inputs),
        recurrent_gates=len(declared.recurrent),
        states=len(declared.states),
        recurrences=directions,
        dtype=dtype,
        tape=tape,
        backward=backward,
        format=_format_of(dtype) if kind == "cpu" else "",
        **_derived(declared, backward),
    )
    device = machine.current(kind, compiled=known)
    if not known:
        device = replace(device, triton=f"cell {cell!r} has no kernel in Triton")
    return problem, device, plan.choose(problem, device)


def _derived(cell: cells.Cell, backward: bool) -> dict[str, Any]:
    """What a plan depends on that the cell's function says."""
    try:
        derived = derive(cell)
    except Underivable:
        return {}
    return {
        "projectable": derived.projectable,
        "stages": derived.stages,
        "all_summed": derived.all_summed,
        "draws": len(derived.draws),
        "values": values(derived, forward=not backward),
    }


def _format_of(dtype: str) -> str:
    return _C.format_of(torch.empty(0, dtype=getattr(torch, dtype), device="cpu"))


def plan_text(problem: Problem, device: Device, chosen: Plan) -> str:
    """A plan as text."""
    rows = [
        ("problem", _fields(asdict(problem))),
        *_device_rows(device),
        ("kernel", chosen.kernel),
        *((f"not {name}", reason) for name, reason in chosen.refused),
    ]
    if chosen.kernel in _CONFIGURATIONS:
        rows += _CONFIGURATIONS[chosen.kernel](chosen)
        rows.append(("chunk", f"{chosen.chunk_rows} of {problem.live_rows} rows"))
    return _columns(rows)


_WEIGHTS = {
    "unpacked": "read in torch's layout",
    "panels": "packed panel by panel at each step",
    "prepacked": "packed before the first step",
}


def _cpu_rows(chosen: Plan) -> list[tuple[str, str]]:
    config = chosen.cpu
    return [
        (
            "threads",
            f"{config.threads} = {config.split_recurrences} over directions x "
            f"{config.split_sequences} over the batch x {config.split_units} over hidden units",
        ),
        ("weights", _WEIGHTS[config.weights]),
    ]


def _cuda_rows(chosen: Plan) -> list[tuple[str, str]]:
    config = chosen.cuda
    where = {
        "step": "read from the cache at every step",
        "block": "resident in one block",
        "cluster": f"resident in clusters of {config.blocks} blocks",
        "grid": f"resident in groups of {config.blocks} blocks of the grid",
    }
    return [
        ("weights", where[config.residency]),
        ("numbers", f"multiplied as {config.precision}"),
        ("blocks", f"{config.batch_tile} rows of the batch each, {config.warps} warps"),
    ]


def _triton_rows(chosen: Plan) -> list[tuple[str, str]]:
    config = chosen.triton
    tiles = f"tiles of {config.unit_tile} x {config.depth_tile}, {config.stages} loads in flight"
    return [
        ("weights", "resident in every program" if config.resident else f"streamed in {tiles}"),
        ("programs", f"{config.batch_tile} rows of the batch each, {config.warps} warps"),
    ]


_CONFIGURATIONS = {"cpu": _cpu_rows, "cuda": _cuda_rows, "triton": _triton_rows}


def _device_rows(device: Device) -> list[tuple[str, str]]:
    parts = asdict(device)
    by_kernel = {kernel: parts.pop(kernel) for kernel in ("cpu", "cuda", "triton")}
    return [
        ("device", _fields(parts)),
        *(
            (f"device for {kernel}", part if isinstance(part, str) else _fields(part))
            for kernel, part in by_kernel.items()
        ),
    ]


def _fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _caches() -> dict[str, str]:
    """The caches of the first core, with Linux's names and sizes: {"L1d": "48K", ...}."""
    return {
        f"L{cache.level}{'d' * cache.data_only}": f"{cache.size >> 10}K"
        for cache in hardware.caches()
    }


def self_check() -> SelfCheck:
    """Compare our LSTM with torch's. The random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = nn.LSTM(24, 40, bidirectional=True, device="cpu")
        ours = LSTM(24, 40, bidirectional=True, device="cpu")
        x = torch.randn(50, 6, 24, device="cpu")
    ours.load_state_dict(theirs.state_dict())
    exact = _outputs_and_gradients(copy.deepcopy(theirs).double(), x.double())
    errors, milliseconds = [], []
    for layer in (ours, theirs):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            results = _outputs_and_gradients(layer, x)
            seconds.append(time.perf_counter() - start)
        milliseconds.append(1e3 * min(seconds))
        errors.append(
            torch.stack([(a - b).abs().max() for a, b in zip(results, exact, strict=True)])
        )
    return SelfCheck(
        passed=all(
            error <= tolerance.limit(of_torch, "float32", gradients=True)
            for error, of_torch in zip(errors[0].tolist(), errors[1].tolist(), strict=True)
        ),
        error=errors[0].max().item(),
        torch_error=errors[1].max().item(),
        milliseconds=milliseconds[0],
        torch_milliseconds=milliseconds[1],
    )


def _outputs_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, states = layer(x)
    wanted = [x, *layer.parameters()]
    return [y, *states, *torch.autograd.grad(y.square().mean() * 1e2, wanted)]
