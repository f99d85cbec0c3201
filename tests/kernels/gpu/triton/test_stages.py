"""Steps in stages in the Triton kernels, in Triton's interpreter: see `test_kernels.py`."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from fastrnn import cells, kernels, ops
from fastrnn.compiler.derive import derive
from fastrnn.kernels.prepare import prepare
from fastrnn.tools.tolerance import largest_error
from tests.support.interpreter import LAYOUTS, WAYS, in_layout, interpreted, residency
from tests.support.kernels import check, check_tapes, planned
from tests.support.operands import (
    EVERY_GRADIENT,
    by_reference,
    linear_staged_projectable,
    operands,
    positional,
    run,
    whole,
    with_every_step,
    with_every_step_by_reference,
)
from tests.support.selection import ALL_TESTS, pairwise
from tests.support.shared import noisy_staged, normed, staged
from tests.support.staged import USERS
from tests.support.tensors import flatten

pytestmark = pytest.mark.interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

CELLS = {cell.name: cell for cell in (staged, noisy_staged.noisy, cells.get("gru_reset_before"))}


@interpreted
@pytest.mark.parametrize(("name", "way", "layout"), pairwise(list(CELLS), WAYS, LAYOUTS))
def test_ragged_batches_resets_and_chunks(name: str, way: str, layout: str) -> None:
    cell, (steps, batch, hidden) = CELLS[name], (3, 5, 17)
    given, exact, flags = in_layout(layout, cell, steps, batch, hidden, 2)
    begins = [torch.randn_like(s) for s in given["s0"]]
    for extra, chunk in (({}, 2 * batch), ({"resets": flags, "reset_states": begins}, 1)):
        fields = residency(way, hidden, 1, torch.float64) | {"chunk_rows": chunk, "batch_tile": 4}
        with planned(**fields), kernels.use("triton"):
            ours = run(with_every_step, cell, {**given, **extra})
        for what, right in run(with_every_step_by_reference, cell, {**exact, **extra}).items():
            assert largest_error(ours[what], right) < 1e-12, (what, chunk)


CLIPPED = {  # the cell, the width of its output, and the way
    "pointwise": (cells.lstm, None, "resident"),
    "pointwise, streamed": (cells.lstm, None, "streamed"),
    "projected": (cells.lstm, 11, "streamed"),
    "stages": (staged, None, "resident"),
    "stages, streamed": (staged, None, "streamed"),
    "stages, projected": (linear_staged_projectable, 11, "streamed"),
}


@interpreted
@pytest.mark.parametrize("name", CLIPPED)
def test_gradients_of_states_are_clipped(name: str) -> None:
    cell, projected, way = CLIPPED[name]
    steps, batch, hidden, limit = 4, 3, 17, 0.75
    given, exact, flags = in_layout("packed", cell, steps, batch, hidden, 2, projected)
    fields = residency(way, hidden, 1, torch.float64) | {"chunk_rows": 2 * batch}
    clipping = cells.clip_grad(cell, limit)
    with planned(**fields), kernels.use("triton"):
        ours = run(with_every_step, clipping, {**given, "resets": flags})
    right = run(with_every_step_by_reference, clipping, {**exact, "resets": flags})
    without = run(with_every_step_by_reference, cell, {**exact, "resets": flags})
    assert largest_error(without["gradient of x 0"], right["gradient of x 0"]) > 0.1
    for what, value in right.items():
        assert largest_error(ours[what], value) < 1e-12, what


@interpreted
@pytest.mark.parametrize(
    ("number", "way"),
    [
        (number, way)
        for number in range(len(USERS))
        for k, way in enumerate(WAYS)
        if ALL_TESTS or (number + k) % 2
    ],
)
def test_every_way_in_which_units_need_each_other(number: int, way: str) -> None:
    cell = USERS[number]
    given = operands(cell, 2, 3, 2, 19)
    fields = residency(way, 19, 1, torch.float64) | {"batch_tile": 4}
    with planned(**fields), kernels.use("triton"):
        ours = run(ops.scan, cell, given)
    for what, right in run(by_reference, cell, given).items():
        if right is None:  # autograd knows that nothing depends on it
            assert not ours[what].any()
        else:
            assert largest_error(ours[what], right) < 1e-11, what


@interpreted
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hidden", [1, 15, 33])
def test_sizes_around_a_tile(hidden: int, way: str) -> None:
    for dtype, batch in ((torch.float32, 3), (torch.float16, 2)):
        if hidden == 1 and dtype == torch.float16:
            continue  # a norm of one unit cancels more digits than there are
        given = operands(staged, 2, batch, 2, hidden, dtype=dtype)
        with planned(**residency(way, hidden, batch, dtype)):
            check(staged, given, "triton")


@interpreted
@pytest.mark.parametrize("hidden", [1, 33])
def test_sizes_around_a_tile_projected(hidden: int) -> None:
    layer_norm = cells.get("layer_norm_lstm")
    for cell, projected, batch, dtype in (
        (normed, (hidden + 1) // 2, 1, torch.float64),
        (layer_norm, (hidden + 1) // 3, 3, torch.float32),  # a single unit is projected to width 0
        (layer_norm, hidden + 18, 2, torch.float16),
    ):
        if hidden == 1 and dtype == torch.float16:
            continue  # a norm of one unit cancels more digits than there are
        given = operands(cell, 2, batch, 2, hidden, dtype=dtype, projected=projected)
        with planned(**residency("streamed", hidden, batch, dtype)):
            check(cell, given, "triton", recompute=hidden == 1)


@interpreted
@pytest.mark.parametrize(
    ("projected", "layout"),
    [row for k, row in enumerate(itertools.product((5, 18), LAYOUTS)) if ALL_TESTS or k % 2],
)
def test_ragged_batches_resets_and_chunks_projected(projected: int, layout: str) -> None:
    cell, (steps, batch, hidden) = normed, (3, 4, 9)
    given, exact, flags = in_layout(layout, cell, steps, batch, hidden, 2, projected)
    resets = {"resets": flags, "reset_states": [torch.randn_like(s) for s in given["s0"]]}
    fields = residency("streamed", hidden, 1, torch.float64) | {"batch_tile": 4}
    for extra, chunk in (({}, 2 * batch), ({"resets": flags}, 99), (resets, 1)):
        with planned(**fields, chunk_rows=chunk), kernels.use("triton"):
            ours = run(with_every_step, cell, {**given, **extra})
        for what, right in run(with_every_step_by_reference, cell, {**exact, **extra}).items():
            assert largest_error(ours[what], right) < 1e-12, (what, chunk)
    with planned(**fields, chunk_rows=1), kernels.use("triton"), torch.no_grad():
        y, states = ops.scan(cell, **{**given, **resets})  # without a tape
    found = [ours["y"], *(ours[f"state {k}"] for k in range(len(states)))]
    assert all(map(torch.equal, [y, *states], found))


@interpreted
@pytest.mark.parametrize("projected", [21, 40])
def test_whole_numbers_are_exact_projected(projected: int) -> None:
    cell = linear_staged_projectable
    given = operands(cell, 3, 6, 6, 37, 2, projected=projected)
    given = {k: whole(v) for k, v in given.items()}
    given["resets"] = torch.rand(3, 6) < 0.2
    fields = residency("streamed", 37, 1, torch.float64) | {"batch_tile": 4}
    with planned(**fields, chunk_rows=12), kernels.use("triton"):
        ours = run(ops.scan, cell, given)
    for what, right in run(by_reference, cell, given).items():
        assert torch.equal(ours[what], right), what


@interpreted
def test_a_kernel_takes_the_tape_of_another_projected() -> None:
    check_tapes(normed, 11, "cpu", "triton", steps=2, batch=2)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "cell", "projected", "way"),
    [
        *itertools.product((torch.float64, torch.float16), [staged], [None], WAYS),
        (torch.float16, cells.get("layer_norm_lstm"), 11, "streamed"),
    ],
    ids=lambda of: getattr(of, "name", str(of)),
)
def test_tapes_are_those_of_the_reference(
    dtype: torch.dtype, cell: cells.Cell, projected: int | None, way: str
) -> None:
    """The results of reductions lie behind the other values of a row, at odd elements too."""
    given = operands(cell, 3, 2, 2, 19, dtype=dtype, projected=projected)
    arguments = positional(prepare(cell), given)
    found = {}
    fields = residency(way, 19, 2, dtype)
    for kernel in ("reference", "triton"):
        with planned(**(fields if kernel == "triton" else {})), kernels.use(kernel):
            found[kernel] = torch.ops.fastrnn.scan(*arguments, tape=True)
    derived = derive(cell)
    count = (len(derived.states) - 1 + len(derived.saved) + (projected is not None)) * 19
    near = 1e-12 if dtype == torch.float64 else 0.02
    one, other = tapes = [found[k][-1].flatten(1) for k in ("reference", "triton")]
    assert largest_error(other[:, :count], one[:, :count].double()) < near
    computed = torch.promote_types(dtype, torch.float32)
    end = count + len(derived.rows) * computed.itemsize // dtype.itemsize
    results = [tape[:, count:end].contiguous().view(computed).double() for tape in tapes]
    assert results[0].count_nonzero() == results[0].numel()
    assert largest_error(results[1], results[0]) < near * results[0].abs().max()
    y, *states, _ = found["reference"]
    output_grads = (torch.randn_like(y), [torch.randn_like(s) for s in flatten(states)])
    gradients = []
    for kernel in ("reference", "triton"):
        with planned(**fields), kernels.use("triton"):
            gradients.append(
                torch.ops.fastrnn.scan_backward(
                    arguments[0], *output_grads, None, *arguments[1:], y, found[kernel][-1],
                    EVERY_GRADIENT,
                )
            )  # fmt: skip
    for one, other in zip(*map(flatten, gradients), strict=True):
        assert largest_error(other, one.double()) < near * (1 + one.double().abs().max())


@interpreted
@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_is_not_finite_stays_alone(way: str) -> None:
    given = operands(staged, 3, 3, 2, 19)
    given["x"][1, 1, 0] = torch.nan
    others = {**given, "x": given["x"][:, [0, 2]], "s0": [s[:, [0, 2]] for s in given["s0"]]}
    fields = residency(way, 19, 1, torch.float64) | {"batch_tile": 4}
    with planned(**fields), kernels.use("triton"), torch.no_grad():
        y, right = ops.scan(staged, **given)[0], ops.scan(staged, **others)[0]
    torch.testing.assert_close(y[:, [0, 2]], right, rtol=1e-12, atol=1e-12)
    assert y[1:, 1].isnan().any()
