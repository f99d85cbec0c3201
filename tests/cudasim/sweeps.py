"""Sweeps of the real kernels in the simulator, for a process of their own: maybe one with a
sanitizer, maybe with mistakes planted in the kernels.

`python -m tests.cudasim.sweeps CASE...`, FASTRNN_CUDA_LIBRARY being set, runs each case, marks in
stderr where it begins, and says there what was wrong.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NamedTuple

import torch

from fastrnn import cells, ops
from tests.test_cuda import NUMBERS, agrees, running
from tests.test_kernels import operands, run


class Case(NamedTuple):
    """Of which kernels what is run; `fault` is one of those planted, or 0."""

    fault: int
    cell: str
    regime: str
    blocks: int
    number: str
    hidden: int
    seed: int

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @staticmethod
    def parse(text: str) -> Case:
        fault, cell, regime, blocks, number, hidden, seed = text.split(":")
        return Case(int(fault), cell, regime, int(blocks), number, int(hidden), int(seed))


def wrong(case: Case) -> str | None:
    """Values and gradients of five steps, with resets, of a batch that fills no tile."""
    cell = cells.get(case.cell)
    torch.manual_seed(0)
    given = operands(cell, 5, 3, 3, case.hidden, 1, NUMBERS[case.number])
    given["resets"] = torch.rand(5, 3) < 0.1
    try:
        with running(case.regime, case.blocks, case.number):
            ours = run(ops.scan, cell, given)
        agrees(cell, given, case.number, ours)
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or ["a result is wrong"])[0]
    return None


def main() -> None:
    library = ctypes.CDLL(os.environ["FASTRNN_CUDA_LIBRARY"])
    for text in sys.argv[1:]:
        case = Case.parse(text)
        print(f"=== {case}", file=sys.stderr, flush=True)
        library.fastrnn_cudasim_seed(ctypes.c_uint64(case.seed))
        library.fastrnn_cudasim_plant(case.fault)
        said = wrong(case)
        if said is not None:
            print(f"WRONG: {said}", file=sys.stderr, flush=True)
    print("=== end", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
