"""Times of fastrnn's CUDA kernels on this GPU, beside torch.nn's layers and the plan's estimates.

    python -m benchmarks.gpu.times FILE

The most important cases come first; FASTRNN_SECONDS limits the time of all. Without a GPU it runs a
library that does nothing, to try the program itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastrnn
from benchmarks.gpu import host, results
from benchmarks.gpu.baseline import NO_MACHINE, TARGETS
from fastrnn import _C, kernels, plan
from fastrnn.kernels import device as machine
from fastrnn.plan import cuda as planner
from fastrnn.tools.bench import store

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
STEPS = 512 if GPU else 4
SIZES = TARGETS if GPU else ((3, 24),)
NUMBERS = {
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
}
CANDIDATES = 8  # plans of a size
REPEATS = 6

Row = dict[str, Any]


@contextmanager
def tf32(allow: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    with ExitStack() as stack:
        stack.callback(setattr, matmul, "allow_tf32", matmul.allow_tf32)
        matmul.allow_tf32 = allow
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=allow))
        yield


def queued(call: host.Call) -> float:
    """Microseconds of a call among others that are queued behind each other."""
    call()
    host.wait()
    begin = time.perf_counter()
    for _ in range(REPEATS):
        call()
    host.wait()
    return 1e6 * (time.perf_counter() - begin) / REPEATS


def replayed(call: host.Call) -> float | None:
    """Microseconds of a replay of a CUDA graph; None without a GPU."""
    if not GPU:
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()  # they must live as long as the graph
    took = queued(graph.replay)
    del outputs
    return took


def of_kernels(call: host.Call, *names: str) -> float:
    """Microseconds of the kernels that have one of these words in their names, in a call."""
    call()
    if not GPU:
        return 0.0
    from torch.profiler import ProfilerActivity, profile

    host.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            call()
        host.wait()
    events = [e for e in profiled.events() or () if e.device_type.name == "CUDA"]
    took = [e.time_range.elapsed_us() for e in events if any(name in e.name for name in names)]
    return float(sum(took)) / 3


def tensors(batch: int, hidden: int, dtype: torch.dtype, steps: int = STEPS) -> list[torch.Tensor]:
    """An input, and a gradient of the output."""
    return [torch.randn(steps, batch, hidden, device=DEVICE, dtype=dtype) for _ in range(2)]


def both(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> host.Call:
    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x)[0], wanted, dy)


def layers() -> Iterator[Callable[[], Row]]:
    """Whole layers, in microseconds a step."""

    def measured(cell: str, number: str, batch: int, hidden: int) -> Row:
        dtype, allow = NUMBERS[number]
        torch.manual_seed(0)
        theirs = getattr(nn, cell)(hidden, hidden, device=DEVICE, dtype=dtype)
        ours, (x, dy) = fastrnn.from_torch(theirs), tensors(batch, hidden, dtype)
        row: Row = {"part": "layer", "cell": cell, "number": number, "B": batch, "H": hidden}
        with tf32(allow):
            outputs = [layer(x)[0].detach().double() for layer in (ours, theirs)]
            row["differ"] = float((outputs[0] - outputs[1]).abs().max())
            for who, layer in (("ours", ours), ("torch.nn", theirs)):
                inference = host.inference(layer, x)
                row[f"{who} forward"] = round(queued(inference) / STEPS, 3)
                row[f"{who} both"] = round(queued(both(layer, x, dy)) / STEPS, 3)
                graph = replayed(inference)
                row[f"{who} graph"] = graph and round(graph / STEPS, 3)
        return row

    for number in NUMBERS:
        for batch, hidden in SIZES:
            for cell in ("LSTM", "GRU") if number == "bfloat16" else ("LSTM",):
                yield lambda c=cell, n=number, b=batch, h=hidden: measured(c, n, b, h)  # type: ignore[misc]


def candidates(problem: plan.Problem, device: plan.Device) -> list[plan.CudaConfig]:
    """The plans that are worth a look, the planner's own first."""
    gpu = device.cuda
    assert isinstance(gpu, plan.CudaFacts), gpu
    own = planner.configure(problem, device).cuda
    every = sorted(
        planner.configurations(problem, gpu, device.tf32),
        key=lambda config: planner.cycles(problem, gpu, config),
    )
    grids = [config for config in every if config.residency == "grid"][:4]
    chosen = [c for c in every if c != own and (c.residency != "grid" or c in grids)]
    return [own, *chosen[: CANDIDATES - 1]]


@contextmanager
def running(config: plan.CudaConfig, backward: bool) -> Iterator[None]:
    """Runs this configuration in every pass of that direction."""
    choose = plan.choose

    def forced(problem: plan.Problem, device: plan.Device) -> plan.Plan:
        made = choose(problem, device)
        return replace(made, config=config) if problem.backward == backward else made

    plan.choose = forced
    try:
        with kernels.use("cuda"):
            yield
    finally:
        plan.choose = choose
        _C.forget_plans()


def alone() -> Iterator[Callable[[], Row]]:
    """The recurrence alone, in microseconds a step, under several plans."""

    def measured(
        config: plan.CudaConfig, problem: plan.Problem, device: plan.Device, number: str
    ) -> Row:
        dtype, allow = NUMBERS[number]
        backward, batch, hidden = problem.backward, problem.batch, problem.hidden
        way = "backward" if backward else "forward"
        layer = fastrnn.LSTM(hidden, hidden, device=DEVICE, dtype=dtype)
        x, dy = tensors(batch, hidden, dtype)
        call = both(layer, x, dy) if backward else host.inference(layer, x)
        with tf32(allow), running(config, backward):
            took = of_kernels(call, f"persistent_{way}", f"{way}_step") / STEPS
        assert isinstance(device.cuda, plan.CudaFacts)
        estimate = planner.cycles(problem, device.cuda, config) / 1800
        about: Row = {"part": "kernel", "way": way, "number": number, "B": batch, "H": hidden}
        shape = {"residency": config.residency, "blocks": config.blocks, "tile": config.batch_tile}
        return about | shape | {"us": round(took, 3), "plan": round(estimate, 3)}

    for number in ("bfloat16", "tf32"):
        dtype, allow = NUMBERS[number]
        for batch, hidden in SIZES:
            for backward in (False, True):
                problem = plan.Problem(
                    *("lstm", STEPS, batch, hidden, hidden, 4, 2),
                    dtype=str(dtype).removeprefix("torch."),
                    tape=True,
                    backward=backward,
                )
                device = replace(machine.current(DEVICE), forced="cuda", tf32=allow)
                for config in candidates(problem, device):
                    yield lambda c=config, p=problem, d=device, n=number: measured(c, p, d, n)  # type: ignore[misc]


def short() -> Iterator[Callable[[], Row]]:
    """Calls of few steps, in microseconds a call."""

    def measured(steps: int, batch: int, hidden: int) -> Row:
        theirs = nn.LSTM(hidden, hidden, device=DEVICE, dtype=torch.bfloat16)
        x, _ = tensors(batch, hidden, torch.bfloat16, steps)
        row: Row = {"part": "short", "T": steps, "B": batch, "H": hidden}
        for who, layer in (("ours", fastrnn.from_torch(theirs)), ("torch.nn", theirs)):
            row[who] = round(queued(host.inference(layer, x)), 1)
            graph = replayed(host.inference(layer, x))
            row[f"{who} graph"] = graph and round(graph, 1)
        return row

    for steps, batch, hidden in ((1, 1, 256), (16, 16, 256), (100, 1, 128), (100, 32, 512)):
        if GPU or hidden < 256:
            yield lambda t=steps, b=batch, h=hidden: measured(t, b, h)  # type: ignore[misc]


def table(rows: list[Row]) -> str:
    """The rows of each part with the same columns below each other."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row), []).append(row)
    return "\n\n".join(host.table(part) for part in parts.values())


def main() -> int:
    path = Path(sys.argv[1])
    end = time.monotonic() + float(os.environ.get("FASTRNN_SECONDS", "180")) - 10
    conditions = asdict(store.conditions(NO_MACHINE, "python -m benchmarks.gpu.times", DEVICE))
    rows: list[Row] = []
    failed = 0
    with nullcontext() if GPU else host.stub():
        for part in (layers, alone, short):
            for measure in part():
                if time.monotonic() > end:
                    break
                try:
                    rows.append(measure())
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    rows.append({"part": part.__name__, "error": str(error).splitlines()[0][:200]})
                    failed += 1
                print(rows[-1], flush=True)
                results.save(path, rows, conditions)
                host.wait()  # a device that is lost ends the program here
    print(table(rows))
    print(f"{len(rows)} rows, {failed} failed")
    return int(failed == len(rows))


if __name__ == "__main__":
    sys.exit(main())
