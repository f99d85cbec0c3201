"""Every row of the suite: its results are checked, then it is timed beside its baselines and kept.
No time makes a test fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastrnn.tools.bench import comparison
from fastrnn.tools.bench.machine import Machine
from fastrnn.tools.bench.workload import Workload

ROUNDS = 5  # in pytest-benchmark's own timing


def test_row(
    benchmark: Any,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
    here: Machine,
    keep: Callable[[comparison.Row], None],
    workload: Workload,
    cell: str,
    mode: str,
) -> None:
    option = pytestconfig.getoption
    row, ours = comparison.run(
        workload,
        cell,
        mode,
        here,
        seconds=option("seconds"),
        latency_calls=option("latency_calls"),
        device=option("device"),
    )
    keep(row)
    record_property("summary", summary(row))
    # The report uses the interleaved times above. These compare runs of ours with each other.
    benchmark.group = f"{workload.name}, {mode}"
    benchmark.extra_info.update(row.as_json())
    with ours.around():
        benchmark.pedantic(ours.call, rounds=ROUNDS, iterations=row.ours.calls, warmup_rounds=1)


def summary(row: comparison.Row) -> str:
    """A row in one line."""
    line = f"{row.workload} {row.cell} {row.mode}: {row.ours.name} {row.ours.median:.4g} us"
    if row.baselines:
        line += f", {row.baselines[0].name} {row.baselines[0].median:.4g} us, {row.speedup():.2f} x"
    return line + "".join(
        f"; {v.status}: {v.against} {v.bound:.3g}" for v in row.verdicts if v.status != "reached"
    )
