"""What a quantised module holds: its `state_dict` has the weights rounded or not."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.support.quantised import (
    CASES,
    FORMATS,
    LIMITS,
    SOME,
    Case,
    assert_equal,
    assert_like,
    by_hand,
    format_of,
    has_kernel,
    in_int8,
    saved,
)
from tests.support.tensors import flatten


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_bfloat16_matrices_become_buffers_of_their_own(weights: str) -> None:
    module: Any = fastrnn.LSTM(5, 7, dtype=torch.bfloat16)
    own = module.weight_ih_l0
    fastrnn.quantize_(module, weights, keep_float=False)
    assert type(module.weight_ih_l0) is Tensor and not module.weight_ih_l0.requires_grad
    x = torch.randn(6, 2, 5, dtype=torch.bfloat16)
    before = module(x)[0]
    with torch.no_grad():
        own.zero_()
    assert_equal(module(x)[0], before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_floats_nothing_of_the_module_changes(case: Case) -> None:
    module = case.layer()
    before, held = copy.deepcopy(module.state_dict()), dict(module.named_parameters())
    fastrnn.quantize_(module)
    assert list(module.state_dict()) == list(before)
    assert_equal(list(module.state_dict().values()), list(before.values()))
    assert not any(p.requires_grad for p in module.parameters())
    x = torch.randn(4, 3, 7)
    assert fastrnn.dequantize_(module) is module
    assert all(p.requires_grad for p in module.parameters())
    assert all(p is held[n] for n, p in module.named_parameters())
    assert "_frozen" not in vars(module)
    module(x)[0].sum().backward()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_floats_a_module_holds_int8(case: Case) -> None:
    module = case.layer()
    floats, names = copy.deepcopy(module.state_dict()), list(module.state_dict())
    module.get_parameter(names[-1]).requires_grad_(False)
    fastrnn.quantize_(module, keep_float=False)
    state = module.state_dict()
    matrices = [n for n in names if re.search("weight_(ih|hh|hr)", n)]
    assert set(state) == set(names) | {f"{n}_scale" for n in matrices}
    assert set(dict(module.named_buffers())) == set(state) - (set(names) - set(matrices))
    for name in matrices:
        numbers, scales = in_int8(floats[name])
        assert_equal([state[name], state[f"{name}_scale"]], [numbers, scales])
    fastrnn.dequantize_(module)
    assert list(module.state_dict()) == names and not list(module.buffers())
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == names[-1:]
    expected = by_hand(case.layer().to(torch.float32))
    expected.load_state_dict(floats)
    assert_equal(list(module.state_dict().values()), list(by_hand(expected).state_dict().values()))


def test_the_state_dict_is_a_quarter_as_large() -> None:
    def size(module: nn.Module) -> int:
        return sum(t.nbytes for t in module.state_dict().values())

    module = fastrnn.LSTM(256, 256)
    before = size(module)
    report = fastrnn.quantize_(module, keep_float=False)
    assert 3.8 < before / size(module) <= 4
    assert report.quantised[0].bytes_before == before
    assert report.quantised[0].bytes_after == size(module)
    fastrnn.quantize_(module, "bfloat16", keep_float=False)
    assert module.weight_hh_l0.dtype == torch.bfloat16
    assert 1.9 < before / size(module) <= 2
    assert not [n for n in module.state_dict() if "scale" in n]


HOLDS: dict[str, dict[str, Any] | None] = {
    "floats": None,
    "int8 and floats": {"keep_float": True},
    "int8": {"keep_float": False},
    "bfloat16": {"weights": "bfloat16", "keep_float": False},
}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("source", HOLDS)
@pytest.mark.parametrize("target", HOLDS)
@pytest.mark.parametrize("case", [CASES[4], CASES[5], Case("LSTMCell")], ids=str)
def test_every_kind_loads_every_state_dict(
    case: Case, source: str, target: str, assign: bool
) -> None:
    one, other = (nn.Sequential(case.layer()) for _ in range(2))
    for module, how in ((one, HOLDS[source]), (other, HOLDS[target])):
        if how is not None:
            fastrnn.quantize_(module, **how)
        module.requires_grad_(False)
    state = one.state_dict()
    names, entries = list(other.state_dict()), dict(state)
    other.load_state_dict(state, assign=assign)
    assert list(other.state_dict()) == names
    assert_equal(list(state.values()), list(entries.values()))
    expected = fastrnn.dequantize_(copy.deepcopy(one))[0]
    if target == "bfloat16":
        expected = by_hand(expected, "bfloat16")
    elif target != "floats":
        expected = by_hand(expected)
    x = torch.randn(5, 3, 7) if case.kind == "LSTM" else torch.randn(3, 7)
    format = "bfloat16" if target == "bfloat16" else "int8"
    for a, b in zip(flatten(other(x)), flatten(expected(x)), strict=True):
        # Scales that are computed again may differ in the last bit.
        limit = LIMITS[format] if has_kernel(format) else 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=limit)


def test_state_dicts_that_do_not_fit() -> None:
    module = fastrnn.GRU(3, 4)
    fastrnn.quantize_(module, keep_float=False)
    state = module.state_dict()
    del state["weight_hh_l0_scale"]
    for target in (module, fastrnn.GRU(3, 4)):
        with pytest.raises(RuntimeError, match="weight_hh_l0_scale"):
            target.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        module.load_state_dict(fastrnn.GRU(3, 5).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected.*weight_ih_l0_scale"):
        plain = fastrnn.GRU(3, 4)
        plain.load_state_dict({**plain.state_dict(), "weight_ih_l0_scale": torch.ones(12)})


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("case", [*SOME, Case("GRUCell")], ids=str)
def test_copies_give_the_same_numbers(case: Case, how: dict[str, Any], keep_float: bool) -> None:
    module = case.layer()
    fastrnn.quantize_(module, **how, keep_float=keep_float)
    x = torch.randn(3, 7) if case.kind == "GRUCell" else torch.randn(4, 3, 7)
    expected = module(x)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved(module))
    for other in (*copies, copy.copy(module)):
        assert_equal(other(x), expected)
        assert list(other.state_dict()) == list(module.state_dict())
    again = fastrnn.dequantize_(copies[0])
    assert all(p.requires_grad for p in again.parameters())
    assert_equal(module.share_memory()(x), expected)


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_rounded_weights_stay_what_they_are(case: Case, weights: str) -> None:
    module = case.layer()
    fastrnn.quantize_(module, weights, keep_float=False)
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    x = torch.randn(4, 3, 7)
    expected = module(x)
    for change in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()):
        change(module)
        for name, buffer in module.named_buffers():
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])
        dtype = module._frozen.precision.dtype
        assert {p.dtype for p in module.parameters()} <= {dtype}
        y, _ = module(x.to(dtype))
        assert y.dtype == dtype
    module.float()
    for one, other in zip(flatten(module(x)), flatten(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2)  # biases were bfloat16 once


@pytest.mark.parametrize("case", SOME, ids=str)
def test_floats_that_change_their_dtype_are_rounded_anew(case: Case) -> None:
    module = case.layer()
    fastrnn.quantize_(module)
    module.bfloat16()
    expected = by_hand(fastrnn.dequantize_(copy.deepcopy(module)))
    x = torch.randn(4, 3, 7, dtype=torch.bfloat16)
    assert_like(module(x), expected(x))
