"""Quantised modules give the numbers of their rounded weights where other kernels run: in
transformations, exported, compiled, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import kernels
from tests.support.names import CELLS
from tests.support.quantised import (
    CASES,
    FORMATS,
    Case,
    assert_equal,
    assert_like,
    by_hand,
    format_of,
    has_kernel,
)
from tests.support.tensors import flatten


def test_compiled_code_does_not_take_floats_that_are_not_rounded() -> None:
    module, x = fastrnn.LSTM(5, 7), torch.randn(6, 2, 5)
    fastrnn.quantize_(module)
    compiled = torch.compile(module, backend="aot_eager")
    with kernels.use("reference"):
        if has_kernel("int8"):
            with pytest.raises(RuntimeError, match="asked for by name"):
                compiled(x)
        else:
            compiled(x)
    assert_equal(compiled(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", [FORMATS[0], FORMATS[2]], ids=format_of)
def test_where_another_kernel_runs_rounded_weights_do(
    how: dict[str, Any], keep_float: bool
) -> None:
    module: Any = fastrnn.GRU(5, 9, num_layers=2).requires_grad_(False)
    x = torch.randn(4, 3, 5)

    def within(context: Any, m: nn.Module) -> Any:
        with context:
            return m(x)

    calls: list[Callable[[Any], Any]] = [
        lambda m: torch.func.vmap(m, 1)(x.unsqueeze(1)),
        lambda m: torch.func.jvp(lambda x: m(x)[0], (x,), (x,)),
        lambda m: torch.export.export(m, (x,)).module()(x),
        lambda m: torch.export.export(m, (x,), strict=True).module()(x),
        lambda m: within(torch.autocast("cpu", torch.bfloat16), m),
        lambda m: within(kernels.use("reference"), m),
        lambda m: torch.jit.trace(m, (x,))(x),
        lambda m: torch.jit.script(nn.Sequential(m))(x),
    ]
    expected = by_hand(module, how["weights"])
    before = [call(expected) for call in calls]
    fastrnn.quantize_(module, **how, keep_float=keep_float)
    for call, theirs in zip(calls, before, strict=True):
        for one, other in zip(flatten(call(module)), flatten(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_where_another_kernel_runs_a_cell_has_rounded_weights(kind: str, keep_float: bool) -> None:
    cell = getattr(fastrnn, kind)(5, 9).requires_grad_(False)
    x = torch.randn(3, 5)

    def within(context: Any, m: nn.Module) -> Any:
        with context:
            return m(x)

    calls: list[Callable[[Any], Any]] = [
        lambda m: torch.func.vmap(m)(x.unsqueeze(1)),
        lambda m: torch.export.export(m, (x,)).module()(x),
        lambda m: within(torch.autocast("cpu", torch.bfloat16), m),
        lambda m: within(kernels.use("reference"), m),
        lambda m: torch.jit.trace(m, (x,))(x),
    ]
    expected = by_hand(cell)
    before = [call(expected) for call in calls]
    fastrnn.quantize_(cell, keep_float=keep_float)
    for call, theirs in zip(calls, before, strict=True):
        for one, other in zip(flatten(call(cell)), flatten(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Opaque(Tensor):
    """Its views are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_for_a_subclass_of_tensor_rounded_weights_compute(keep_float: bool) -> None:
    module, cell = fastrnn.GRU(5, 9, batch_first=True), fastrnn.GRUCell(5, 9)
    x = torch.randn(4, 3, 5)
    expected = by_hand(module)(x), by_hand(cell)(x[0]), by_hand(cell)(x[0, 0])
    for each in (module, cell):
        fastrnn.quantize_(each, keep_float=keep_float)
    special = x.as_subclass(Opaque)
    results = (
        module(special),
        cell(x[0].as_subclass(Opaque)),
        cell(x[0, 0].as_subclass(Opaque)),
    )
    with torch.device("meta"):
        assert_like(module(x), expected[0])
    for ours, theirs in zip(results, expected, strict=True):
        for one, other in zip(flatten(ours), flatten(theirs), strict=True):
            torch.testing.assert_close(one.as_subclass(Tensor), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_on_another_device_rounded_weights_compute(keep_float: bool) -> None:
    module = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=keep_float)
    y, _ = module.to("meta")(torch.randn(4, 3, 5, device="meta"))
    assert y.shape == (4, 3, 9)
    assert module.bias_hh_l0.is_meta and module.weight_hh_l0.is_meta


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_compiled(keep_float: bool) -> None:
    torch._dynamo.reset()
    module: Any = fastrnn.LSTM(5, 9, num_layers=2, bidirectional=True)
    fastrnn.quantize_(module, keep_float=keep_float)
    x = torch.randn(4, 3, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), module(x))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6], Case("GRUCell")], ids=str)
def test_a_stepper_has_the_numbers_of_the_layer(
    case: Case, how: dict[str, Any], keep_float: bool
) -> None:
    module = case.layer()
    fastrnn.quantize_(module, **how, keep_float=keep_float)
    stepper = module.stream(batch_size=2)
    x = torch.randn(6, 2, 7)
    steps = torch.stack([stepper.step(frame) for frame in x])
    if case.kind == "GRUCell":
        assert_equal(steps[0], module(x[0]))
        return
    y = module(x.transpose(0, 1) if module.batch_first else x)[0]
    assert_equal(steps, y.transpose(0, 1) if module.batch_first else y)
