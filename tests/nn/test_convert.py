"""Conversion from and to modules of torch.nn: shared Parameters, kept attributes, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn import from_torch, to_torch
from tests.support.names import CELLS, LAYERS
from tests.support.weights import hidden_weight, old_weight_norm, parametrized, pruned, weight_norm

F64 = torch.float64
NAMES = LAYERS + CELLS


@pytest.mark.parametrize("name", NAMES)
def test_converted_modules_share_everything(name: str) -> None:
    theirs = getattr(nn, name)(3, 5, bias=False, dtype=F64).eval()
    calls: list[str] = []
    handle = theirs.register_forward_hook(lambda *_: calls.append("hook"))
    theirs.note = "kept"
    ours = from_torch(theirs)
    assert type(ours) is getattr(fastrnn, name)
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not ours.training and ours.note == "kept" and repr(ours) == repr(theirs)
    x = torch.randn(4, 3, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert calls == ["hook", "hook"]
    handle.remove()

    back = to_torch(ours)
    assert type(back) is getattr(nn, name)
    assert list(back.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(back(x), theirs(x))
    assert calls == ["hook", "hook"]
    assert set(vars(back)) == set(vars(theirs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change", [weight_norm, old_weight_norm, pruned, parametrized], ids=lambda f: f.__name__
)
def test_converted_modules_keep_parametrizations(
    name: str, change: Callable[[nn.Module, str], None]
) -> None:
    theirs = getattr(nn, name)(3, 5, dtype=F64)
    change(theirs, hidden_weight(theirs))
    ours = from_torch(theirs)
    assert isinstance(ours, getattr(fastrnn, name))
    back = to_torch(ours)
    x = torch.randn(4, 3, dtype=F64)
    for module in (ours, back):
        assert all(a is b for a, b in zip(module.parameters(), theirs.parameters(), strict=True))
        torch.testing.assert_close(module(x), theirs(x))
        assert list(module.state_dict()) == list(theirs.state_dict())


def test_what_is_not_converted() -> None:
    class Own(nn.LSTM):
        pass

    changed = nn.GRU(3, 5)
    changed.forward = changed.forward  # type: ignore[method-assign]
    for module, reason in (
        (Own(3, 5), "it is none of"),
        (nn.Linear(3, 5), "it is none of"),
        (fastrnn.LSTM(3, 5), "it is none of"),
        (changed, "its forward was replaced on the instance"),
    ):
        with pytest.raises(TypeError, match=reason):
            from_torch(module)
    with pytest.raises(TypeError, match="it is none of"):
        to_torch(nn.LSTM(3, 5))
