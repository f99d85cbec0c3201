"""The real CUDA kernels under the sanitizers, and mistakes planted in them, which must be found.

One cell stands for all: what is at stake is who waits for whom.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from fastrnn import cells, codegen
from tests.cudasim.build import Fault, build, missing, sanitized
from tests.cudasim.sweeps import Case

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

TILE, STEP = "cuda_tile.cuh", "cuda_step.cuh"
SEEDS = range(1, 7)
BLOCKS = {"step": 1, "block": 1, "cluster": 3, "grid": 3}


class Planted(NamedTuple):
    name: str
    regime: str
    fault: Fault
    race: bool = False  # to be found by the thread sanitizer as well; a few stand for all


FAULTS = [
    Planted(
        "a block's steps without a barrier",
        "block",
        Fault(TILE, "if (i > 0) __syncthreads();", "if (i > 0 && !PLANTED) __syncthreads();"),
    ),
    Planted(
        "slices added before they are there",
        "block",
        Fault(
            TILE,
            "dev::named_barrier(1 + group, at.slices * kWarp);\n  if (slice > 0) return;",
            "if (!PLANTED) dev::named_barrier(1 + group, at.slices * kWarp);\n"
            "  if (slice > 0) return;",
        ),
        race=True,
    ),
    Planted(
        "a number of the wrong column",
        "block",
        Fault(TILE, "sum[m][j][0] += x.x,", "sum[m][j][0] += PLANTED ? x.y : x.x,"),
    ),
    Planted(
        "a wait for the wrong phase",
        "cluster",
        Fault(TILE, "(i - 1) >> 1 & 1", "((i - 1) >> 1 & 1) ^ PLANTED"),
    ),
    Planted(
        "no wait for the peers",
        "cluster",
        Fault(
            TILE,
            "if (i > 0 && computes) dev::barrier_wait(",
            "if (i > 0 && computes && !PLANTED) dev::barrier_wait(",
        ),
    ),
    Planted(
        "a phase that expects too little",
        "cluster",
        Fault(
            TILE,
            "if (operands > 1) dev::barrier_expect(&barriers[1], columns * at.exchanged);",
            "if (operands > 1)"
            " dev::barrier_expect(&barriers[1], columns * at.exchanged - (PLANTED ? 16 : 0));",
        ),
    ),
    Planted(
        "later phases that expect nothing",
        "cluster",
        Fault(TILE, "&& i + 2 < operands)", "&& i + 2 < operands && !PLANTED)"),
    ),
    Planted(
        "one buffer for all steps",
        "cluster",
        Fault(
            TILE,
            "const char* here = tiles + place * at.tile +",
            "const char* here = tiles + (PLANTED ? 0 : place) * at.tile +",
        ),
        race=True,
    ),
    Planted(
        "peers that are not ready",
        "cluster",
        Fault(
            TILE,
            "dev::cluster_sync();\n    else",
            "PLANTED ? void() : dev::cluster_sync();\n    else",
        ),
    ),
    Planted(
        "pieces read before other lanes wrote them",
        "cluster",
        Fault(
            TILE,
            "__syncwarp();\n#pragma unroll\n    for (int first",
            "if (!PLANTED) __syncwarp();\n#pragma unroll\n    for (int first",
        ),
        race=True,
    ),
    Planted(
        "a flag of the step before",
        "grid",
        Fault(TILE, "static_cast<uint32_t>(i)) {", "static_cast<uint32_t>(i - PLANTED)) {"),
    ),
    Planted(
        "a flag that does not speak for all warps",
        "grid",
        Fault(
            TILE,
            "__syncthreads();\n    if (threadIdx.x == 0) dev::store_release(",
            "if (!PLANTED) __syncthreads();\n    if (threadIdx.x == 0) dev::store_release(",
        ),
        race=True,
    ),
    Planted(
        "the other area",
        "grid",
        Fault(TILE, "from = area + (i & 1) *", "from = area + ((i & 1) ^ PLANTED) *"),
    ),
    Planted(
        "copies nobody waited for",
        "grid",
        Fault(TILE, "dev::copy_async_wait<0>();", "if (!PLANTED) dev::copy_async_wait<0>();"),
    ),
    Planted(
        "stages nobody waited for",
        "step",
        Fault(
            STEP,
            "dev::copy_async_wait<Shape::kStages - 2>();",
            "if (!PLANTED) dev::copy_async_wait<Shape::kStages - 2>();",
        ),
    ),
    Planted(
        "sums written over a stage in use",
        "step",
        Fault(
            STEP,
            "__syncthreads();  // the stages make room for sums",
            "if (!PLANTED) __syncthreads();",
        ),
        race=True,
    ),
]


@functools.cache
def library(sanitizer: str | None) -> Path:
    made = cells.get("rnn_relu")
    header = codegen.header([codegen.derive(made)], [codegen.key(made)])
    return build(None, sanitizer, [planted.fault for planted in FAULTS], header)


def case(planted: int, regime: str, seed: int) -> Case:
    """40 units are five octets: a group of three blocks shares them unevenly."""
    return Case(planted, "rnn_relu", regime, BLOCKS[regime], "bfloat16", 40, seed)


def run(sanitizer: str | None, given: Sequence[Case]) -> str:
    """What is said, up to a sanitizer's first complaint."""
    prefix, environment = sanitized(sanitizer)
    for name in environment.keys() & {"TSAN_OPTIONS", "ASAN_OPTIONS"}:
        environment[name] += ":halt_on_error=1"
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.cudasim.sweeps", *map(str, given)],
        env={
            **os.environ,
            "FASTRNN_CUDA_LIBRARY": str(library(sanitizer)),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 66), done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
def test_right_kernels(sanitizer: str | None) -> None:
    given = [case(0, regime, seed) for regime in BLOCKS for seed in (0, 1)]
    lines = [f"=== {one}" for one in given] + ["=== end"]
    said = run(sanitizer, given)
    assert [line for line in said.splitlines() if line] == lines, said[:5000]


def test_faults_are_found() -> None:
    """By some schedule or other."""
    given = [case(n, p.regime, seed) for n, p in enumerate(FAULTS, 1) for seed in SEEDS]
    found = set()
    for part in run(None, given).split("=== ")[1:]:
        if "WRONG" in part and not part.startswith("end"):
            found.add(Case.parse(part.splitlines()[0]).fault)
    missed = [p.name for n, p in enumerate(FAULTS, 1) if n not in found]
    assert not missed


@pytest.mark.parametrize("name", [p.name for p in FAULTS if p.race])
def test_races_are_found(name: str) -> None:
    (number,) = (n for n, p in enumerate(FAULTS, 1) if p.name == name)
    said = run("thread", [case(number, FAULTS[number - 1].regime, seed) for seed in (0, 1)])
    assert "WARNING: ThreadSanitizer: data race" in said, said[-3000:]
