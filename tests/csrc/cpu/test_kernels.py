"""The CPU kernel against the reference: values, gradients of every input, crossed tapes."""

from __future__ import annotations

import pytest
import torch

from fastrnn import cells, kernels, ops, plan
from fastrnn.tools.tolerance import largest_error
from tests.support.kernels import check, check_tapes, planned
from tests.support.names import BUILT_IN, LONG
from tests.support.operands import (
    PLAIN,
    PROJECTED,
    ROWS,
    Shape,
    by_reference,
    operands,
    run,
    whole,
)
from tests.support.reruns import for_other_instruction_sets, run_again
from tests.support.tensors import flatten

SHAPES = [  # T, B, I, H, P: 1, primes, near vectors of 2 to 16 lanes and tiles of up to 6 rows
    (1, 1, 1, 1, 1),
    (1, 1, 3, 5, 2),
    (1, 4, 16, 16, 1),
    (2, 3, 1, 17, 1),
    (3, 6, 8, 15, 2),
    (5, 7, 5, 31, 1),
    (4, 13, 7, 33, 2),
    (7, 1, 64, 64, 1),
    (3, 12, 20, 65, 1),
    (6, 2, 2, 130, 1),
    (2, 5, 0, 3, 1),
]


@pytest.mark.parametrize("name", [*BUILT_IN, *ROWS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(name: str, shape: Shape) -> None:
    for dtype in (torch.float64, torch.float32):
        check(cells.get(name), operands(cells.get(name), *shape, dtype=dtype))


@pytest.mark.parametrize("name", [*BUILT_IN, *ROWS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    for shape in [(1, 1, 3, 5, 2), (5, 7, 5, 33, 1), (9, 2, 16, 40, 2)]:
        check(cells.get(name), operands(cells.get(name), *shape, dtype=dtype))


@pytest.mark.parametrize("name", [name for name, _ in PROJECTED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_projected(name: str, shape: Shape) -> None:
    cell, hidden = cells.get(name), shape[3]
    for projected, dtype in [
        ((hidden + 1) // 2, torch.float64),
        ((hidden + 1) // 3, torch.float32),
        (hidden + 18, torch.float32),
        ((hidden + 1) // 2, torch.bfloat16),
        ((hidden + 1) // 2, torch.float16),
    ]:
        check(cell, operands(cell, *shape, dtype=dtype, projected=projected))


def test_no_units_project_to_zeros() -> None:
    with kernels.use("cpu"):
        found = run(
            ops.scan, cells.get("lstm"), operands(cells.get("lstm"), 4, 3, 2, 0, projected=5)
        )
    for what in ("y", "state 0", "gradient of x 0", "gradient of s0 0"):
        assert not found[what].any(), what


def test_a_cell_that_reads_its_output_is_not_projected() -> None:
    gru = cells.get("gru")
    given = operands(gru, 3, 2, 4, 5, projected=5)
    with kernels.use("cpu"), pytest.raises(plan.KernelRefused, match="'gru' reads state 0"):
        ops.scan(gru, **given)
    for ours, right in zip(
        flatten(ops.scan(gru, **given)), flatten(by_reference(gru, **given)), strict=True
    ):
        assert torch.equal(ours, right)


@pytest.mark.parametrize(("name", "projected"), PLAIN + PROJECTED)
def test_no_bias_and_no_initial_state(name: str, projected: int | None) -> None:
    cell = cells.get(name)
    given = operands(cell, 4, 3, 5, 18, recurrences=2, bias=False, projected=projected)
    check(cell, given)
    check(cell, {**given, "s0": []})


@pytest.mark.parametrize(("name", "projected"), PLAIN + PROJECTED)
@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_ragged_batches_and_resets(name: str, projected: int | None, layout: str) -> None:
    cell = cells.get(name)
    for steps, batch, hidden, recurrences in [(1, 2, 3, 1), (5, 7, 17, 2), (9, 13, 33, 1)]:
        given = operands(cell, steps, batch, 4, hidden, recurrences, projected=projected)
        lengths = torch.randint(0, steps + 1, (batch,))
        lengths[torch.randint(0, batch, ())] = steps
        shape: tuple[int, ...] = (steps, batch)
        if layout == "lengths":
            given["lengths"] = lengths
            given["x"][torch.arange(steps)[:, None] >= lengths] = torch.nan  # must not be read
            exact = {**given, "x": given["x"].nan_to_num()}
        else:
            lengths = lengths.clamp_min(1).sort(descending=True).values
            given["batch_sizes"] = (lengths > torch.arange(steps)[:, None]).sum(1)
            given["x"] = torch.randn(int(lengths.sum()), 4, dtype=torch.float64)
            shape = given["x"].shape[:1]
            exact = given
        for resets in (None, torch.rand(shape) < 0.3, torch.ones(shape, dtype=torch.bool)):
            for operand in (given, exact):
                operand["resets"] = resets
            with kernels.use("cpu"):
                ours = run(ops.scan, cell, given)
            for what, right in run(by_reference, cell, exact).items():
                assert largest_error(ours[what], right) < 1e-12, (what, resets)


SPLITS = [
    {
        "split_recurrences": recurrences,
        "split_sequences": sequences,
        "split_units": units,
        "chunk_rows": chunk,
    }
    for recurrences, sequences, units in [
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
        (1, 3, 1),
        (2, 2, 2),
    ]
    for chunk in (1, 12, 100)
]


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(
    ("name", "projected"),
    [
        *((name, None) for name in ("linear", *ROWS)),
        *(("linear_projectable", n) for n in (3, 35, 81)),
    ],
)
def test_every_split_is_exact(split: dict[str, int], name: str, projected: int | None) -> None:
    cell = cells.get(name)
    for weights in plan.WEIGHT_LAYOUTS:
        for dtype in (torch.float32, torch.float64):
            given = operands(cell, 7, 5, 6, 67, 2, dtype, projected=projected)
            given = {k: whole(v) for k, v in given.items()}
            given["resets"] = torch.rand(7, 5) < 0.1
            with planned(**split, weights=weights), kernels.use("cpu"):
                ours = run(ops.scan, cell, given)
            for what, right in run(by_reference, cell, given).items():
                assert torch.equal(ours[what], right), what


@pytest.mark.parametrize("name", ["linear", *ROWS])
@pytest.mark.parametrize("shape", [(3, *shape[1:]) for shape in SHAPES], ids=str)
def test_linear_cell_is_exact(name: str, shape: Shape) -> None:
    cell = cells.get(name)
    given = {k: whole(v) for k, v in operands(cell, *shape, dtype=torch.float32).items()}
    with kernels.use("cpu"):
        ours = run(ops.scan, cell, given)
    for what, right in run(by_reference, cell, given).items():
        assert torch.equal(ours[what], right), what


@pytest.mark.parametrize(("name", "projected"), PLAIN + PROJECTED)
def test_a_kernel_takes_the_tape_of_another(name: str, projected: int | None) -> None:
    check_tapes(cells.get(name), projected)


@pytest.mark.parametrize("name", BUILT_IN)
def test_error_does_not_grow_with_time(name: str) -> None:
    check(cells.get(name), operands(cells.get(name), LONG, 1, 3, 18, dtype=torch.float32))


@pytest.mark.parametrize(("name", "projected"), PLAIN + PROJECTED)
@pytest.mark.parametrize("batch", [1, 5])
def test_bitwise_repeatable(name: str, projected: int | None, batch: int) -> None:
    given = operands(cells.get(name), 50, batch, 40, 70, dtype=torch.float32, projected=projected)
    first, again = (run(ops.scan, cells.get(name), given) for _ in range(2))
    for what, value in first.items():
        assert torch.equal(value, again[what]), what


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_spreads_as_in_torch(name: str, bad: float) -> None:
    cell = cells.get(name)
    for place in ("x", "s0"):
        given = operands(cell, 4, 3, 5, 18, dtype=torch.float32)
        (given[place] if place == "x" else given[place][0])[0, 1, 2] = bad
        with torch.no_grad(), kernels.use("cpu"):
            ours = flatten(ops.scan(cell, **given))
        for a, b in zip(ours, flatten(by_reference(cell, **given)), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_subnormal_numbers_are_flushed_and_the_mode_restored() -> None:
    cell = cells.get("lstm")
    given = operands(cell, 3, 2, 4, 16, dtype=torch.float32)
    given["x"] = given["x"] * 1e-40
    check(cell, given)
    assert (torch.tensor(1e-40) * 0.5).item() != 0


def test_input_of_any_strides_is_not_copied_wrongly() -> None:
    cell = cells.get("gru")
    given = operands(cell, 5, 3, 4, 9)
    plain = run(ops.scan, cell, given)
    x = given["x"]
    wide = torch.randn(5, 3, 8, dtype=x.dtype)
    wide[..., ::2] = x
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        wide[..., ::2],
    ):
        assert not strided.is_contiguous()
        y, _ = ops.scan(cell, **{**given, "x": strided})
        assert torch.equal(y, plain["y"])


@for_other_instruction_sets(25)
def test_other_instruction_sets(isa: str) -> None:
    """Runs the tests above again with the code for an older processor."""
    run_again(isa, __file__)
