"""The results on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastrnn.tools.bench import measure, store
from fastrnn.tools.bench.comparison import Row, Verdict
from fastrnn.tools.bench.workload import PEAK
from tests.support.bench import MACHINE, ROW


def test_results_survive_being_stored(tmp_path: Path) -> None:
    delayed = replace(ROW.ours, latency=measure.Latency(1.0, 2.0, 3.0, 4), kernels=("gemm",))
    kept = replace(
        ROW,
        entries=(delayed, *ROW.entries[1:]),
        refused={"JAX": "not installed"},
        verdicts=(Verdict(PEAK, 0.95, None, "not measured"),),
    )
    conditions = store.conditions(MACHINE, "python -m pytest benchmarks")
    results = store.Results((conditions,), ((kept, 0),))
    store.save(results, tmp_path / "machine" / "suite.json")
    assert store.load(tmp_path / "machine" / "suite.json") == results
    assert store.load(tmp_path / "none.json").rows == ()


def test_a_later_run_replaces_its_rows_only() -> None:
    first, second = (store.conditions(MACHINE, command) for command in ("first", "second"))
    other = replace(ROW, workload="v")
    results = store.merge(store.Results((), ()), first, [ROW, other], ["v", "w"])
    assert [(r.workload, n) for r, n in results.rows] == [("v", 0), ("w", 0)]
    later = replace(ROW, roofline=11.0)
    results = store.merge(results, second, [later], ["v", "w"])
    assert results.rows == ((other, 0), (later, 1))
    results = store.merge(results, second, [other], ["v", "w"])
    assert [run.command for run in results.runs] == ["second", "second"]


def test_each_row_is_written_at_once_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "machine" / "rows.json"
    other = replace(ROW, workload="v")
    for command, rows in (("first", [ROW, other]), ("second", [ROW])):
        run = store.conditions(MACHINE, command)
        kept = store.Kept(path, run, ["v", "w"], Row.from_json)
        for row in rows:
            kept.keep(row)
            assert row in [found for found, _ in store.load(path).rows]
    assert [run.command for run in store.load(path).runs] == ["first", "second"]
    assert [row.workload for row, _ in store.load(path).rows] == ["v", "w"]


def test_a_command_can_be_pasted() -> None:
    words = ["--save", "--only", "a b", "--save", "--only", "--saved"]
    assert store.command("m.n", words) == "python -m m.n --save --only 'a b' --only --saved"


def test_pages_name_the_threads_of_torch(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert store.folder(tmp_path).name.endswith("-1-thread")
        assert ", 1 thread;" in store.made_by("python -m benchmarks.cells")
    finally:
        torch.set_num_threads(before)
    assert ", two of them;" in store.made_by("python -m benchmarks.slots", "two of them")
