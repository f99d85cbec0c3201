"""Selections that stand for the product of several lists, such as kernels and their GPUs.

Running a whole product takes many minutes. By default tests run a selection that has every value
of every list; with FASTRNN_TESTS=all they run the product.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

__all__ = ["ALL_TESTS", "covering", "pairs", "pairwise"]

ALL_TESTS = os.environ.get("FASTRNN_TESTS") == "all"

T = TypeVar("T")


def pairs(values: Iterable[Hashable]) -> set[tuple[Any, Any]]:
    """All pairs of the values of one case, in their order."""
    return set(itertools.combinations(values, 2))


def covering(choices: Iterable[Sequence[T]], values: Callable[[T], Sequence[Hashable]]) -> list[T]:
    """One of each sequence of alternatives, such that many pairs of values occur.

    It takes the alternative with the most pairs that no choice before had, and among equals the one
    whose values were chosen least often.
    """
    seen: set[tuple[Any, Any]] = set()
    times: Counter[Hashable] = Counter()

    def gain(one: T) -> tuple[int, int]:
        return len(pairs(values(one)) - seen), -sum(times[value] for value in values(one))

    chosen = []
    for alternatives in choices:
        best = max(alternatives, key=gain)
        seen.update(pairs(values(best)))
        times.update(values(best))
        chosen.append(best)
    return chosen


def pairwise(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of the product of the lists in which each pair of values of two lists occurs; with
    FASTRNN_TESTS=all the product."""
    product = list(itertools.product(*lists))
    if ALL_TESTS:
        return product

    def placed(row: tuple[Any, ...]) -> list[tuple[int, Any]]:
        return list(enumerate(row))

    missing = set().union(*(pairs(placed(row)) for row in product))
    rows = []
    while missing:
        rows.append(max(product, key=lambda row: len(pairs(placed(row)) & missing)))
        missing -= pairs(placed(rows[-1]))
    return rows
