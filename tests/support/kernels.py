"""Compares a kernel with the reference, under plans of the test's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastrnn import _C, cells, kernels, ops, plan
from tests.support.operands import by_reference, converted, doubled, run
from tests.support.tolerance import assert_near, name_of


def check(
    cell: cells.Cell,
    given: dict[str, Any],
    kernel: str = "cpu",
    baseline: torch.dtype | None = None,
    recompute: bool = False,
) -> None:
    """The tolerance rule, with the reference as the baseline: in the same dtype, or in `baseline`,
    which has as many digits as the kernel computes with."""
    with kernels.use(kernel):
        ours = run(partial(ops.scan, recompute=recompute), cell, given)
    dtype = given["x"].dtype
    baseline = baseline or dtype
    theirs = run(by_reference, cell, converted(given, baseline))
    exact = run(by_reference, cell, doubled(given))
    assert_near(ours, theirs, exact, dtype, name_of(baseline))


def with_row_group(
    problem: plan.Problem, config: plan.CudaConfig, device: plan.Device
) -> plan.CudaConfig:
    """The configuration with the row group that a plan chooses for it."""
    if config.residency == "step":
        return replace(config, row_group=0)
    assert isinstance(device.cuda, plan.CudaFacts)
    units = plan.cuda.row_group(problem, config, device.cuda.tables)
    return replace(config, row_group=units)


@contextmanager
def planned(**changes: Any) -> Iterator[None]:
    """Changes these fields in every plan or in its configuration."""
    choose = plan.choose
    outer = {name: changes.pop(name) for name in ("chunk_rows",) if name in changes}

    def chosen(problem: plan.Problem, device: plan.Device) -> plan.Plan:
        made = choose(problem, device)
        if made.config is None:
            return made
        config = replace(made.config, **changes)
        if isinstance(config, plan.CudaConfig):
            config = with_row_group(problem, config, device)
        return replace(made, config=config, **outer)

    plan.choose = chosen
    _C.forget_plans()
    try:
        yield
    finally:
        plan.choose = choose
        _C.forget_plans()
