"""The tables, plots and pages that the report writes from results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import report
from fastrnn.tools.bench import store
from fastrnn.tools.bench.comparison import Row
from tests.support.bench import ROW, entry, results_of, row
from tests.support.paths import ROOT


def test_the_table_shows_losses_with_the_winner() -> None:
    lost = row(entry("fastrnn", "ours", 100.0), entry("JAX", "baseline", 50.0), cell="gru")
    training = replace(ROW, mode="training")
    table = report.table(results_of(ROW, lost, training)).splitlines()
    assert table[2] == (
        "| w (10, 1, 8, 8) | 100 µs, 2× | *100 µs, 0.5× JAX* | – | 100 µs, 3× | – | – |"
    )
    assert "the command" in table[-1] and "2 threads" in table[-1]


def test_the_short_table_has_the_named_rows() -> None:
    results = results_of(ROW, replace(ROW, workload="speech"))
    assert [line.split()[1] for line in report.table(results).splitlines()[2:4]] == ["w", "speech"]
    (row,) = report.table(results, report.SHORT).splitlines()[2:-2]
    assert row.startswith("| speech ")


def test_every_loss_is_listed_the_worst_first() -> None:
    lost = row(entry("fastrnn", "ours", 100.0), entry("JAX", "baseline", 50.0), cell="gru")
    worse = row(
        entry("fastrnn", "ours", 100.0), entry("torch.nn", "baseline", 10.0), mode="training"
    )
    assert report.losses(results_of(ROW, lost, worse)).splitlines()[2:] == [
        "| (10, 1, 8, 8) | LSTM | training | 100 µs | 10 µs, torch.nn | 0.10× |",
        "| (10, 1, 8, 8) | GRU | inference | 100 µs | 50 µs, JAX | 0.50× |",
    ]


def test_the_table_goes_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n{report.END}\n"
    new = report.rewrite(text, "| new \\1 |")
    assert new == f"before\n{report.BEGIN}\n| new \\1 |\n{report.END}\nafter\n{report.END}\n"
    with pytest.raises(ValueError, match="to put the table into"):
        report.rewrite("nothing", "table")


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5 µs"), (43.21, "43.2 µs"), (4766, "4.77 ms"), (2e6, "2 s")]
)
def test_times_in_the_unit_that_reads_best(value: float, text: str) -> None:
    assert report.micros(value) == text


def test_plots_of_the_sweeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        replace(ROW, workload=f"{size}-{n}", group=group, mode=mode, **cast(Any, {size: n}))
        for group, size in report.SWEEPS.items()
        for n in (16, 64)
        for mode in ("inference", "training")
    ]
    assert report.plot(results_of(*rows), tmp_path / "a.svg")
    assert report.plot(results_of(*rows), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert not report.plot(results_of(ROW), tmp_path / "c.svg")


@pytest.mark.parametrize(
    ("page", "rewritten"), [("README.md", report.readme), ("docs/benchmarks.md", report.docs)]
)
def test_pages_have_the_tables_of_the_results(
    page: str, rewritten: Callable[[str, store.Results[Row]], str]
) -> None:
    text = (ROOT / page).read_text()
    folder = report.RESULTS / "amd-epyc-family25-model17-avx512_vnni-2-threads"
    results = store.load(folder / "suite.json")
    assert rewritten(text, results) == text
