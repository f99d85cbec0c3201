"""Fast calls of layers and cells: the numbers of the slow ones, for common operands alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn.nn import functional
from tests.support.names import CELLS, DTYPES, LAYERS
from tests.support.tensors import flatten

MODULES = LAYERS + CELLS
T, B, I, H = 3, 4, 5, 7  # noqa: E741


@contextmanager
def ways() -> Iterator[list[str]]:
    """Which way each call goes."""
    taken: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rnn", "rnn_cell"):
            slow = getattr(functional, name)

            def noted(*args: Any, slow: Callable[..., Any] = slow, **keywords: Any) -> Any:
                taken.append("slow")
                return slow(*args, **keywords)

            patch.setattr(functional, name, noted)
        yield taken


def states(name: str, directions: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    shape = (directions, B, H) if name in LAYERS else (B, H)
    h, c = torch.randn(2, *shape, dtype=dtype)
    return (h, c) if "LSTM" in name else h


def case(name: str, **options: Any) -> tuple[nn.Module, Tensor, Any]:
    module = getattr(fastrnn, name)(I, H, **options)
    x = torch.randn(*([T] if name in LAYERS else []), B, I)
    return module, x, states(name)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_fast_call_of_a_layer_has_the_numbers_of_a_slow_one(
    name: str, bidirectional: bool, dtype: torch.dtype, gradients: bool
) -> None:
    for batch_first in (False, True):
        for bias in (False, True):
            options = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
            layer = getattr(fastrnn, name)(I, H, dtype=dtype, **options)
            x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=dtype)
            for hx in (None, states(name, 1 + bidirectional, dtype)):
                found = []
                with torch.set_grad_enabled(gradients):
                    for slow in (False, True):
                        own = [t.detach().requires_grad_(gradients) for t in (x, *flatten(hx))]
                        given = None
                        if hx is not None:
                            given = tuple(own[1:]) if name == "LSTM" else own[1]
                        with ways() as taken:
                            # The slow way alone has the states of every step.
                            out = layer(own[0], given, return_states=slow)[:2]
                        assert taken == ["slow"] * slow
                        assert type(out[1]) is (tuple if name == "LSTM" else Tensor)
                        leaves = [*own, *layer.parameters()]
                        total: Any = sum(t.sin().sum() for t in flatten(out))
                        grads = torch.autograd.grad(total, leaves) if gradients else ()
                        found.append([*flatten(out), *grads])
                for fast, wanted in zip(*found, strict=True):
                    assert torch.equal(fast, wanted) and fast.stride() == wanted.stride()
                    assert fast.requires_grad == wanted.requires_grad
                    assert fast._is_view() == wanted._is_view()


RICHER: dict[str, Callable[..., nn.Module]] = {
    "parameters": fastrnn.PeepholeLSTM,
    "parameters and stages": fastrnn.LayerNormLSTM,
    "no recurrent weights": lambda *sizes, **k: fastrnn.Recurrent(
        fastrnn.cells.indrnn, *sizes, **k
    ),
    "noise": lambda *sizes, **k: fastrnn.LSTM(*sizes, zoneout=0.3, **k),
    "noise and parameters": lambda *sizes, **k: fastrnn.PeepholeLSTM(*sizes, zoneout=0.3, **k),
}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", RICHER)
def test_a_fast_call_of_a_cell_with_parameters_or_noise(kind: str, bidirectional: bool) -> None:
    layer = RICHER[kind](I, H, bidirectional=bidirectional)
    x = torch.randn(T, B, I, requires_grad=True)
    leaves = [x, *layer.parameters()]
    for training in (True, False):
        layer.train(training)
        found = []
        for slow in (False, True):
            torch.manual_seed(5)
            with ways() as taken:
                y, last = layer(x, return_states=slow)[:2]
            assert taken == ["slow"] * slow
            total: Any = sum(t.sin().sum() for t in (y, *flatten(last)))
            # A call takes one seed from torch's generator, whichever way it goes.
            found.append([y, *flatten(last), *torch.autograd.grad(total, leaves), torch.rand(2)])
        assert all(map(torch.equal, *found))


class Sub(Tensor):
    """A subclass."""


OPERANDS: dict[str, Callable[[Tensor], Any]] = {
    "a subclass": lambda x: x.as_subclass(Sub),
    "a negative view": lambda x: torch.complex(x, -x).conj().imag,
    "no batch": lambda x: x.select(-2, 0),
}
AROUND: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu"),
    "a function mode": lambda: _Functions(),
}


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODULES)
def test_special_operands_go_the_slow_way(name: str) -> None:
    module, x, _ = case(name)
    for make in OPERANDS.values():
        with torch.no_grad(), ways() as taken:
            module(make(x))
        assert taken == ["slow"]
    for around in AROUND.values():
        with torch.no_grad(), around(), ways() as taken:
            module(x)
        assert taken == ["slow"]
    with torch.no_grad(), ways() as taken:
        module(x)
    assert not taken


@pytest.mark.parametrize("name", MODULES)
def test_transforms_go_the_slow_way(name: str) -> None:
    module, x, _ = case(name)
    with ways() as taken:
        vmap(module)(torch.stack([x, x]))
        grad(lambda x: flatten(module(x))[0].sum())(x)
        with forward_ad.dual_level():
            module(forward_ad.make_dual(x, x))
            module(x)
    assert taken == ["slow"] * 4


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODULES)
def test_modes_and_profilers_see_the_operator(name: str) -> None:
    module, x, _ = case(name)
    with torch.no_grad():
        with ways() as taken, _Operators() as mode:
            module(x)
        assert mode.seen == ["fastrnn.scan.default"]
        with ways() as still_taken, torch.profiler.profile() as profile:
            module(x)
    assert "fastrnn::scan" in [event.name for event in profile.events()]
    assert not taken and not still_taken


@pytest.mark.parametrize("name", LAYERS)
def test_a_fast_call_makes_the_checks_of_the_class(name: str) -> None:
    module, x, hx = case(name)
    seen = []

    class Own(type(module)):  # type: ignore[misc]
        def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
            seen.append(input)
            super().check_input(input, batch_sizes)

    own = Own(I, H)
    with ways() as taken:
        own(x)
        own(x, hx)
    assert len(seen) == 2 and all(each is x for each in seen) and not taken
    # Its weights fit the input, so only the layer's own size says that it is wrong.
    own.input_size += 1
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        own(x)
    own.input_size -= 1
    own.hidden_size += 1
    with pytest.raises(RuntimeError, match="Expected hidden"):
        own(x, hx)


def wrong_calls(name: str) -> dict[str, Callable[[nn.Module], Any]]:
    x, hx = torch.randn(T, B, I), states(name)
    tensors = flatten(hx)
    pair = name == "LSTM"
    return {
        "a list of states": lambda layer: layer(x, list(tensors) if pair else hx),
        "an empty sequence": lambda layer: layer(x[:0]),
        "an empty batch": lambda layer: layer(x[:, :0]),
        "four dimensions": lambda layer: layer(x[None]),
        "another dtype": lambda layer: layer(x.double()),
        "a state of another dtype": lambda layer: layer(
            x, tuple(t.double() for t in tensors) if pair else hx.double()
        ),
        "a state of another batch": lambda layer: layer(
            x, tuple(t[:, :2] for t in tensors) if pair else hx[:, :2]
        ),
        "a state without directions": lambda layer: layer(
            x, tuple(t[0] for t in tensors) if pair else hx[0]
        ),
        "other features": lambda layer: layer(x[..., :2]),
        "another device": lambda layer: layer(x.to("meta")),
        "no tensor": lambda layer: layer([1.0]),
        "no tensor of states": lambda layer: layer(x, 3),
    }


@pytest.mark.parametrize("name", LAYERS)
def test_uncommon_calls_end_as_slow_ones_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = case(name)

    def outcome(call: Callable[[nn.Module], Any]) -> Any:
        try:
            return [t.tolist() for t in flatten(call(layer))]
        except Exception as error:
            return type(error), str(error)

    calls = wrong_calls(name)
    found = {what: outcome(call) for what, call in calls.items()}
    monkeypatch.setattr(fastrnn.ops, "layer", lambda *_: None)
    assert found == {what: outcome(call) for what, call in calls.items()}


class _Counted(nn.Module):
    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * 2


@pytest.mark.parametrize("name", MODULES)
def test_a_parametrized_weight_is_computed_once(name: str) -> None:
    module, x, _ = case(name)
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    counted = _Counted()
    parametrize.register_parametrization(module, weight, counted)
    for around in (nullcontext(), torch.autocast("cpu")):  # a fast call and a slow one
        before = counted.calls
        with around:
            module(x)
        assert counted.calls == before + 1


@pytest.mark.parametrize("name", MODULES)
def test_frozen_modules_take_fast_calls(name: str) -> None:
    module, x, hx = case(name)
    with torch.no_grad():
        wanted = flatten(module(x, hx))
        fastrnn.freeze(module)
        with ways() as taken:
            found = flatten(module(x, hx))
    assert not taken
    assert all(map(torch.equal, found, wanted))
    with pytest.raises(RuntimeError, match="frozen and has no derivative"):
        module(x.requires_grad_(), hx)
