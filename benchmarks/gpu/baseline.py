"""The speed of torch.nn: which of cuDNN's kernels run, and the time of a step.

    python -m benchmarks.gpu.baseline FILE

The most important cases come first; FASTRNN_SECONDS limits the time of all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import results
from benchmarks.workloads import of_lengths
from fastrnn.tools.bench import measure, store
from fastrnn.tools.bench.implementation import Case, TorchLayer
from fastrnn.tools.bench.machine import Machine
from fastrnn.tools.bench.workload import Workload

STEPS = 512
SECONDS = 0.03  # of calls for each case
TARGETS = ((16, 256), (64, 512), (1, 256), (64, 1024), (128, 2048))
HIDDEN = (64, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048)
BATCHES = (16, 64, 1, 128, 8, 32, 256)
NUMBERS = ("bfloat16", "float32", "float16", "tf32")
NO_MACHINE = Machine(threads=1, gflops={}, bandwidth={}, cache_bytes={})

# Cell, B, H, precision, other arguments of the workload.
_Case = tuple[str, int, int, str, dict[str, Any]]


def cases() -> Iterator[_Case]:
    """Each case once, the most important first."""
    seen = []
    for case in _cases():
        if case not in seen:
            seen.append(case)
            yield case


def _cases() -> Iterator[_Case]:
    for number in NUMBERS:
        for batch, hidden in TARGETS:
            yield "lstm", batch, hidden, number, {}
    for number in NUMBERS[:2]:
        for cell in ("gru", "rnn"):
            for batch, hidden in TARGETS:
                yield cell, batch, hidden, number, {}
        for rest in ({"bidirectional": True}, {"layers": 2}, {"packed": True}):
            yield "lstm", 16, 256, number, rest
            yield "lstm", 64, 512, number, rest
    # These show at which sizes cuDNN changes from one kernel to another.
    for batch in BATCHES:
        for hidden in HIDDEN:
            for number in ("float16", "bfloat16", "float32"):
                yield "lstm", batch, hidden, number, {}
    for batch in BATCHES:
        for hidden in HIDDEN:
            for cell in ("gru", "rnn"):
                yield cell, batch, hidden, "float16", {}


def workload(batch: int, hidden: int, number: str, rest: dict[str, Any]) -> Workload:
    dtype = "float32" if number == "tf32" else number
    if rest.get("packed"):
        return of_lengths(STEPS, batch, hidden, dtype)
    return Workload("baseline", STEPS, batch, hidden, hidden, dtype=dtype, **rest)


def measured(
    cell: str, batch: int, hidden: int, number: str, rest: dict[str, Any]
) -> dict[str, Any]:
    """Microseconds per step, and the kernels, of inference and of training."""
    row: dict[str, Any] = {"cell": cell, "batch": batch, "hidden": hidden, "number": number, **rest}
    chosen = workload(batch, hidden, number, rest)
    for mode in ("inference", "training"):
        case = Case.build(chosen, cell, mode, 1, "cuda")
        prepared = TorchLayer("torch.nn", tf32=number == "tf32").prepare(case)
        times = measure.interleaved({"it": prepared}, SECONDS, measure.gpu_clock)["it"]
        with prepared.around():
            kernels = measure.kernels_of(prepared.call)
        row[mode] = {
            "us_per_step": round(times.median / STEPS, 4),
            "p20": round(times.p20 / STEPS, 4),
            "p80": round(times.p80 / STEPS, 4),
            "kernels": [name[:160] for name in kernels],
        }
    return row


def main() -> int:
    path = Path(sys.argv[1])
    end = time.monotonic() + float(os.environ.get("FASTRNN_SECONDS", "180")) - 15
    conditions = asdict(store.conditions(NO_MACHINE, "python -m benchmarks.gpu.baseline", "cuda"))
    rows: list[dict[str, Any]] = []
    failed = 0
    for case in cases():
        if time.monotonic() > end:
            break
        try:
            rows.append(measured(*case))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            rows.append({"case": case, "error": str(error).splitlines()[0][:300]})
            failed += 1
        print(rows[-1], flush=True)
        results.save(path, rows, conditions)
    print(f"{len(rows)} cases, {failed} failed")
    return int(failed == len(rows))


if __name__ == "__main__":
    sys.exit(main())
