"""Time fastrnn in int8 and bfloat16 beside float32 and beside other libraries.

    python -m benchmarks.formats                                     # print the tables
    python -m benchmarks.formats --only lstm --threads 1 --quick     # a few rows
    python -m benchmarks.formats --save --docs docs/quantize.md      # write results and page
    python -m benchmarks.formats --saved benchmarks/results/MACHINE  # time nothing: show those

Each result is compared with float64 first, and a row in which one of ours is wrong is not timed.
All implementations of a row then take turns. --save writes formats.json into
benchmarks/results/<machine>: the rows of the run replace earlier ones, and others stay.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.grid import summary
from benchmarks.workloads import FORMATS as WORKLOADS
from fastrnn.tools import tolerance
from fastrnn.tools.bench import comparison, formats, machine, store
from fastrnn.tools.bench.comparison import TORCH, Row
from fastrnn.tools.bench.formats import FLOAT32, FORMATS, name
from fastrnn.tools.bench.machine import Machine
from fastrnn.tools.bench.workload import BEST_BASELINE, Workload

FILE = "formats.json"
BEGIN = "<!-- benchmarks/formats -->"
NOT_MEASURED = "The formats have not been measured yet."
COMMAND = "python -m benchmarks.formats"
CELLS = ("lstm", "gru")
# Columns of the table of speeds: a format of ours, and what it is compared with.
RIVALS = {
    "int8": ("torch.ao int8", "ONNX Runtime int8", BEST_BASELINE),
    "bfloat16": ("torch.nn bfloat16", "OpenVINO bfloat16"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a row is wrong, 2 if arguments are invalid."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.docs and not (given.save or given.saved):
        parser.error("--docs needs --save or --saved")
    if given.threads:
        torch.set_num_threads(given.threads)
    wrong: list[str] = []
    file: Path | None = None
    if given.saved:
        file = given.saved / FILE
        rows = [row for row, _ in store.load(file).rows]
        if not rows:
            parser.error(f"{given.saved} has no {FILE} with rows")
    else:
        here = machine.measure()
        kept = _keeper(here, given.results, sys.argv[1:] if argv is None else argv)
        chosen = [w for w in WORKLOADS if w.quick or not given.quick]
        keep = kept.keep if given.save else lambda row: None
        rows, wrong = run(chosen, given.only, here, given.seconds, keep)
        file = kept.path if given.save else None
    print(f"\n{text(rows, wrong)}")
    if file and given.docs:
        given.docs.write_text(docs(given.docs.read_text(), store.load(file)))
        print(f"{given.docs}: tables rewritten")
    return int(bool(wrong))


def run(
    workloads: Sequence[Workload],
    cells: Sequence[str],
    here: Machine,
    seconds: float,
    keep: Callable[[Row], None],
) -> tuple[list[Row], list[str]]:
    """Check and time all rows, and print a line for each.

    Args:
        seconds: time for the calls of each implementation.
        keep: takes each row as soon as it is there.

    Returns:
        The rows, and what is wrong with those that were not timed.
    """
    cases = [(w, c, m) for w in workloads for m in w.modes for c in w.cells if c in cells]
    rows: list[Row] = []
    wrong: list[str] = []
    for number, (workload, cell, mode) in enumerate(cases, 1):
        # In training the dtype of the whole row is the format, as in the suite's other rows.
        quantised = mode != "training"
        try:
            row, _ = comparison.run(
                workload,
                cell,
                mode,
                here,
                seconds=seconds,
                ours=formats.OURS if quantised else None,
                baselines=formats.BASELINES if quantised else None,
            )
        except comparison.GateFailed as failure:
            wrong.append(str(failure))
            line = f"WRONG: {failure}"
        else:
            rows.append(row)
            keep(row)
            times = (f"{e.name} {report.micros(e.median)}" for e in row.entries)
            line = f"{_title(row)} {report.shape(row)}: {', '.join(times)}"
        print(f"{number}/{len(cases)}  {line}", flush=True)
    return rows, wrong


def _keeper(here: Machine, results: Path, arguments: Sequence[str]) -> store.Kept[Row]:
    """Keeps rows in the folder of this machine."""
    run = store.conditions(here, store.command("benchmarks.formats", arguments))
    folder = store.folder(results, here.threads)
    return store.Kept(folder / FILE, run, [w.name for w in WORKLOADS], Row.from_json)


def text(rows: Sequence[Row], wrong: Sequence[str]) -> str:
    """The tables and the targets that were not reached, for the terminal."""
    parts = [*_tables(rows), targets(rows)]
    refused = {f"not {who}: {why}" for row in rows for who, why in row.refused.items()}
    parts += ["\n".join(sorted(refused)), *(f"WRONG: {each}" for each in wrong)]
    return "\n\n".join(filter(None, parts))


def docs(page: str, results: store.Results[Row]) -> str:
    """A page with the part between its markers written anew."""
    rows = [row for row, _ in results.rows]
    if not rows:
        return report.rewrite(page, NOT_MEASURED, BEGIN)
    about = report.conditions(results, rows, COMMAND, "formats as named")
    parts = [*_tables(rows), "\n".join(f"*{line}*" for line in about)]
    return report.rewrite(page, "\n\n".join(parts), BEGIN)


def _tables(rows: Sequence[Row]) -> list[str]:
    """Speeds without and with gradients, and errors, as far as there are rows."""
    trained = [row for row in rows if row.mode == "training"]
    others = [row for row in rows if row.mode != "training"]
    parts = [speeds(others), errors(others)] if others else []
    return [*parts, training(trained)] if trained else parts


def speeds(rows: Sequence[Row]) -> str:
    """A line for each row: the times of ours and their ratios to float32, then to the rivals."""
    head = ["", "T, B, I, H", "float32", *FORMATS]
    head += [f"{format} over {rival}" for format, rivals in RIVALS.items() for rival in rivals]
    lines = [head]
    for row in rows:
        line = [_title(row), report.shape(row), _time(row, FLOAT32)]
        line += [
            f"{_time(row, name(format))}, {_ratio(row, format, FLOAT32)}"
            if row.entry(name(format))
            else "–"
            for format in FORMATS
        ]
        line += [
            _ratio(row, format, rival) for format, rivals in RIVALS.items() for rival in rivals
        ]
        lines.append(line)
    return summary.table(lines)


def training(rows: Sequence[Row]) -> str:
    """A line for each row in bfloat16 with gradients."""
    lines = [["training", "T, B, I, H", "float32", "bfloat16", "over float32", f"over {TORCH}"]]
    for row in rows:
        own, theirs = (row.speedup(other) for other in (FLOAT32, TORCH))
        times = [_time(row, FLOAT32), report.micros(row.ours.median)]
        lines.append([row.cell.upper(), report.shape(row), *times, _figure(own), _figure(theirs)])
    return summary.table(lines)


def errors(rows: Sequence[Row]) -> str:
    """A line for each implementation: the largest error of all rows of a cell."""
    limits = {name(format): f"{limit:.0e}" for format, limit in tolerance.FORMATS.items()}
    names = dict.fromkeys(entry.name for row in rows for entry in row.entries)
    lines = [["largest error", *(cell.upper() for cell in CELLS), "tolerance"]]
    for each in names:
        found = [
            [entry.error for row in rows if row.cell == cell if (entry := row.entry(each))]
            for cell in CELLS
        ]
        shown = [f"{max(of_cell):.1e}" if of_cell else "–" for of_cell in found]
        lines.append([each, *shown, limits.get(each, "")])
    return summary.table(lines)


def targets(rows: Sequence[Row]) -> str:
    """How many targets have which result, and those that were not reached."""
    counted = Counter(verdict.status for row in rows for verdict in row.verdicts)
    lines = [f"targets: {', '.join(f'{n} {status}' for status, n in counted.items()) or 'none'}"]
    for row in rows:
        for v in row.verdicts:
            if v.status != "reached":
                value = "" if v.value is None else f" {v.value:.2f},"
                lines.append(
                    f"{v.status}: {_title(row)} {report.shape(row)}: {v.of or row.ours.name} over "
                    f"{v.against}:{value} target {v.bound:g}"
                )
    return "\n".join(lines)


def _title(row: Row) -> str:
    return row.cell.upper() + (f", {row.mode}" if row.mode != "inference" else "")


def _time(row: Row, who: str) -> str:
    entry = row.entry(who)
    return report.micros(entry.median) if entry else "–"


def _ratio(row: Row, format: str, other: str) -> str:
    """How many times as fast a format of ours is. The best baseline is named."""
    ours = row.entry(name(format))
    theirs = row.baselines[0] if other == BEST_BASELINE and row.baselines else row.entry(other)
    if ours is None or theirs is None:
        return "–"
    named = f" {theirs.name}" if other == BEST_BASELINE else ""
    return _figure(theirs.median / ours.median) + named


def _figure(ratio: float | None) -> str:
    """A ratio, a loss in italics."""
    if ratio is None:
        return "–"
    return f"{ratio:.3g}×" if ratio >= 1 else f"*{ratio:.3g}×*"


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=COMMAND, description=about)
    parser.add_argument("--only", type=_cells, default=CELLS, metavar="CELLS", help="lstm or gru")
    parser.add_argument("--threads", type=int, help="default: as many as torch would take")
    parser.add_argument("--quick", action="store_true", help="few rows, to see that all works")
    parser.add_argument("--seconds", type=float, default=0.3, help="of calls of each")
    parser.add_argument("--save", action="store_true", help="write results")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="of all machines")
    parser.add_argument("--saved", type=Path, metavar="FOLDER", help="time nothing, show these")
    parser.add_argument("--docs", type=Path, help="rewrite the tables of this page")
    return parser


def _cells(text: str) -> tuple[str, ...]:
    if unknown := [cell for cell in text.split(",") if cell not in CELLS]:
        raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are: {', '.join(CELLS)}")
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
