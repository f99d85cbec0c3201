"""Layers of cells whose step has stages, in every way in which a layer is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import kernels
from tests.support.forms import FORMS, given, with_gradients
from tests.support.kernels import planned
from tests.support.reruns import for_other_instruction_sets, run_again
from tests.support.shared import staged
from tests.support.staged import USERS

F64 = torch.float64


def layer_of(inputs: int = 3, hidden: int = 21, layers: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    return fastrnn.Recurrent(staged, inputs, hidden, layers, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("hidden", "steps", "batch", "options"),
    [
        (1, 3, 2, {}),
        (5, 4, 3, {"bias": False}),
        (16, 6, 1, {}),
        (21, 7, 5, {"num_layers": 2, "bidirectional": True}),
        (33, 5, 9, {}),
        (64, 4, 2, {"heads": 2}),
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_the_reference(
    form: str, hidden: int, steps: int, batch: int, options: dict[str, Any]
) -> None:
    layer = fastrnn.Recurrent(staged, 3, hidden, dtype=F64, **options)
    x, states = given(layer, steps, batch)
    found = []
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel):
            found.append(with_gradients(layer, form, x, states))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.compiles
@pytest.mark.takes(10)
@pytest.mark.parametrize("cell", USERS, ids=lambda c: c.name)
def test_other_cells(cell: fastrnn.Cell) -> None:
    layer: Any = fastrnn.Recurrent(cell, 3, 19, bidirectional=True, dtype=F64)
    x, states = given(layer, 5, 4)
    for form in FORMS:
        found = []
        for kernel in ("cpu", "reference"):
            with kernels.use(kernel):
                found.append(with_gradients(layer, form, x, states))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("chunk_rows", [1, 7, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_threads_and_chunks_change_no_bit(form: str, dtype: torch.dtype, chunk_rows: int) -> None:
    layer = layer_of(3, 33, bidirectional=True, dtype=dtype)
    x, states = given(layer, 9, 6, dtype)
    found = []
    for split in [(1, 1), (2, 1), (1, 2)]:
        parts = dict(zip(("split_recurrences", "split_sequences"), split, strict=True))
        with planned(chunk_rows=chunk_rows, **parts):
            found.append(with_gradients(layer, form, x, states))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_near_to_float(dtype: torch.dtype) -> None:
    layer = layer_of(5, 33).to(dtype)
    x = torch.randn(7, 2, 5).to(dtype)
    double = copy.deepcopy(layer).to(F64)
    y, right = layer(x)[0], double(x.to(F64))[0]
    torch.testing.assert_close(y.to(F64), right, rtol=0, atol=0.03)
    y.sum().backward()
    right.sum().backward()
    for (name, ours), theirs in zip(layer.named_parameters(), double.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        error = (ours.grad.to(F64) - theirs.grad).norm() / (theirs.grad.norm() + 1e-3)
        assert error < 0.1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_has_the_bits_of_inference(dtype: torch.dtype) -> None:
    layer = layer_of(5, 33, 2, dtype=dtype)
    x = torch.randn(7, 3, 5).to(dtype)
    trained = layer(x)[0]
    assert trained.requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x)[0], trained)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16], ids=str)
def test_streams(dtype: torch.dtype, threads: int) -> None:
    # Between layers, a stepper rounds to no 16-bit float.
    layer = layer_of(5, 33, 1 if dtype.itemsize == 2 else 2, dtype=dtype)
    x = torch.randn(7, 2, 5).to(dtype)
    stepper = layer.stream(2, threads=threads)
    with torch.no_grad():
        whole = layer(x)[0]
    assert torch.equal(torch.stack([stepper.step(step) for step in x]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_layers_notice_changes(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    x = torch.randn(5, 2, 3).to(dtype)
    with torch.no_grad():
        before = layer(x)[0]
        fastrnn.freeze(layer)
        assert torch.equal(layer(x)[0], before)
        layer.weight_gain_l0.add_(1)
        with pytest.raises(RuntimeError, match="changed or replaced after freezing"):
            layer(x)
        fastrnn.unfreeze(layer)
        assert not torch.equal(layer(x)[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_gives_the_same_gradients(dtype: torch.dtype) -> None:
    layer = layer_of(5, 33, 2, dtype=dtype)
    x = torch.randn(7, 2, 5).to(dtype)
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        layer.recompute = recompute
        found.append(list(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_double_backward() -> None:
    layer = layer_of(2, 3, dtype=F64)
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


def test_compiled_models() -> None:
    layer = layer_of(3, 9)
    x = torch.randn(4, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        y = module(x)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("hidden", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_a_tape_of_the_reference_serves_the_kernel(dtype: torch.dtype, hidden: int) -> None:
    """Both write the results of a row behind its values, in as many of those as they fill."""
    layer = layer_of(3, hidden, dtype=dtype)
    x = torch.randn(4, 2, 3).to(dtype)
    with kernels.use("reference"):
        y = layer(x)[0]
        right = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    with kernels.use("cpu"):
        ours = torch.autograd.grad(y.sum(), list(layer.parameters()))
    near = {torch.float32: 1e-4, F64: 1e-10, torch.bfloat16: 0.15}[dtype]
    for one, other in zip(ours, right, strict=True):
        assert (one - other).norm() <= near * (1 + other.norm())


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_is_not_finite_stays_alone(dtype: torch.dtype, special: float) -> None:
    layer = layer_of(3, 21, dtype=dtype)
    x = torch.randn(4, 3, 3).to(dtype)
    x[1, 1, 0] = special
    with torch.no_grad():
        y = layer(x)[0]
        right = layer(x[:, [0, 2]])[0]
    assert torch.equal(y[:, [0, 2]], right) and y[1:, 1].isnan().any()


@for_other_instruction_sets(10)
def test_other_instruction_sets(isa: str) -> None:
    """Runs the tests of numbers again with the code for an older processor."""
    run_again(isa, __file__, "-k", "results")
