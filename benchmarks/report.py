"""Tables, plots and a page from the suite's results on one machine.

    python -m benchmarks.report [benchmarks/results/MACHINE] [--readme README.md]
        [--docs docs/benchmarks.md]

The default folder is that of the machine measured last. The command writes speedup.svg beside the
results and the page to build/benchmark/MACHINE.html. It also rewrites tables between their markers:
--docs names the file with all rows and the losses, --readme the file with a few rows.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fastrnn.tools.bench import store
from fastrnn.tools.bench.comparison import TORCH, Row
from fastrnn.tools.bench.workload import BEST_BASELINE, CELLS

BEGIN, END = "<!-- benchmarks/report.py -->", "<!-- end -->"
BEGIN_LOSSES = "<!-- benchmarks/report.py, losses -->"
TABLED = ("streaming", "layers", "packed")  # groups in the tables of README and docs
# The workloads in the README's table: each kind of use once, and one in which a baseline is faster.
SHORT = ("stream-64", "one-row-256", "language-model", "speech", "packed")
SWEEPS = {"over H": "hidden", "over B": "batch", "over T": "steps"}
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parent.parent / "build" / "benchmark"
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def against(mode: str) -> str:
    """The baseline of a mode in tables and plots: torch.nn for training, which few others run."""
    return TORCH if mode == "training" else BEST_BASELINE


def shape(row: Row) -> str:
    """(T, B, I, H), the number of layers and their directions."""
    sizes = f"({row.steps}, {row.batch}, {row.inputs}, {row.hidden})"
    layers = f", {row.layers} layers" if row.layers > 1 else ""
    return sizes + layers + (", bidirectional" if row.bidirectional else "")


def micros(value: float) -> str:
    """A time in the unit that reads best."""
    if value < 1000:
        return f"{value:.3g} µs"
    return f"{value / 1e3:.3g} ms" if value < 1e6 else f"{value / 1e6:.3g} s"


def table(results: store.Results[Row], workloads: Sequence[str] | None = None) -> str:
    """One line for each workload: our time and the speed-up, losses in italics.

    Args:
        results: of one machine.
        workloads: names of the workloads to show; all of the groups `TABLED` by default.
    """
    rows = {
        row.key[:3]: row
        for row, _ in results.rows
        if row.group in TABLED and (workloads is None or row.workload in workloads)
    }
    lines = [
        "| T, B, I, H | inference, over the best baseline: LSTM | GRU | RNN "
        "| training, over torch.nn: LSTM | GRU | RNN |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _, _ in rows):
        first = next(row for key, row in rows.items() if key[0] == name)
        cells = []
        for modes in (("inference", "step"), ("training",)):
            for cell in CELLS:
                found = [rows[name, cell, mode] for mode in modes if (name, cell, mode) in rows]
                cells.append(_figure(found[0]) if found else "–")
        lines.append(f"| {name} {shape(first)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"*{line}*" for line in conditions(results, rows.values()))])


def losses(results: store.Results[Row]) -> str:
    """One line for each row in which a baseline is faster, the worst first."""
    ratios = [(row.speedup(against(row.mode)), row) for row, _ in results.rows]
    lost = [(ratio, row) for ratio, row in ratios if ratio is not None and ratio < 1]
    lost.sort(key=lambda each: each[0])
    lines = [
        "| T, B, I, H | cell | mode | ours | baseline | ours is |",
        "|---|---|---|---|---|---|",
    ]
    for ratio, row in lost:
        mode = row.mode + ("" if row.dtype == "float32" else f", {row.dtype}")
        found = row.entry(TORCH) if against(row.mode) == TORCH else row.baselines[0]
        baseline = f"{micros(found.median)}, {found.name}" if found else ""
        ours = micros(row.ours.median)
        lines.append(
            f"| {shape(row)} | {row.cell.upper()} | {mode} | {ours} | {baseline} | {ratio:.2f}× |"
        )
    return "\n".join(lines)


def _figure(row: Row) -> str:
    ratio = row.speedup(against(row.mode))
    if ratio is None:
        return micros(row.ours.median)
    figure = f"{micros(row.ours.median)}, {ratio:.3g}×"
    if ratio >= 1:
        return figure
    return (
        f"*{figure} {row.baselines[0].name}*"
        if against(row.mode) == BEST_BASELINE
        else f"*{figure}*"
    )


def conditions(
    results: store.Results,
    rows: Iterable[store.Stored],
    command: str = "python -m pytest benchmarks",
    formats: str = "float32",
) -> list[str]:
    """A line for each group of runs under equal conditions from which one of these rows is.

    Args:
        command: what repeats all rows, for a line about several runs.
        formats: of the numbers.
    """
    wanted = {row.key for row in rows}
    numbers = sorted({number for row, number in results.rows if row.key in wanted})
    alike: dict[str, list[store.Conditions]] = {}
    for run in (results.runs[n] for n in numbers):
        versions = ", ".join(f"{n} {v}" for n, v in run.versions.items() if v != "not installed")
        about = f"{run.device} ({run.instruction_set}), {run.machine.threads} threads, {formats}"
        alike.setdefault(f"{about}; {versions}", []).append(run)
    sentences = []
    for about, runs in alike.items():
        commits, days, commands = (
            list(dict.fromkeys(values))
            for values in (
                [run.commit for run in runs],
                [run.date.split()[0] for run in runs],
                [run.command for run in runs],
            )
        )
        ran = f"`{commands[0]}`" if len(commands) == 1 else f"`{command}`, in parts"
        sentences.append(f"{about}; commit {', '.join(commits)}, {', '.join(days)}; {ran}")
    return sentences


def rewrite(text: str, table: str, begin: str = BEGIN) -> str:
    """`text` with the table between its markers replaced.

    Raises:
        ValueError: if the text has no such pair of markers.
    """
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no {begin} … {END} to put the table into")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{END}", text, count=1)


def readme(text: str, results: store.Results[Row]) -> str:
    """The README with its short table written anew."""
    return rewrite(text, table(results, SHORT))


def docs(text: str, results: store.Results[Row]) -> str:
    """The page on benchmarks with its tables written anew."""
    return rewrite(rewrite(text, table(results)), losses(results), BEGIN_LOSSES)


def plot(results: store.Results[Row], path: Path) -> bool:
    """Plots speed-ups over H, B and T, and the time of a step over T. False if no row fits."""
    import matplotlib

    matplotlib.use("Agg")
    # The same results give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "fastrnn", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    rows = [row for row, _ in results.rows if row.group in SWEEPS]
    if not rows:
        return False
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    for axis, (group, size) in zip(axes, SWEEPS.items(), strict=False):
        for cell, colour in zip(CELLS, ("C0", "C1", "C2"), strict=True):
            for mode, style in (("inference", "-"), ("training", "--")):
                line = [r for r in rows if (r.group, r.cell, r.mode) == (group, cell, mode)]
                line.sort(key=lambda r: getattr(r, size))
                axis.plot(
                    [getattr(r, size) for r in line],
                    [r.speedup(against(mode)) or float("nan") for r in line],
                    style,
                    color=colour,
                    marker="o",
                    markersize=3,
                    label=f"{cell.upper()}, {mode}",
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=next((r.about for r in rows if r.group == group), group))
        axis.set(xlabel=group.removeprefix("over "), yscale="log")
        axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    for cell in CELLS:
        for mode, style in (("inference", "-"), ("training", "--")):
            line = [r for r in rows if (r.group, r.cell, r.mode) == ("over T", cell, mode)]
            line.sort(key=lambda r: r.steps)
            axes[3].plot(
                [r.steps for r in line],
                [r.ours.median / r.steps for r in line],
                style,
                color=f"C{CELLS.index(cell)}",
                marker="o",
                markersize=3,
            )
    axes[3].set(title="a step of ours, µs: flat is linear in T", xlabel="T", ylim=(0, None))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times as fast")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    run = results.runs[-1]
    figure.suptitle(
        f"inference over the best of torch.nn and ONNX Runtime, training over torch.nn; "
        f"{run.device}, {run.machine.threads} threads, float32, commit {run.commit}",
        fontsize=9,
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


@dataclass(frozen=True)
class Line:
    """A row on the page: `status` is the worst of its verdicts, `run` the index of its run."""

    row: Row
    shape: str
    baseline: str
    baseline_micros: float | None
    ratio: float | None
    status: str
    run: int


def lines(results: store.Results[Row]) -> list[Line]:
    """All rows, with the worst of their verdicts."""
    found = []
    for row, number in results.rows:
        baseline = row.baselines[0] if row.baselines else None
        worst = [
            s
            for s in ("missed", "not measured", "within noise", "reached")
            if s in {v.status for v in row.verdicts}
        ]
        found.append(
            Line(
                row,
                shape(row),
                baseline.name if baseline else "",
                baseline.median if baseline else None,
                row.speedup(),
                worst[0] if worst else "",
                number,
            )
        )
    return found


def page(results: store.Results[Row], svg: str) -> str:
    """The whole report as one HTML page that needs no other file."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["micros"] = micros
    shown = lines(results)
    verdicts = [v for line in shown for v in line.row.verdicts]
    return environment.from_string(TEMPLATE.read_text()).render(
        runs=results.runs,
        lines=shown,
        counts={
            status: sum(v.status == status for v in verdicts)
            for status in ("reached", "within noise", "missed", "not measured")
        },
        losses=[line for line in shown if line.ratio is not None and line.ratio < 1],
        # The XML declaration and the document type do not belong inside a page.
        svg=svg[svg.index("<svg") :] if svg else "",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results", type=Path, nargs="?", help="a machine's folder, by default the newest"
    )
    parser.add_argument("--html", type=Path, help="where to write the page")
    parser.add_argument("--readme", type=Path, help="rewrite the short table of this file")
    parser.add_argument("--docs", type=Path, help="rewrite the tables of this file")
    given = parser.parse_args(argv)
    written = sorted(RESULTS.glob("*/suite.json"), key=lambda file: file.stat().st_mtime)
    folder = given.results or (written[-1].parent if written else RESULTS)
    results = store.load(folder / "suite.json")
    if not results.rows:
        parser.error(f"{folder} has no suite.json with rows: run `make bench` first")
    drawing = folder / "speedup.svg"
    drawn = plot(results, drawing)
    html = given.html or PAGES / f"{folder.name}.html"
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page(results, drawing.read_text() if drawn else ""))
    print(f"{html}: {len(results.rows)} rows" + (f"; {drawing}" if drawn else ""))
    for file, rewritten in ((given.readme, readme), (given.docs, docs)):
        if file:
            file.write_text(rewritten(file.read_text(), results))
            print(f"{file}: tables rewritten")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
