"""TorchScript of subclasses of our classes, and of replaced modules.

TorchScript must take the same subclasses as of torch.nn: they may inherit a cell's forward or have
their own, but may not call super().
"""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.support.models import SIZES
from tests.support.subclasses import Delegating, flat, made, sample


def heirs(base: type[nn.Module]) -> dict[str, type[nn.Module]]:
    class Inherits(base):  # type: ignore[valid-type, misc]
        pass

    class Adds(base):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.scale = 2.0
            self.out = nn.Linear(7, 2)

        @torch.jit.export
        def twice(self, x: Tensor) -> Tensor:
            return self.scale * x

    class Replaces(base):  # type: ignore[valid-type, misc]
        def forward(self, input: Tensor) -> Tensor:
            return self.helper(input) + self.hidden_size

        def helper(self, x: Tensor) -> Tensor:
            return x * 2

    class Inherits2(Inherits):
        pass

    return {c.__name__: c for c in (Inherits, Adds, Replaces, Inherits2)}


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def scripted(module: nn.Module) -> Any:
    """The scripted module after saving and loading, so that no Python is left in it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("heir", ["Inherits", "Adds", "Replaces", "Inherits2"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_script_of_a_subclass(name: str, heir: str) -> None:
    module = heirs(getattr(fastrnn, name))[heir](*SIZES)
    expected = flat(module(sample(module)))
    loaded = scripted(Holder(module))
    assert "fastrnn" not in re.sub("#.*", "", str(loaded.inlined_graph))  # of paths
    torch.testing.assert_close(flat(loaded(sample(module))), expected, atol=1e-6, rtol=1e-5)
    assert loaded.inner.state_dict().keys() == module.state_dict().keys()
    if heir == "Adds":
        assert loaded.inner.twice(torch.ones(1)) == 2


@pytest.mark.parametrize("heir", ["Inherits", "Adds", "Replaces"])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_script_of_a_subclass_by_itself(name: str, heir: str) -> None:
    ours, theirs = (heirs(getattr(lib, name))[heir](*SIZES) for lib in (fastrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    x = sample(ours)
    torch.testing.assert_close(flat(scripted(ours)(x)), flat(scripted(theirs)(x)))


def test_scripting_leaves_torchs_modules_in_the_model() -> None:
    """docs/drop-in.md warns of this: torch.jit.script itself writes torch's modules back."""
    model = Holder(fastrnn.GRU(*SIZES))
    weight = model.inner.weight_hh_l0
    scripted(model)
    assert type(model.inner) is nn.GRU
    assert model.inner.weight_hh_l0 is weight
    fastrnn.replace_(model)
    assert type(model.inner) is fastrnn.GRU


class CallsSuper(fastrnn.GRUCell):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)


class TorchCallsSuper(nn.GRUCell):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)


@pytest.mark.parametrize("kind", [TorchCallsSuper, CallsSuper])
def test_script_refuses_super_as_for_torchs(kind: type[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match="no attribute or method 'forward'"):
        scripted(kind(*SIZES))


def test_script_of_a_subclass_with_heads_is_refused() -> None:
    class Inherits(fastrnn.GRU):
        pass

    with pytest.raises(TypeError, match=r"torch\.nn has no heads"):
        scripted(Holder(Inherits(4, 8, heads=2)))


def test_script_of_a_replaced_subclass_is_that_of_the_class_it_had() -> None:
    kind = heirs(nn.LSTMCell)["Adds"]
    module = kind(*SIZES)
    original = copy.deepcopy(module)
    fastrnn.replace_(module, subclasses=True)
    loaded = scripted(Holder(module))
    torch.testing.assert_close(flat(loaded(sample(module))), flat(original(sample(module))))
    assert loaded.inner.twice(torch.ones(1)) == 2


def test_trace_of_a_replaced_subclass() -> None:
    module, original = made(Delegating)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (sample(module),))
    assert "fastrnn::" not in str(traced.inlined_graph)
    x = torch.randn(6, 1, 5)
    torch.testing.assert_close(flat(traced(x)), flat(original(x)), atol=1e-6, rtol=1e-5)
