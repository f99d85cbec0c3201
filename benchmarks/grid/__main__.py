"""Time fastrnn beside torch.nn on a grid of kinds, modes and sizes.

    python -m benchmarks.grid                                     # print a summary
    python -m benchmarks.grid --only lstm,gru_cell --mode training --threads 1
    python -m benchmarks.grid --save --docs docs/benchmarks.md    # write results, image and page
    python -m benchmarks.grid --saved benchmarks/results/MACHINE  # time nothing: draw what is there

Each point is compared with float64 first, and one that is wrong is not timed. --save writes
grid.json and grid.svg into benchmarks/results/<machine>: the points of the run replace earlier
ones, and others stay as they are.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.grid import heatmap, summary, timing
from benchmarks.grid.points import ALL, KINDS, MODES, QUICK, Point, is_left_out, points, title
from benchmarks.grid.timing import Row
from benchmarks.report import RESULTS
from fastrnn.tools.bench import machine, store

FILE, IMAGE = "grid.json", "grid.svg"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a point is wrong, 2 if arguments are invalid."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.docs and not (given.save or given.saved):
        parser.error("--docs needs --save or --saved")
    if given.threads:
        torch.set_num_threads(given.threads)
    modes = (given.mode,) if given.mode else MODES
    chosen = points(given.only, modes, QUICK if given.quick else ALL)
    folder: Path | None = given.saved
    if given.saved:
        rows = [row for row, _ in load(given.saved).rows]
        if not rows:
            parser.error(f"{given.saved} has no {FILE} with points")
    else:
        kept = keeper(given.results, sys.argv[1:] if argv is None else argv) if given.save else None
        rows = run(chosen, given.seconds, kept.keep if kept else lambda row: None)
        folder = kept.path.parent if kept else None
    print(f"\n{summary.text(rows, [point for point in chosen if is_left_out(point)])}")
    if folder:
        publish(folder, given.docs)
    return int(any(row.wrong is not None for row in rows))


def run(chosen: Sequence[Point], seconds: float, keep: Callable[[Row], None]) -> list[Row]:
    """Time all points that are not left out, and print a line for each kind, mode and H.

    Args:
        keep: takes each row as soon as it is there.
    """
    to_time = [point for point in chosen if not is_left_out(point)]
    rows: list[Row] = []
    begin = time.monotonic()
    for number, point in enumerate(to_time, 1):
        rows.append(timing.measured(point, torch.get_num_threads(), seconds))
        keep(rows[-1])
        if number == len(to_time) or _panel(to_time[number]) != _panel(point):
            left = (time.monotonic() - begin) / number * (len(to_time) - number)
            done = [row for row in rows if _panel(row.point) == _panel(point)]
            print(
                f"{number}/{len(to_time)}, {left // 60:.0f}:{left % 60:02.0f} left  {_line(done)}",
                flush=True,
            )
    return rows


def _panel(point: Point) -> tuple[str, str, int]:
    return point.kind, point.mode, point.hidden


def _line(rows: Sequence[Row]) -> str:
    """The rows of one kind, mode and H in one line."""
    point = rows[0].point
    about = f"{title(point.kind)}, {point.mode}, H = {point.hidden}: {len(rows)} points"
    low = [row for row in summary.worst(rows) if summary.is_slower(row)]
    if wrong := sum(row.wrong is not None for row in rows):
        about += f", {wrong} WRONG"
    at = (f"{row.ratio:.2f} at T={row.point.steps} B={row.point.batch}" for row in low)
    return "; ".join([about, *at])


def keeper(results: Path, arguments: Sequence[str]) -> store.Kept[Row]:
    """Keeps rows in the folder of this machine."""
    command = shlex.join(["python", "-m", "benchmarks.grid", *arguments])
    run = store.conditions(machine.measure(), command)
    folder = store.folder(results, run.machine.threads)
    return store.Kept(folder / FILE, run, [point.name for point in points()], Row.from_json)


def load(folder: Path) -> store.Results[Row]:
    """The grid of a machine."""
    return store.load_as(Row.from_json, folder / FILE)


def publish(folder: Path, page: Path | None) -> None:
    """Draw the heat map of a machine, and rewrite a page about it, which links to the drawing."""
    results = load(folder)
    latest = results.runs[-1]
    about = f"{latest.device}, {latest.machine.threads} threads, float32, commit {latest.commit}"
    drawing = folder / IMAGE
    drawing.write_text(heatmap.draw([row for row, _ in results.rows], about))
    print(f"{drawing}: {len(results.rows)} points")
    if page:
        link = page.parent / "img" / IMAGE
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(drawing, link.parent))
        without = [point for point in points() if is_left_out(point)]
        page.write_text(summary.docs(page.read_text(), results, without))
        print(f"{page}: rewritten; {link}")


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=about)
    kinds = "these, with commas between: " + ", ".join(KINDS)
    parser.add_argument("--only", type=_kinds, default=KINDS, metavar="KINDS", help=kinds)
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument("--threads", type=int, help="default: as many as torch would take")
    parser.add_argument("--quick", action="store_true", help="few sizes, to see that all works")
    parser.add_argument("--seconds", type=float, default=0.05, help="of calls of each of the two")
    parser.add_argument("--save", action="store_true", help="write results and image")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all machines")
    parser.add_argument("--saved", type=Path, metavar="FOLDER", help="time nothing, draw these")
    parser.add_argument("--docs", type=Path, help="rewrite this page and its image")
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    if unknown := [name for name in text.split(",") if name not in KINDS]:
        known = ", ".join(KINDS)
        raise argparse.ArgumentTypeError(f"no kind {', '.join(unknown)}; there are: {known}")
    return tuple(kind for kind in KINDS if kind in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
