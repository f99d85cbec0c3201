"""Rows, machines and workloads for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fastrnn.tools.bench import comparison, store
from fastrnn.tools.bench.comparison import Entry, Row
from fastrnn.tools.bench.implementation import Case, Implementation
from fastrnn.tools.bench.machine import Machine
from fastrnn.tools.bench.workload import Workload

MACHINE = Machine(
    threads=2,
    gflops={"torch.mm": 50.0, "oneDNN": 100.0},
    bandwidth={"L1": 400.0, "L2": 200.0, "memory": 20.0},
    cache_bytes={"L1": 1 << 15, "L2": 1 << 20},
)


SMALL = Workload("small", 5, 2, 3, 8, baselines=("torch.nn",))


def here() -> Machine:
    """`MACHINE` with the threads of the tests, so that no thread is started."""
    return replace(MACHINE, threads=torch.get_num_threads())


def run(
    workload: Workload, mode: str, baselines: Sequence[Implementation], cell: str = "lstm"
) -> Row:
    return comparison.run(workload, cell, mode, here(), seconds=1e-4, baselines=baselines)[0]


def entry(name: str, kind: str, median: float) -> Entry:
    return Entry(name, kind, median, median / 2, median * 2, blocks=9, calls=3, error=1e-7)


def row(*entries: Entry, **changes: object) -> Row:
    values: dict[str, object] = {
        "workload": "w",
        "group": "layers",
        "about": "",
        "cell": "lstm",
        "mode": "inference",
        "threads": 2,
        "device": "cpu",
        "dtype": "float32",
        "steps": 10,
        "batch": 1,
        "inputs": 8,
        "hidden": 8,
        "layers": 1,
        "bidirectional": False,
        "rows": 10,
        "flops": 10**6,
        "roofline": 10.0,
        "roofline_by": "sgemm peak",
        "entries": entries,
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


ROW = row(
    entry("fastrnn", "ours", 100.0),
    entry("fastrnn, 1 thread", "variant", 60.0),
    entry("torch.nn", "baseline", 300.0),
    entry("JAX", "baseline", 200.0),
)


class Scaled(nn.Module):
    """A layer whose output is wrong by a factor."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, *args: object) -> object:
        output, states = self.layer(*args)
        return output * self.factor, states


SHAPES = {
    "one layer": Workload("w", 6, 3, 5, 8),
    "stack": Workload("w", 6, 3, 5, 8, layers=2, bidirectional=True),
    "packed": Workload("w", 6, 3, 5, 8, layers=2, bidirectional=True, lengths=(6, 4, 1)),
}


def agrees(baseline: Implementation, work: Workload, cell: str, mode: str) -> None:
    """The comparison accepts the baseline, and checked all that it returns."""
    case = Case.build(work, cell, mode, torch.get_num_threads())
    assert baseline.supports(case) is None
    prepared = baseline.prepare(case)
    error, _ = comparison.Gate(case).check(baseline.name, prepared)
    assert error < 1e-5
    with prepared.around():
        results = prepared.read(prepared.call())
    wanted = {"output"} if mode == "step" else {"output", "h_n"}
    wanted |= {"c_n"} if cell == "lstm" and mode != "step" else set()
    if mode == "training":
        parameters = [name for name, _ in case.module.named_parameters()]
        wanted |= {f"gradient of {name}" for name in ("x", *parameters)}
    assert set(results) == wanted


STREAMED = Workload("w", 1, 2, 5, 8, modes=("step",))


def results_of(*rows: Row) -> store.Results[Row]:
    return store.Results((store.conditions(MACHINE, "the command"),), tuple((r, 0) for r in rows))
