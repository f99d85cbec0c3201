"""The CUDA kernels in each residency, in the simulator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fastrnn import _C, cells, kernels, plan
from fastrnn.kernels.gpu import cuda
from tests.support.kernels import with_row_group
from tests.support.operands import by_reference, converted, doubled, run
from tests.support.tolerance import assert_near

PARTS = ["step", "block", "cluster", "grid"]
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "tf32x3": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
RESIDENT = [n for n in PRECISIONS if n not in ("float64", "float32")]
WAYS = {
    "step": [("step", 1)],
    "block": [("block", 1)],
    "cluster": [("cluster", 2), ("cluster", 4), ("cluster", 8)],
    "grid": [("grid", 2), ("grid", 3), ("grid", 7)],
}


def only(precisions: Iterable[str]) -> str:
    """The flag with which the kernels are compiled in these precisions alone."""
    return f"-DFASTRNN_PRECISIONS={sum(1 << cuda.PRECISIONS[name] for name in precisions)}"


def precisions(part: str) -> list[str]:
    return list(PRECISIONS) if part == "step" else RESIDENT


def ways(part: str, hidden: int) -> list[tuple[str, int]]:
    """Residencies and numbers of blocks, such that each block has units."""
    return [(residency, n) for residency, n in WAYS[part] if n <= -(-hidden // 8)] or WAYS[part][:1]


@contextmanager
def running(
    residency: str,
    blocks: int,
    precision: str,
    batch_tile: int = 8,
    chunk_rows: int = 99999,
    row_groups: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Runs the CUDA kernels with these fields in every plan. `row_groups` are those of the forward
    and the backward pass, by default those of the plan."""
    choose = plan.choose

    def chosen(problem: plan.Problem, device: plan.Device) -> plan.Plan:
        made = choose(problem, device)
        if made.kernel != "cuda":
            return made
        config = plan.CudaConfig(
            precision=precision,
            residency=residency,
            batch_tile=batch_tile,
            blocks=blocks,
            warps=8,
            groups=2,
        )
        if row_groups is not None:
            config = replace(config, row_group=row_groups[problem.backward])
        else:
            config = with_row_group(problem, config, device)
        return replace(made, config=config, chunk_rows=chunk_rows)

    plan.choose = chosen
    try:
        with kernels.use("cuda"):
            yield
    finally:
        plan.choose = choose
        _C.forget_plans()


def agrees(
    cell: cells.Cell,
    given: dict[str, Any],
    precision: str,
    ours: dict[str, torch.Tensor],
    exact: dict[str, Any] | None = None,
) -> None:
    """The tolerance rule, with the reference in a dtype of as many digits as the baseline: float16
    for TF32. The references get `exact` in place of `given`, if there is one."""
    exact = given if exact is None else exact
    baseline = exact if precision != "tf32" else converted(exact, torch.float16)
    theirs = run(by_reference, cell, baseline)
    wanted = run(by_reference, cell, doubled(exact))
    assert_near(ours, theirs, wanted, PRECISIONS[precision], precision)


def decided(given: dict[str, Any]) -> None:
    """Turns every unit of rnn_relu on or off for good by its bias, so far from 0 that rounding
    cannot turn it or its gradient. The first two units differ."""
    for bias in given["b_ih"]:
        on = torch.rand(bias.shape) < 0.5
        on[:2] = torch.tensor([True, False])[: len(on)]
        bias.copy_(torch.where(on, 3, -3))
    for weights in given["w_ih"] + given["w_hh"] + given["b_hh"]:
        weights *= 0.2


def ragged(given: dict[str, Any], layout: str) -> dict[str, Any]:
    """Makes sequences end at different steps, unless `layout` is "dense". Returns the operands for
    the references."""
    steps, batch, inputs = given["x"].shape
    lengths = torch.randint(0, steps + 1, (batch,))
    lengths[torch.randint(0, batch, ())] = steps
    if layout == "lengths":
        given["lengths"] = lengths
        given["x"][torch.arange(steps)[:, None] >= lengths] = torch.nan  # must not be read
        return {**given, "x": given["x"].nan_to_num()}
    if layout == "packed":
        lengths = lengths.clamp_min(1).sort(descending=True).values
        given["batch_sizes"] = (lengths > torch.arange(steps)[:, None]).sum(1)
        given["x"] = torch.randn(int(lengths.sum()), inputs, dtype=given["x"].dtype)
    return given
