"""`load_state_dict(state, assign=True)`: the entries take the place of the module's own, with their
dtype, as in torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.nn.freeze import Freezable, precision_of
from tests.support.quantised import assert_equal
from tests.support.tensors import flatten

QUANTISED: dict[str, dict[str, Any]] = {
    "int8": {"keep_float": False},
    "int8 with floats": {},
    "bfloat16": {"weights": "bfloat16", "keep_float": False},
    "bfloat16 with floats": {"weights": "bfloat16"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYERS = {
    "LSTM": lambda **more: fastrnn.LSTM(5, 9, bidirectional=True, proj_size=4, **more),
    "GRUCell": lambda **more: fastrnn.GRUCell(5, 9, **more),
}


def made(kind: str, how: str, **more: Any) -> Any:
    layer = LAYERS[kind](**more)
    if how == "frozen":
        fastrnn.freeze(layer)
    elif how != "plain":
        fastrnn.quantize_(layer, **QUANTISED[how])
    return layer


def run(layer: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(layer(x.to(dtype_of(layer))))


def dtype_of(layer: Any) -> torch.dtype:
    """That of input and results."""
    precision = precision_of(layer) if isinstance(layer, Freezable) else None
    return next(layer.parameters()).dtype if precision is None else precision.dtype


@pytest.mark.parametrize("bias", [True, False], ids=["biased", "unbiased"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["plain", "frozen", *QUANTISED])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_becomes_one_of_the_dtype_of_the_checkpoint(
    kind: str, how: str, own: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    for saved in ("plain", "int8", "bfloat16"):
        for dtype in DTYPES:
            if saved != "plain" and dtype == torch.float64:
                continue  # is not quantised
            state = made(kind, saved, dtype=dtype, bias=bias).state_dict()
            layer = made(kind, how, dtype=own, bias=bias)
            layer.load_state_dict(copy.deepcopy(state), assign=True)
            expected = dtype
            if saved != "plain" and not bias:  # numbers in 8 or 16 bits do not tell of another
                expected = own if saved == "int8" else torch.bfloat16
            if how == "bfloat16" and expected == torch.bfloat16 and not bias:
                expected = own  # they may be those of its own checkpoint
            right = made(kind, how, bias=bias)
            right.to(expected).load_state_dict(state)
            assert dtype_of(layer) == expected, (saved, dtype)
            assert_equal(run(layer, x), run(right, x))
            held, wanted = layer.state_dict(), right.state_dict()
            assert {n: t.dtype for n, t in held.items()} == {n: t.dtype for n, t in wanted.items()}
            assert_equal(list(held.values()), list(wanted.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", DTYPES, ids=str)
def test_as_in_torch_nn(own: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = nn.GRU(5, 9, dtype=dtype).state_dict()
    ours, theirs = fastrnn.GRU(5, 9, dtype=own), nn.GRU(5, 9, dtype=own)
    for layer in (ours, theirs):
        layer.load_state_dict(state, assign=True)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert all(p.requires_grad for p in layer.parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name))
        assert parameter.data_ptr() == state[name].data_ptr(), "the tensor itself was assigned"


@pytest.mark.parametrize("how", ["plain", "frozen", *QUANTISED])
def test_biases_of_another_dtype_are_refused_by_the_next_call(how: str) -> None:
    """As in torch.nn. Matrices that the layer rounds anyway have no dtype of their own."""
    torch.manual_seed(0)
    layer, x = made("GRUCell", how), torch.randn(3, 5)
    state = LAYERS["GRUCell"]().state_dict()
    mixed = {n: t.double() if n.startswith("bias") else t for n, t in state.items()}
    layer.load_state_dict(mixed, assign=True)
    if how in ("int8", "bfloat16"):
        assert dtype_of(layer) == torch.float64
        right = made("GRUCell", how).double()
        right.load_state_dict(mixed)
        assert_equal(run(layer, x), run(right, x))
        return
    for dtype in DTYPES:
        with pytest.raises((RuntimeError, ValueError)):
            layer(x.to(dtype))


@pytest.mark.parametrize("how", QUANTISED)
def test_one_bias_of_another_dtype_is_refused(how: str) -> None:
    layer = nn.Sequential(made("GRUCell", how))
    state = {f"0.{n}": t for n, t in LAYERS["GRUCell"]().state_dict().items()}
    state["0.bias_hh"] = state["0.bias_hh"].double()
    with pytest.raises(RuntimeError, match=r"the weights 0\.\* cannot be packed: .*[Dd]ouble"):
        layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("bias", [True, False], ids=["biased", "unbiased"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", QUANTISED)
def test_the_own_checkpoint_changes_nothing(how: str, own: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = made("LSTM", how, dtype=own, bias=bias), torch.randn(3, 5)
    before = run(layer, x)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert dtype_of(layer) == own
    assert_equal(run(layer, x), before)


@pytest.mark.parametrize("how", QUANTISED)
def test_some_entries_leave_the_dtype_to_the_others(how: str) -> None:
    torch.manual_seed(0)
    layer, x = made("GRUCell", how), torch.randn(3, 5)
    matrices = {n: t for n, t in LAYERS["GRUCell"]().state_dict().items() if "bias" not in n}
    layer.load_state_dict(matrices, strict=False, assign=True)
    right = made("GRUCell", how)
    right.load_state_dict({**layer.state_dict(), **matrices})
    assert dtype_of(layer) == torch.float32
    assert_equal(run(layer, x), run(right, x))


def test_parameters_in_a_checkpoint_do_not_take_the_place_of_buffers() -> None:
    torch.manual_seed(0)
    layer = made("GRUCell", "bfloat16")
    other = LAYERS["GRUCell"]().bfloat16()
    layer.load_state_dict(other.state_dict(keep_vars=True), assign=True)
    assert [n for n, _ in layer.named_parameters()] == ["bias_ih", "bias_hh"]
    assert {n for n, _ in layer.named_buffers()} == {"weight_ih", "weight_hh"}
    assert dtype_of(layer) == torch.bfloat16
    x = torch.randn(3, 5)
    fastrnn.quantize_(other, "bfloat16")
    assert_equal(run(layer, x), run(other, x))
