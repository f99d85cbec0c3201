"""Steps in stages on the CPU: threads that share units, projected outputs, crossed tapes."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrnn import cells, kernels, ops
from fastrnn.compiler.derive import derive
from tests.support.kernels import check, check_tapes, planned
from tests.support.operands import (
    Shape,
    by_reference,
    linear_staged_projectable,
    operands,
    run,
    whole,
)
from tests.support.shared import noisy_staged, normed, staged


@cells.cell(gates="ab", states="hc", params={"each": "unit", "all": "one"})
def linear_staged(u, v, p, h, c):
    """It maps whole numbers to whole numbers: a product of another value, and sums over units."""
    total = (u.a + p.each).sum(-1, keepdim=True)
    c = u.b + v(c - h).b + total * p.all
    return v.a - u.a + c.sum(-1, keepdim=True), c


SHAPES: list[Shape] = [  # T, B, I, H, P: blocks of units, and one more or less
    (1, 1, 3, 1, 1),
    (3, 2, 5, 63, 2),
    (2, 1, 7, 64, 1),
    (3, 4, 2, 65, 1),
    (2, 3, 8, 129, 2),
    (2, 1, 4, 200, 1),
]
SPLITS = [
    {"split_recurrences": a, "split_sequences": b, "split_units": c, "chunk_rows": chunk}
    for a, b, c in [(1, 1, 2), (1, 1, 3), (1, 2, 2), (2, 1, 2), (2, 2, 3)]
    for chunk in (1, 100)
]
ALONE = dict.fromkeys(("split_recurrences", "split_sequences", "split_units"), 1)


@pytest.mark.parametrize("cell", [staged, normed], ids=lambda cell: cell.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(cell: cells.Cell, shape: Shape) -> None:
    for dtype, units in itertools.product((torch.float64, torch.float32), (1, 2)):
        with planned(split_units=units):
            check(cell, operands(cell, *shape, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projected(shape: Shape) -> None:
    steps, batch, inputs, hidden, recurrences = shape
    for projected, units in itertools.product({1, hidden // 2 or 1, hidden, hidden + 9}, (1, 2)):
        for cell, dtype in (
            (normed, torch.float64),
            (normed, torch.float32),
            (cells.get("layer_norm_lstm"), torch.bfloat16),  # it has no maximum that may change
        ):
            if dtype == torch.bfloat16 and hidden == 1:
                continue  # a norm over one unit is a difference of rounding errors
            # The relative error of a state that is one number, perhaps near 0, is luck.
            rows = max(batch, 8) if dtype == torch.bfloat16 and projected == 1 else batch
            sizes = steps, rows, inputs, hidden, recurrences
            with planned(split_units=units):
                check(cell, operands(cell, *sizes, dtype=dtype, projected=projected))


def test_projected_ragged_batches_and_resets() -> None:
    steps, batch = 7, 5
    for extra in (
        {"resets": torch.rand(steps, batch) < 0.3},
        {"lengths": torch.tensor([3, 7, 0, 5, 7])},
    ):
        given = operands(normed, steps, batch, 4, 67, 2, projected=21)
        check(normed, {**given, **extra})


def test_which_cells_may_be_projected() -> None:
    """Those that read the previous output through the recurrent weights alone."""
    assert derive(normed).projectable and derive(linear_staged_projectable).projectable
    assert derive(cells.get("layer_norm_lstm")).projectable
    for cell in (staged, linear_staged, cells.get("layer_norm_gru")):
        assert not derive(cell).projectable, cell.name


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(
    ("cell", "projected"),
    [(linear_staged, None), *((linear_staged_projectable, n) for n in (None, 3, 150))],
    ids=lambda of: getattr(of, "name", of),
)
def test_every_split_of_whole_numbers_is_exact(
    split: dict[str, int], cell: cells.Cell, projected: int | None
) -> None:
    given = operands(cell, 3, 5, 6, 130, 2, torch.float64, projected=projected)
    given = {k: whole(v) for k, v in given.items()}
    given["resets"] = torch.rand(3, 5) < 0.2
    with planned(**split), kernels.use("cpu"):
        ours = run(ops.scan, cell, given)
    for what, right in run(by_reference, cell, given).items():
        assert torch.equal(ours[what], right), what


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(
    ("cell", "projected"),
    [(staged, None), (noisy_staged, None), (normed, None), (normed, 70)],
    ids=lambda of: getattr(of, "name", of),
)
def test_every_split_gives_the_same_bits(
    split: dict[str, int], cell: cells.Cell, projected: int | None
) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = operands(cell, 5, 5, 6, 150, 2, dtype, projected=projected)
        results = []
        for plan in (ALONE | {"chunk_rows": split["chunk_rows"]}, split):
            torch.manual_seed(3)
            with planned(**plan), kernels.use("cpu"):
                results.append(run(ops.scan, cell, given))
        for what, value in results[0].items():
            assert torch.equal(value, results[1][what]), (dtype, what)


@pytest.mark.parametrize("projected", [None, 11])
def test_a_kernel_takes_the_tape_of_another(projected: int | None) -> None:
    check_tapes(normed, projected)
