"""Fast calls of layers and cells: the numbers of the slow ones, for common operands alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import fastrnn
from tests.support.names import CELLS, DTYPES, LAYERS
from tests.support.tensors import flatten
from tests.support.ways import (
    INPUTS,
    READS,
    STACKS,
    B,
    H,
    I,
    Operators,
    T,
    check_both_ways,
    outcome,
    slowly,
    stacked,
    states,
    ways,
    wrong_calls,
)

MODULES = LAYERS + CELLS


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


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, o) for name in LAYERS for o in STACKS if name == "LSTM" or "projected" not in o],
)
def test_a_fast_call_of_a_stack_has_the_numbers_of_a_slow_one(
    name: str, options: str, kind: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, call, (x, *hx) = stacked(name, kind, STACKS[options], dtype)
        for training in (True, False):
            layer.train(training)
            for given in ([], hx):
                check_both_ways(layer, call, [x, *given], gradients=False)
                leaves = [t.clone().requires_grad_() for t in (x, *given)]
                check_both_ways(layer, call, leaves)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("wanted", ["x", "hx", "weights", "the second layer", "no second layer"])
def test_some_operands_of_a_stack_have_gradients(wanted: str, kind: str) -> None:
    layer, call, (x, *hx) = stacked("LSTM", kind, {"num_layers": 2}, torch.float32)
    for name, parameter in layer.named_parameters():
        second = "_l1" in name
        parameter.requires_grad_(
            wanted == "weights" or ("second" in wanted and second == ("no" not in wanted))
        )
    x.requires_grad_(wanted == "x")
    hx[0].requires_grad_(wanted == "hx")
    check_both_ways(layer, call, [x, *hx])
    check_both_ways(layer, call, [x] if wanted != "hx" else [x, *hx])


@pytest.mark.parametrize("kind", INPUTS)
def test_gradients_of_gradients_of_a_stack(kind: str) -> None:
    layer, call, inputs = stacked("GRU", kind, {"num_layers": 2}, torch.float64)
    found = []
    for way in (nullcontext, slowly):
        own = [t.clone().requires_grad_() for t in inputs]
        leaves = [*own, *layer.parameters()]
        with way():
            total: Any = sum(t.sin().sum() for t in flatten(call(*own)))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        again: Any = sum(g.cos().sum() for g in first)
        found.append([*first, *torch.autograd.grad(again, leaves)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("changed", ["x", "hx", "a weight", "the output"])
@pytest.mark.parametrize("options", ["two", "a stack of heads"])
def test_a_change_in_place_before_the_backward_pass(options: str, changed: str, kind: str) -> None:
    found: list[Any] = []
    for way in (nullcontext, slowly):
        torch.manual_seed(3)
        layer, call, (x, hx) = stacked("RNN", kind, STACKS[options], torch.float32)
        with way():
            out = call(x, hx)
        y, last = flatten(out)
        total = y.sin().sum() + last.sin().sum()
        place = {"x": x, "hx": hx, "a weight": layer.weight_hh_l1, "the output": y}[changed]
        with torch.no_grad():
            place.mul_(2.0)
        try:
            found.append([g.tolist() for g in torch.autograd.grad(total, [*layer.parameters()])])
        except RuntimeError as error:
            assert "inplace" in str(error)
            found.append(str(error).partition("[")[0])
    assert found[0] == found[1]


RICHER: dict[str, Callable[..., nn.Module]] = {
    "parameters": fastrnn.PeepholeLSTM,
    "parameters and stages": fastrnn.LayerNormLSTM,
    "no recurrent weights": lambda *sizes, **k: fastrnn.Recurrent(
        fastrnn.cells.indrnn, *sizes, **k
    ),
    "noise": lambda *sizes, **k: fastrnn.LSTM(*sizes, zoneout=0.3, **k),
    "noise and parameters": lambda *sizes, **k: fastrnn.PeepholeLSTM(*sizes, zoneout=0.3, **k),
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", RICHER)
def test_a_fast_call_of_a_cell_with_parameters_or_noise(
    kind: str, bidirectional: bool, layers: int
) -> None:
    layer = RICHER[kind](I, H, num_layers=layers, bidirectional=bidirectional)
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
            # A layer takes one seed from torch's generator, whichever way it goes.
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
def test_other_devices_go_the_slow_way(name: str) -> None:
    module, x, hx = case(name)
    with ways() as taken:
        out = flatten(module.to("meta")(x.to("meta")))
    assert taken == ["slow"]
    assert out[0].shape == (*x.shape[:-1], H) and out[0].is_meta
    with pytest.raises(RuntimeError, match="not at the same device"):
        module(x.to("meta"), hx)


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


@pytest.mark.parametrize("name", MODULES)
def test_modes_and_profilers_see_the_operator(name: str) -> None:
    module, x, _ = case(name)
    with torch.no_grad():
        with ways() as taken, Operators() as mode:
            module(x)
        assert mode.seen == ["fastrnn.scan.default"]
        with ways() as still_taken, torch.profiler.profile() as profile:
            module(x)
    assert "fastrnn::scan" in [event.name for event in profile.events()]
    assert not taken and not still_taken


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("options", ["two directions", "projected", "noise and dropout", "heads"])
def test_modes_see_the_operators_of_a_stack(options: str, kind: str) -> None:
    layer, call, inputs = stacked("LSTM", kind, STACKS[options], torch.float32)
    seen = []
    for way in (nullcontext, slowly):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients), way(), Operators() as mode:
                call(*inputs)
                call(inputs[0])
            seen.append(sorted(name for name in mode.seen if name not in READS))
    assert seen[0] == seen[2] and seen[1] == seen[3]
    assert seen[0].count("fastrnn.scan.default") == 2 * layer.num_layers


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


@pytest.mark.parametrize("name", LAYERS)
def test_uncommon_calls_end_as_slow_ones_do(name: str) -> None:
    calls = wrong_calls(name)
    stack = {"num_layers": 2}
    for options in ({}, stack, {**stack, "bidirectional": True}, {"heads": 7}):
        layer, _, _ = case(name, **options)
        found = {what: outcome(call, layer) for what, call in calls.items()}
        with slowly():
            assert found == {what: outcome(call, layer) for what, call in calls.items()}


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


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("options", ["two directions", "a projected stack", "projected", "heads"])
def test_frozen_stacks_take_fast_calls(options: str, kind: str) -> None:
    layer, call, (x, *hx) = stacked("LSTM", kind, STACKS[options], torch.float32)
    for given in ([], hx):
        fastrnn.unfreeze(layer)
        with torch.no_grad():
            wanted = flatten(call(x, *given))
            fastrnn.freeze(layer)
            check_both_ways(layer, call, [x, *given], gradients=False)
            assert all(map(torch.equal, flatten(call(x, *given)), wanted))
        for leaf in (x, *given):
            leaf.requires_grad_()
            with pytest.raises(RuntimeError, match="frozen and has no derivative"):
                call(x, *given)
            leaf.requires_grad_(False)
    fastrnn.quantize_(layer)
    check_both_ways(layer, call, [x, *hx], gradients=False)
    fastrnn.dequantize_(layer)
    fastrnn.freeze(layer)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="of a frozen layer were changed"):
            call(x, *hx)
