"""What the rows of the grid say together: as text, and as a part of a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import report
from benchmarks.grid.points import MOST_WORK, Point, title
from benchmarks.grid.timing import BOUND, Row
from fastrnn.tools.bench import store

BEGIN = "<!-- benchmarks/grid -->"
NOT_MEASURED = "The grid has not been measured yet."
WORST = 10


def is_slower(row: Row) -> bool:
    return row.ratio < BOUND  # false for NaN, the ratio of a wrong row


def worst(rows: Sequence[Row]) -> list[Row]:
    """The rows with the lowest ratios, the lowest first, those that are wrong left out."""
    return sorted((row for row in rows if row.pairs), key=lambda row: row.ratio)[:WORST]


def counts(rows: Sequence[Row]) -> str:
    """How many points there are, and how many are slower, wrong, or measured again."""
    slower, wrong = sum(map(is_slower, rows)), sum(row.wrong is not None for row in rows)
    again = sum(len(row.pairs) > 1 for row in rows)
    return (
        f"{len(rows)} points: {slower} below {BOUND}, {wrong} wrong; "
        f"{again} were below {BOUND} at first and measured again."
    )


def left_out(points: Sequence[Point]) -> str:
    """Which points were left out, and why."""
    if not points:
        return "No point was left out."
    names: dict[str, list[str]] = {}
    for point in points:
        sizes = f"({point.steps}, {point.batch}, {point.hidden})"
        names.setdefault(f"{title(point.kind)} {point.mode}", []).append(sizes)
    listed = "; ".join(f"{name} {', '.join(sizes)}" for name, sizes in names.items())
    return (
        f"{len(points)} points were left out, because a call has more than {MOST_WORK / 1e9:.0f} "
        f"GFLOP of products and the grid would take too long with them: {listed}."
    )


def by_kind(rows: Sequence[Row]) -> str:
    """A table with a line for each kind and mode, and one for all."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((title(row.point.kind), row.point.mode), []).append(row)
    lines = [[*names, *_figures(group)] for names, group in groups.items()]
    head = ["", "mode", "points", f"below {BOUND}", "worst", "median", "geometric mean"]
    return table([head, *lines, ["all", "", *_figures(rows)]])


def _figures(rows: Sequence[Row]) -> list[str]:
    ratios = [row.ratio for row in rows if row.pairs]
    means = (min, statistics.median, statistics.geometric_mean)
    shown = [f"{mean(ratios):.3f}" if ratios else "–" for mean in means]
    return [str(len(rows)), str(sum(map(is_slower, rows))), *shown]


def of_each(rows: Sequence[Row]) -> str:
    """A table with a line for each row."""
    head = ["", "mode", "T, B, H", "ours", "torch.nn", "ratio", "measured"]
    lines = []
    for row in rows:
        point = row.point
        sizes = f"({point.steps}, {point.batch}, {point.hidden})"
        times = [report.micros(row.ours), report.micros(row.theirs), f"{row.ratio:.3f}"]
        lines.append([title(point.kind), point.mode, sizes, *times, f"{len(row.pairs)}×"])
    return table([head, *lines])


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    padded = [
        [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def text(rows: Sequence[Row], without: Sequence[Point]) -> str:
    """The summary that is printed at the end of a run."""
    parts = [by_kind(rows), f"The worst {WORST}:\n\n{of_each(worst(rows))}", counts(rows)]
    parts += [left_out(without)]
    parts += [f"WRONG: {row.point.title}: {row.wrong}" for row in rows if row.wrong]
    return "\n\n".join(parts)


def docs(page: str, results: store.Results[Row], without: Sequence[Point]) -> str:
    """A page with the part between its markers written anew: the image, its conditions, and what is
    slower."""
    rows = [row for row, _ in results.rows]
    if not rows:
        return report.rewrite(page, NOT_MEASURED, BEGIN)
    conditions = report.conditions(results, rows, "python -m benchmarks.grid")
    low = [row for row in sorted(rows, key=lambda row: row.ratio) if is_slower(row)]
    parts = [
        "![torch.nn's time divided by fastrnn's, for each kind, mode and size](img/grid.svg)\n"
        + "\n".join(f"*{line}*" for line in conditions),
        f"{counts(rows)} {left_out(without)}",
        by_kind(rows),
        f"These points are below {BOUND}:\n\n{of_each(low)}" if low else "",
    ]
    return report.rewrite(page, "\n\n".join(filter(None, parts)), BEGIN)
