"""Sweeps of the real kernels in the simulator, in a process of their own, optionally with a
sanitizer or with mistakes planted in the kernels.

`python -m tests.cudasim.sweeps CASE...` needs FASTRNN_CUDA_LIBRARY. It prints a line on stderr
before each case, and another if a result is wrong. It skips the other cases of a fault that was
found. `run_cases` starts such a process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fastrnn import cells, ops
from fastrnn.compiler.derive import derive
from tests.cudasim.build import sanitized
from tests.support.operands import operands, run
from tests.support.paths import ROOT
from tests.support.simulated import PRECISIONS, agrees, decided, ragged, running


class Case(NamedTuple):
    """One run of the kernels; `fault` is the number of a planted mistake, or 0."""

    fault: int
    cell: str
    residency: str
    blocks: int
    precision: str
    seed: int
    hidden: int = 40  # five octets: a group of three blocks shares them unevenly
    batch: int = 3
    recurrences: int = 1
    tile: int = 8
    chunk: int = 5  # steps
    layout: str = "dense"

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @staticmethod
    def parse(text: str) -> Case:
        return Case(*(int(part) if part.isdigit() else part for part in text.split(":")))  # type: ignore[arg-type]


def wrong(case: Case) -> str | None:
    """The error, or None, in values and gradients of five steps with resets, for a batch that fills
    no tile. With several chunks it also checks recomputed tapes."""
    cell = cells.get(case.cell)
    torch.manual_seed(0)
    given = operands(
        cell, 5, case.batch, 3, case.hidden, case.recurrences, PRECISIONS[case.precision]
    )
    if case.cell == "rnn_relu":
        decided(given)
    exact = ragged(given, case.layout)
    given["resets"] = exact["resets"] = torch.rand(given["x"].shape[:-1]) < 0.2
    rows = case.chunk * case.batch
    try:
        for again in (False, True) if case.chunk < 5 else (False,):
            with running(case.residency, case.blocks, case.precision, case.tile, rows):
                ours = run(partial(ops.scan, recompute=again), cell, given)
            agrees(cell, given, case.precision, ours, exact)
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or ["a result is wrong"])[0]
    return None


def run_cases(
    library: Path, sanitizer: str | None, cases: Sequence[Case], first_only: bool = True
) -> str:
    """Runs the cases in a process; returns its stderr. With `first_only`, a sanitizer stops it at
    the first complaint."""
    prefix, environment = sanitized(sanitizer)
    for name in environment.keys() & {"TSAN_OPTIONS", "ASAN_OPTIONS"} if first_only else ():
        environment[name] += ":halt_on_error=1"
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.cudasim.sweeps", *map(str, cases)],
        env={
            **os.environ,
            "FASTRNN_CUDA_LIBRARY": str(library),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 66), done.stderr[-3000:]
    return done.stderr


def tried(case: Case) -> bool:
    """Runs a case; returns whether it found an error."""
    library = ctypes.CDLL(os.environ["FASTRNN_CUDA_LIBRARY"])
    print(f"=== {case}", file=sys.stderr, flush=True)
    library.fastrnn_cudasim_seed(ctypes.c_uint64(case.seed))
    library.fastrnn_cudasim_plant(case.fault)
    problem = wrong(case)
    if problem is not None:
        print(f"WRONG: {problem}", file=sys.stderr, flush=True)
    return problem is not None


def main() -> None:
    found = set()
    given = [Case.parse(text) for text in sys.argv[1:]]
    for name in {case.cell for case in given}:
        # A second and more, which every child would spend again. A first run of the simulator must
        # not be here: after it the thread sanitizer sees races in children that have none.
        derive(cells.get(name))
    for case in given:
        if not case.fault:
            tried(case)
        elif case.fault not in found:
            # A fault may crash its process.
            child = os.fork()
            if child == 0:
                os._exit(int(tried(case)))
            if os.waitpid(child, 0)[1]:
                found.add(case.fault)
    print("=== end", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
