"""What a call of a layer costs on the host, part by part, beside torch.nn.

    python -m benchmarks.gpu.host [FILE.json | FILE.md]

The parts are those of calls that Python launches, as it does the first of a shape; C++ launches
those that follow. On a GPU each call begins when the GPU is idle, and is not waited for. Elsewhere
the tensors are on the CPU and a library takes the place of the CUDA kernels that does nothing, so
the parts of fastrnn are those of a GPU, without the microseconds that CUDA takes for each launch.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from benchmarks.gpu import results
from benchmarks.gpu.baseline import NO_MACHINE
from fastrnn import kernels
from fastrnn.extension import _C
from fastrnn.kernels.gpu import cuda, driver
from fastrnn.tools.bench import store

COMMAND = "python -m benchmarks.gpu.host"
STEPS, BATCH, HIDDEN = 4, 2, 16  # products of this size take a microsecond on a CPU
CALLS = 1000
PARTS = (("memory and products", driver, ("forward", "backward")),
         ("launch", cuda.Library, ("launch",)))  # fmt: skip

Call = Callable[[], object]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartile(numbers: list[float]) -> float:
    return round(sorted(numbers)[len(numbers) // 4], 1)


def whole(call: Call, calls: int) -> float:
    """Microseconds of a call: the lower quartile."""
    took = []
    for n in range(calls + calls // 10):
        wait()
        begin = time.perf_counter()
        call()
        if n >= calls // 10:
            took.append(1e6 * (time.perf_counter() - begin))
    return quartile(took)


@contextmanager
def timed(owner: Any, names: tuple[str, ...], took: list[float]) -> Iterator[None]:
    """Adds the microseconds of every call of these functions to `took`."""
    plain = {name: getattr(owner, name) for name in names}

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*given, **options)
            finally:
                took.append(1e6 * (time.perf_counter() - begin))

        return run

    for name, function in plain.items():
        setattr(owner, name, watched(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(owner, name, function)


def of_parts(call: Call, calls: int) -> dict[str, float]:
    """Microseconds of the parts of a call; each includes the parts that follow it in `PARTS`."""
    found = {}
    for name, owner, functions in PARTS:
        took: list[float] = []
        with timed(owner, functions, took):
            for _ in range(calls):
                wait()
                before = len(took)
                call()
                took[before:] = [sum(took[before:])]
        found[name] = quartile(took)
    return found


@contextmanager
def by_python() -> Iterator[None]:
    """C++ launches no call inside the block, so a layer on a GPU goes through Python. Tensors on a
    CPU would not: their fast calls look at the operands, as on a GPU, then refuse wrong lengths."""
    fast: Any = _C.layers

    def refused(*given: Any) -> None:
        assert fast(*given[:5], "no lengths", *given[6:]) is None

    _C.forget_plans()
    with patch.object(cuda, "hand_over", lambda *_: None), patch.object(_C, "layers", refused):
        yield
    _C.forget_plans()


class Given(NamedTuple):
    """What a layer is called with, and how the table names it."""

    name: str
    bidirectional: bool = False
    packed: bool = False
    states: bool = False


GIVEN = (
    Given("dense"),
    Given("dense, states", states=True),
    Given("dense, two directions", bidirectional=True),
    Given("packed", packed=True),
    Given("packed, two directions", bidirectional=True, packed=True),
)


def arguments(layer: torch.nn.RNNBase, given: Given, x: torch.Tensor) -> tuple[Any, ...]:
    """The arguments of a call of the layer, in which one sequence is a step shorter if packed."""
    size = 2 if given.bidirectional else 1, BATCH, HIDDEN
    state = torch.zeros(size, device=x.device)
    hx: Any = (state, state) if isinstance(layer, torch.nn.LSTM) else state
    if not given.packed:
        return (x, hx) if given.states else (x,)
    lengths = torch.tensor([STEPS] * (BATCH - 1) + [STEPS - 1])
    sizes = (lengths > torch.arange(STEPS).unsqueeze(1)).sum(1)
    return (PackedSequence(x.flatten(0, 1)[: int(lengths.sum())], sizes),)


def inference(layer: torch.nn.Module, *given: Any) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return layer(*given)

    return call


def both(layer: torch.nn.Module, *given: Any) -> Call:
    """Forward and backward, with the gradient of the input."""
    first, *others = given
    x = (first.data if isinstance(first, PackedSequence) else first).clone().requires_grad_()
    first = PackedSequence(x, first.batch_sizes) if isinstance(first, PackedSequence) else x
    wanted = [x, *layer.parameters()]
    dy = None

    def call() -> object:
        nonlocal dy
        y = layer(first, *others)[0]
        y = y.data if isinstance(y, PackedSequence) else y
        if dy is None:
            dy = torch.randn_like(y)
        return torch.autograd.grad(y, wanted, dy)

    return call


def rows(device: str, calls: int = CALLS) -> Iterator[dict[str, Any]]:
    for cell, given in itertools.product(("LSTM", "GRU", "RNN"), GIVEN):
        kind = getattr(torch.nn, cell)
        theirs = kind(HIDDEN, HIDDEN, bidirectional=given.bidirectional, device=device)
        ours = fastrnn.from_torch(theirs)
        x = torch.randn(STEPS, BATCH, HIDDEN, device=device)
        passed = arguments(theirs, given, x)
        for mode, make in (("inference", inference), ("forward and backward", both)):
            took = whole(make(ours, *passed), calls)
            with by_python():
                slower = whole(make(ours, *passed), calls)
                parts = of_parts(make(ours, *passed), calls)
            middle, launch = parts["memory and products"], parts["launch"]
            yield {
                "cell": cell,
                "call": given.name,
                "mode": mode,
                "us": took,
                "by Python": slower,
                "layer, operator, plan": round(slower - middle, 1),
                "memory and products": round(middle - launch, 1),
                "launch": launch,
                "torch.nn": whole(make(theirs, *passed), calls),
            }


@contextmanager
def stub() -> Iterator[None]:
    """Runs the calls inside the block with a library that does nothing."""
    from tests.support.stub import library

    name, before = "FASTRNN_CUDA_LIBRARY", os.environ.get("FASTRNN_CUDA_LIBRARY")
    os.environ[name] = str(library())
    try:
        with kernels.use("cuda"):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def table(made: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(made[0]) + " |", "|---" * len(made[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in made])


def page(made: list[dict[str, Any]], device: str) -> str:
    """The table with the conditions of the run."""
    return (
        "# What a call costs on the host\n\n"
        f"{store.made_by(COMMAND, 'one thread')} One layer, (T, B, I, H) = ({STEPS}, {BATCH}, "
        f"{HIDDEN}, {HIDDEN}), float32, on {device}; without a GPU the kernels do nothing. "
        f"Microseconds: lower quartiles of {CALLS} calls. *us* is a call that C++ launches, *by "
        "Python* one that Python launches, and the columns after it are the parts of that. "
        "*torch.nn* computes its products.\n\n" + table(made) + "\n"
    )


def save(path: Path, made: list[dict[str, Any]], device: str) -> None:
    """As a page, or as rows with all conditions."""
    if path.suffix == ".md":
        path.write_text(page(made, device), encoding="utf-8")
        return
    conditions = asdict(store.conditions(NO_MACHINE, COMMAND, device))
    results.save(path, made, conditions)


def main() -> int:
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    with nullcontext() if on_gpu else stub():
        made = list(rows(device))
    print(f"microseconds on the host, T {STEPS}, B {BATCH}, H {HIDDEN}, float32, on {device}")
    print(table(made))
    if len(sys.argv) > 1:
        save(Path(sys.argv[1]), made, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
