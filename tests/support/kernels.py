"""A kernel held against the reference, under plans of the test's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastrnn import _C, cells, kernels, ops, plan
from fastrnn.kernels import reference
from tests.support.operands import converted, doubled, run
from tests.support.tolerance import assert_near, name_of


def check(
    cell: cells.Cell,
    given: dict[str, Any],
    kernel: str = "cpu",
    rival: torch.dtype | None = None,
    recompute: bool = False,
) -> None:
    """The tolerance rule, with the reference as the rival: in the same dtype, or in one that has as
    many digits as the kernel computes with."""
    with kernels.use(kernel):
        ours = run(partial(ops.scan, recompute=recompute), cell, given)
    dtype = given["x"].dtype
    rival = rival or dtype
    theirs = run(reference.scan, cell, converted(given, rival))
    exact = run(reference.scan, cell, doubled(given))
    assert_near(ours, theirs, exact, dtype, name_of(rival))


@contextmanager
def planned(**changes: Any) -> Iterator[None]:
    """Plans with these fields, whatever `plan.choose` says."""
    choose = plan.choose
    plan.choose = lambda problem, device: replace(choose(problem, device), **changes)
    _C.forget_plans()
    try:
        yield
    finally:
        plan.choose = choose
        _C.forget_plans()
