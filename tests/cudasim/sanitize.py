"""All kernels under the sanitizers: every cell, residency and precision, a case for each tile.

`python -m tests.cudasim.sanitize` takes about ten minutes on two cores; `--save` writes the results
to benchmarks/results/cuda-sanitizers.md. The tests run only a few such cases.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fastrnn import cells
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import derive
from tests.cudasim.build import build, version
from tests.cudasim.sweeps import Case, run_cases
from tests.support.names import BUILT_IN
from tests.support.paths import ROOT
from tests.support.simulated import PARTS, precisions

RESULTS = ROOT / "benchmarks" / "results" / "cuda-sanitizers.md"
SANITIZERS = ["address", "thread"]
BLOCKS = {"step": 1, "block": 1, "cluster": 3, "grid": 3}
TILES = {"step": (16, 32, 64)}
LAYOUTS = ["dense", "lengths", "packed"]
# So many units that each warp of a lone block takes more rows, and batch tiles that allow it.
MANY = {"rnn_tanh": (136, [8]), "rnn_relu": (136, [8]), "lstm": (72, [8, 16])}
COMPLAINTS = ("WARNING: ThreadSanitizer", "ERROR: AddressSanitizer", "WRONG", "cudasim:")


def cases(cell: str, residencies: Sequence[str] = PARTS) -> list[Case]:
    """Two recurrences in opposite directions, three launches, and another layout for each tile."""
    found = []
    for residency in residencies:
        for precision in precisions(residency):
            for seed, layout in enumerate(LAYOUTS):
                tile = TILES.get(residency, (8, 16, 32))[seed]
                if precision == "tf32x3" and residency != "step":
                    tile = min(tile, 16)  # tf32x3 has no wider tiles
                found.append(
                    Case(
                        *(0, cell, residency, BLOCKS[residency], precision, seed),
                        batch=9,
                        recurrences=2,
                        tile=tile,
                        chunk=2,
                        layout=layout,
                    )
                )
    if cell in MANY and "block" in residencies:
        hidden, tiles = MANY[cell]
        found += [
            Case(0, cell, "block", 1, precision, 1, hidden=hidden, tile=tile, chunk=2)
            for precision in precisions("block")
            for tile in tiles
        ]
    return found


def complaints(output: str, given: Sequence[Case]) -> list[str]:
    """The parts of the output that complain; the last part if the output is incomplete."""
    parts = output.split("=== ")[1:]
    found = [part for part in parts if any(words in part for words in COMPLAINTS)]
    if len(parts) != len(given) + 1 and not found:
        found.append(parts[-1] if parts else output)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cudasim.sanitize", description=__doc__)
    parser.add_argument("--sanitizer", choices=SANITIZERS, help="only this one")
    parser.add_argument("--cell", choices=BUILT_IN, help="only this one")
    parser.add_argument("--residency", choices=PARTS, help="only this one")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    names = [options.cell] if options.cell else BUILT_IN
    residencies = [options.residency] if options.residency else PARTS
    whole = not (options.sanitizer or options.cell or options.residency)
    if options.save and not whole:
        parser.error("--save needs a run of all cases: leave the other options out")
    header = emit_cpp.header(
        [derive(cells.get(name)) for name in BUILT_IN],
        [emit_cpp.key(cells.get(name)) for name in BUILT_IN],
    )
    rows, failed = [], False
    for sanitizer in [options.sanitizer] if options.sanitizer else SANITIZERS:
        library = build(None, sanitizer, (), header)
        jobs = [
            (name, residency, cases(name, [residency]))
            for name in names
            for residency in residencies
        ]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
            output = pool.map(lambda job: run_cases(library, sanitizer, job[2], False), jobs)  # noqa: B023
            for (name, residency, given), text in zip(jobs, output, strict=True):
                found = complaints(text, given)
                failed |= bool(found)
                rows.append(
                    f"| {sanitizer} | {name} | {residency} | {len(given)} | {len(found) or 'none'} "
                    "|"
                )
                print(rows[-1], *(part[:3000] for part in found), sep="\n", flush=True)
    if options.save:
        compiler = version().splitlines()[0]
        RESULTS.write_text(
            "# The CUDA kernels under the sanitizers\n\n"
            f"`python -m tests.cudasim.sanitize --save`, {datetime.date.today()}, {compiler}, in "
            "the simulator. A case is values and gradients, three launches each, with resets, from "
            "a tape that was saved and from one recomputed: of two recurrences in opposite "
            "directions, dense, with lengths or packed; or of one recurrence, dense, with so many "
            "units that a lone block's warps take more rows each.\n\n"
            "| sanitizer | cell | residency | cases | complaints |\n|---|---|---|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
