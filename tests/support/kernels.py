"""Compares a kernel with the reference, under plans of the test's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastrnn import _C, cells, kernels, ops, plan
from fastrnn.compiler.derive import derive
from fastrnn.kernels.prepare import prepare
from fastrnn.tools.tolerance import largest_error
from tests.support.operands import (
    EVERY_GRADIENT,
    by_reference,
    converted,
    doubled,
    operands,
    positional,
    run,
)
from tests.support.tensors import flatten
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


def check_tapes(
    cell: cells.Cell,
    projected: int | None,
    one: str = "reference",
    other: str = "cpu",
    steps: int = 6,
    batch: int = 4,
) -> None:
    """Each of two kernels differentiates by the tape of the other."""
    lengths = torch.tensor([steps // 2, steps, 0, steps - 1])[:batch]
    for extra in ({}, {"resets": torch.rand(steps, batch) < 0.3}, {"lengths": lengths}):
        given = {**operands(cell, steps, batch, 3, 19, 2, projected=projected), **extra}
        arguments = positional(prepare(cell), given)
        tapes, gradients = {}, {}
        for kernel in (one, other):
            with kernels.use(kernel):
                tapes[kernel] = flatten(torch.ops.fastrnn.scan(*arguments, tape=True))
        derived = derive(cell)
        values = len(derived.states) - 1 + len(derived.saved) + (projected is not None)
        # Results of reductions do not fill their part of the tape.
        used = values * 19 + len(derived.rows)
        (*rights, right_tape), (*results, tape) = tapes[one], tapes[other]
        assert tape.shape == right_tape.shape and used <= tape[0, 0].numel()
        results.append(tape.flatten(2)[..., :used])
        rights.append(right_tape.flatten(2)[..., :used])
        for a, b in zip(results, rights, strict=True):
            assert largest_error(a, b) < 1e-13
        y, *states, _ = tapes[one]
        output_grads = (torch.randn_like(y), [torch.randn_like(s) for s in states])
        for writer, (y, *_, tape) in tapes.items():
            for reader in (one, other):
                with kernels.use(reader):
                    gradients[writer, reader] = torch.ops.fastrnn.scan_backward(
                        arguments[0], *output_grads, None, *arguments[1:], y, tape, EVERY_GRADIENT
                    )
        right = gradients.pop((one, one))
        for pair, ours in gradients.items():
            for k, (a, b) in enumerate(zip(ours, right, strict=True)):
                assert largest_error(a, b) < 1e-12, (pair, k)
