"""Checks a point, times it, and times it again if it is suspicious."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmarks.grid.points import OURS, THEIRS, Point
from fastrnn.tools.bench import comparison, measure

BOUND = 0.97  # a lower ratio is suspicious: two medians of equal calls differ by up to 3 percent
REPEATS = 3
LONGER = 6  # how many times as long a repeated measurement is


@dataclass(frozen=True)
class Pair:
    """Microseconds of a call of ours and of torch.nn's, which took turns."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


@dataclass(frozen=True)
class Row:
    """The result of a point.

    Attributes:
        pairs: all measurements, the first one first; none if the results are wrong.
        error: largest distance from float64, relative to the largest value if that exceeds one.
        wrong: what is wrong with the results, or None.
    """

    point: Point
    threads: int
    pairs: tuple[Pair, ...]
    error: float | None = None
    wrong: str | None = None

    @property
    def workload(self) -> str:
        return self.point.name

    @property
    def key(self) -> tuple[str, int]:
        return self.point.name, self.threads

    @property
    def counted(self) -> tuple[Pair, ...]:
        """The measurements that count: the repeated ones if there are any.

        The first one was repeated because it was low, so it would draw the median down.
        """
        return self.pairs[1:] or self.pairs

    @property
    def ratio(self) -> float:
        """torch.nn's time divided by ours, the median of the measurements that count; NaN if the
        results are wrong."""
        return statistics.median(p.ratio for p in self.counted) if self.pairs else float("nan")

    @property
    def ours(self) -> float:
        return statistics.median(pair.ours for pair in self.counted)

    @property
    def theirs(self) -> float:
        return statistics.median(pair.theirs for pair in self.counted)

    def as_json(self) -> dict[str, Any]:
        """One flat object. `ratio` and `measured` follow from `pairs` and are there to be read."""
        about = {"ratio": self.ratio, "measured": len(self.pairs)} if self.pairs else {}
        return {
            **asdict(self.point),
            "threads": self.threads,
            **about,
            "pairs": [[pair.ours, pair.theirs] for pair in self.pairs],
            "error": self.error,
            "wrong": self.wrong,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        point = Point(**{field.name: values[field.name] for field in fields(Point)})
        pairs = tuple(Pair(*pair) for pair in values["pairs"])
        return cls(point, values["threads"], pairs, values["error"], values["wrong"])


def measured(point: Point, threads: int, seconds: float) -> Row:
    """Check a point, and time it if the results are right.

    Args:
        seconds: time for the calls of each implementation.
    """
    case = point.case(threads)
    try:
        error, _ = comparison.Gate(case).check(OURS.name, OURS.prepare(case), ours=True)
    except comparison.GateFailed as failure:
        return Row(point, threads, (), wrong=str(failure))
    return Row(point, threads, enough(lambda s: timed(point, threads, s), seconds), error)


def timed(point: Point, threads: int, seconds: float) -> Pair:
    """One measurement, with new tensors, because their place in memory may favour one side."""
    case = point.case(threads)
    prepared = {each.name: each.prepare(case) for each in (OURS, THEIRS)}
    times = measure.interleaved(prepared, seconds)
    return Pair(times[OURS.name].median, times[THEIRS.name].median)


def enough(time: Callable[[float], Pair], seconds: float) -> tuple[Pair, ...]:
    """One measurement, and longer ones if its ratio is suspicious.

    There are `REPEATS` at most. They end when most of them are sure to be on one side of the bound,
    so that it makes no difference to stop.
    """
    first = time(seconds)
    again: list[Pair] = []
    while first.ratio < BOUND and not _agree(again):
        again.append(time(LONGER * seconds))
    return (first, *again)


def _agree(pairs: list[Pair]) -> bool:
    low = sum(pair.ratio < BOUND for pair in pairs)
    return max(low, len(pairs) - low) > REPEATS // 2
