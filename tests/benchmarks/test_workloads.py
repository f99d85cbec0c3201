"""The workloads of the suite."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import report, workloads
from fastrnn.tools.bench import comparison
from fastrnn.tools.bench.implementation import Case
from fastrnn.tools.bench.workload import BEST_BASELINE, MICROSECONDS, PEAK


def test_denormal_states() -> None:
    (work,) = (w for w in workloads.WORKLOADS if w.name == "denormal")
    case = Case.build(replace(work, steps=3), "lstm", "inference", 1)
    output, _ = case.module(case.x)
    tiny = torch.finfo(torch.float32).tiny
    assert 0 < output.abs().max() < tiny


def test_workloads_are_named_once_and_their_targets_can_be_measured() -> None:
    names = [w.name for w in workloads.WORKLOADS]
    assert len(names) == len(set(names))
    baselines = {r.name for r in comparison.BASELINES["cpu"]}
    for work in (*workloads.WORKLOADS, *workloads.SMOKE):
        assert set(work.baselines) <= baselines
        ours = {v.name for v in work.variants} | {comparison.ONE_THREAD.name}
        for target in work.targets:
            assert target.mode in work.modes
            assert target.against in {BEST_BASELINE, PEAK, MICROSECONDS} | baselines | ours
        for variant in work.variants:
            work.changed(variant.changes)


def test_the_dense_twin_of_the_packed_batch_has_as_many_rows() -> None:
    (packed,) = workloads.PACKED
    (variant,) = packed.variants
    assert packed.changed(variant.changes).rows == packed.rows


def test_the_short_table_names_workloads_that_exist() -> None:
    assert set(report.SHORT) <= {workload.name for workload in workloads.WORKLOADS}
    assert len(report.SHORT) == 5
