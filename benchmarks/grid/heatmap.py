"""The heat map: a panel for each kind, mode and H, and in it a cell for each T and B.

It reads on light and on dark pages: each cell has its own ground, and all other text is of a grey
between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks import report
from benchmarks.grid.points import MODES, Point, title
from benchmarks.grid.timing import BOUND, Row

WIDTH, HEIGHT = 34, 17  # of a cell
GAP = 14  # between panels
LEFT, TOP = 100, 88  # the names of rows and of columns
COLUMN = 66  # the least width of a column, for its name
NARROWEST = 640  # the least width of all, for the legend

# A ratio belongs to the first level whose bound is above it.
LEVELS = ((BOUND, "slower"), (1.05, "even"), (1.5, "faster"), (3.0, "fast"), (math.inf, "fastest"))
LEGEND = {
    "slower": f"below {BOUND}",
    "even": "to 1.05",
    "faster": "to 1.5",
    "fast": "to 3",
    "fastest": "above 3",
    "wrong": "wrong",
    "empty": "not measured",
}
STYLE = """
  text { text-anchor: middle; fill: #7c8594 }
  .head { font-weight: 700; font-size: 12px }
  .end { text-anchor: end }
  .start { text-anchor: start }
  rect { stroke: #7c8594; stroke-width: 0.4 }
  g text { fill: #1b1f27 }
  .slower rect { fill: #c92a2a }
  .even rect { fill: #eef0f4 }
  .faster rect { fill: #cfe6f5 }
  .fast rect { fill: #9ccbe8 }
  .fastest rect { fill: #5aa6d6 }
  .wrong rect { fill: #7a0000 }
  .wrong text { fill: #ffffff }
  .slower text { fill: #ffffff; font-weight: 700 }
  .empty rect { fill: none }
  .empty text { fill: #7c8594 }
"""


@dataclass(frozen=True)
class Layout:
    """Where everything is, in pixels.

    Attributes:
        lefts: the left edge of each kind's column.
        tops: the upper edge of the panels of each mode and H.
        steps: the numbers of steps of each kind, from left to right.
        batches: the numbers of rows, from top to bottom.
        width, height: of the whole.
    """

    lefts: dict[str, int]
    tops: dict[tuple[str, int], int]
    steps: dict[str, list[int]]
    batches: list[int]
    width: int
    height: int

    @classmethod
    def of(cls, points: Sequence[Point]) -> Layout:
        batches = sorted({point.batch for point in points})
        steps: dict[str, list[int]] = {}
        lefts: dict[str, int] = {}
        right = LEFT
        for kind in dict.fromkeys(point.kind for point in points):
            steps[kind] = sorted({point.steps for point in points if point.kind == kind})
            lefts[kind] = right
            right += max(COLUMN, WIDTH * len(steps[kind])) + GAP
        tops: dict[tuple[str, int], int] = {}
        bottom = TOP
        for mode in MODES:
            sizes = sorted({point.hidden for point in points if point.mode == mode})
            for hidden in sizes:
                bottom += GAP if hidden == sizes[0] else 0  # the name of the mode
                tops[mode, hidden] = bottom
                bottom += HEIGHT * len(batches) + GAP
        return cls(lefts, tops, steps, batches, max(right, NARROWEST), bottom)


def draw(rows: Sequence[Row], conditions: str) -> str:
    """The heat map of all kinds, modes and sizes that these rows have, as SVG."""
    of_point = {row.point: row for row in rows}
    layout = Layout.of(list(of_point))
    parts = [*_heads(layout, conditions), *_names(layout)]
    for (mode, hidden), top in layout.tops.items():
        for kind, left in layout.lefts.items():
            for column, steps in enumerate(layout.steps[kind]):
                for line, batch in enumerate(layout.batches):
                    row = of_point.get(Point(kind, mode, steps, batch, hidden))
                    place = (left + WIDTH * column, top + HEIGHT * line)
                    parts.append(_cell(row, *place) if row else _box("empty", "–", *place))
    return "\n".join([_begin(layout), *parts, "</svg>\n"])


def level(row: Row) -> str:
    """The class of a row's cell."""
    if row.wrong is not None:
        return "wrong"
    return next(name for bound, name in LEVELS if row.ratio < bound)


def figure(ratio: float) -> str:
    """A ratio with two decimals at most, rounded down, so that none seems to reach a bound."""
    scale = 100 if ratio < 10 else 10 if ratio < 100 else 1
    return f"{math.floor(round(ratio * scale, 6)) / scale:.{len(str(scale)) - 1}f}"


def _cell(row: Row, x: int, y: int) -> str:
    """The cell of a row. Its title shows up under the mouse when the file is opened alone."""
    if row.wrong is not None:
        return _box("wrong", "wrong", x, y, f"{row.point.title}: {row.wrong}")
    times = f"{report.micros(row.ours)}, torch.nn {report.micros(row.theirs)}"
    return _box(level(row), figure(row.ratio), x, y, f"{row.point.title}: {times}")


def _box(kind: str, text: str, x: int, y: int, title: str = "") -> str:
    titled = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<g class="{kind}">{titled}<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}"/>'
        f"{_text(text, x + WIDTH // 2, y + 12)}</g>"
    )


def _text(text: str, x: int, y: int, kind: str = "") -> str:
    about = f' class="{kind}"' if kind else ""
    return f'<text{about} x="{x}" y="{y}">{escape(text)}</text>'


def _begin(layout: Layout) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {layout.width} {layout.height}" '
        'role="img" aria-labelledby="title" font-size="10" '
        "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\">\n"
        '<title id="title">The time of torch.nn divided by that of fastrnn</title>\n'
        f"<style>{STYLE}</style>"
    )


def _heads(layout: Layout, conditions: str) -> Iterator[str]:
    """The lines above the panels: what is shown, and the legend."""
    yield _text("time of torch.nn divided by that of fastrnn", 4, 14, "head start")
    yield _text(conditions, 4, 29, "start")
    x = 4
    for kind, about in LEGEND.items():
        yield f'<g class="{kind}"><rect x="{x}" y="37" width="14" height="12"/></g>'
        yield _text(about, x + 18, 47, "start")
        x += 36 + 6 * len(about)


def _names(layout: Layout) -> Iterator[str]:
    """The names of columns, rows, and sizes."""
    for kind, left in layout.lefts.items():
        yield _text(title(kind), left, TOP - 16, "head start")
        for column, steps in enumerate(layout.steps[kind]):
            yield _text(f"T={steps}", left + WIDTH * column + WIDTH // 2, TOP + 6)
    named = set()
    for (mode, hidden), top in layout.tops.items():
        if mode not in named:
            yield _text(mode, 4, top - 6, "head start")
            named.add(mode)
        yield _text(f"H = {hidden}", 4, top + 12, "start")
        for line, batch in enumerate(layout.batches):
            yield _text(f"B={batch}", LEFT - 6, top + HEIGHT * line + 12, "end")
