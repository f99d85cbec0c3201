"""Times layers of one row while other processes use the cores, and while torch has more threads
than there are cores.

    python -m benchmarks.load                          every row, about 30 minutes
    python -m benchmarks.load --busy 0,1 --threads 2   some of them
    python -m benchmarks.load -k gru-100x1x64x64       the rows whose name contains this
    python -m benchmarks.load --save                   writes results/<machine>/load.md too

Each row times our layer with all of torch's threads, our layer with one thread, and torch.nn, in
turn under the same load. Two things must hold in each row: ours with all threads takes at most
1.5 times as long as with one thread, and it is not slower than torch.nn. The table says where they
do not.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import RESULTS
from fastrnn.tools.bench import store
from fastrnn.tools.bench.implementation import OURS, Case, Prepared, TorchLayer
from fastrnn.tools.bench.workload import CELLS, Workload

BUSY = (0, 1, 2, 4)  # busy processes
THREADS = (2, 8, 32)  # of torch
MOST_OVER_ONE_THREAD = 1.5
LEAST_OVER_TORCH = 1.0
TURNS, FEWEST_TURNS = 5, 3

# Modes and (T, B, I, H).
SHAPES = (
    (("inference", "training"), (1, 1, 16, 16)),
    (("inference", "training"), (100, 1, 64, 64)),
    (("inference", "training"), (150, 1, 48, 96)),
    (("inference", "training"), (100, 1, 256, 256)),
    (("inference", "training"), (200, 1, 512, 512)),
    (("step",), (1, 1, 64, 64)),
    (("step",), (1, 1, 256, 256)),
)


@dataclass(frozen=True)
class Row:
    """Microseconds of a call, the median and the mean of each implementation."""

    name: str
    busy: int
    threads: int
    median: tuple[float, float, float]  # ours, ours with one thread, torch.nn
    mean: tuple[float, float, float]

    @property
    def over_one_thread(self) -> float:
        return self.median[0] / self.median[1]

    @property
    def over_torch(self) -> float:
        """How many times as fast as torch.nn."""
        return self.median[2] / self.median[0]

    @property
    def holds(self) -> bool:
        return self.over_one_thread <= MOST_OVER_ONE_THREAD and self.over_torch >= LEAST_OVER_TORCH


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Runs processes that do nothing but use a core each."""
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)
    ]
    try:
        if processes:
            time.sleep(0.2)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def cases(chosen: str = "") -> list[tuple[Workload, str, str]]:
    """(workload, cell, mode) of the rows whose name contains `chosen`."""
    found = []
    for (modes, shape), cell in itertools.product(SHAPES, CELLS):
        for mode in modes:
            name = f"{cell}-{'x'.join(map(str, shape))}-{mode}"
            if chosen in name:
                found.append((Workload(name, *shape, modes=(mode,)), cell, mode))
    return found


def prepare(workload: Workload, cell: str, mode: str, threads: int) -> list[Prepared]:
    """Ours with all threads, ours with one, and torch.nn."""
    many, one = (Case.build(workload, cell, mode, n) for n in (threads, 1))
    ours = next(each for each in OURS if each.supports(many) is None)
    return [ours.prepare(many), ours.prepare(one), TorchLayer("torch.nn").prepare(many)]


def measure(
    name: str, prepared: Sequence[Prepared], busy: int, threads: int, seconds: float
) -> Row:
    """Time single calls, in turns that take `seconds` together for each implementation."""
    taken: list[list[float]] = [[] for _ in prepared]
    for number in range(TURNS):
        for implementation, times in zip(prepared, taken, strict=True):
            if number >= FEWEST_TURNS and sum(times) > seconds:
                continue  # its calls are slow
            with implementation.around():
                if number == 0:
                    implementation.call()
                turn(implementation, times, seconds / TURNS)
    micros = [[1e6 * each for each in times] for times in taken]
    ours, one, theirs = map(statistics.median, micros)
    means = tuple(map(statistics.fmean, micros))
    return Row(name, busy, threads, (ours, one, theirs), (means[0], means[1], means[2]))


def turn(implementation: Prepared, times: list[float], seconds: float) -> None:
    begin = end = time.perf_counter()
    while end - begin < seconds:
        start = time.perf_counter()
        implementation.call()
        end = time.perf_counter()
        times.append(end - start)


def line(row: Row) -> str:
    cells = [row.name, str(row.busy), str(row.threads)]
    cells += [f"{median:.4g}" for median in row.median]
    cells += [f"{row.over_one_thread:.2f}", f"{row.over_torch:.2f}"]
    cells += [f"{row.mean[0] / row.mean[1]:.2f}", f"{row.mean[2] / row.mean[0]:.2f}"]
    return f"| {' | '.join([*cells, 'yes' if row.holds else '**no**'])} |"


HEAD = """\
| row | busy | threads | ours, µs | one thread, µs | torch.nn, µs \
| medians: ours / one | torch.nn / ours | means: ours / one | torch.nn / ours | holds |
|---|---|---|---|---|---|---|---|---|---|---|"""


def page(rows: Sequence[Row], command: str) -> str:
    """The table, with the conditions of the run."""
    held = sum(row.holds for row in rows)
    return (
        "# One row under load\n\n"
        f"{store.made_by(command)} Medians of single calls in microseconds, then the ratios of "
        "medians and of means. *busy* is the number of busy processes, *threads* the number of "
        f"torch's threads. A row holds if ours takes at most {MOST_OVER_ONE_THREAD} times as long "
        f"as with one thread and is not slower than torch.nn: {held} of {len(rows)} do.\n\n"
        + "\n".join([HEAD, *map(line, rows)])
        + "\n"
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--busy", type=numbers, default=BUSY, help="numbers of busy processes")
    parser.add_argument("--threads", type=numbers, default=THREADS, help="torch's threads")
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls, for each entry")
    parser.add_argument("-k", dest="chosen", default="", help="rows whose name contains this")
    parser.add_argument("--save", action="store_true", help="write the table to the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all machines")
    options = parser.parse_args(arguments)
    rows = []
    print(HEAD)
    for busy in options.busy:
        with busy_processes(busy):
            chosen = cases(options.chosen)
            for threads, (workload, cell, mode) in itertools.product(options.threads, chosen):
                prepared = prepare(workload, cell, mode, threads)
                rows.append(measure(workload.name, prepared, busy, threads, options.seconds))
                print(line(rows[-1]), flush=True)
    if options.save:
        words = sys.argv[1:] if arguments is None else arguments
        text = page(rows, store.command("benchmarks.load", words))
        store.save_page(options.results, "load.md", text)
    print(f"{sum(row.holds for row in rows)} of {len(rows)} rows hold")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
