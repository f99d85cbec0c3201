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
from torch.nn.utils.rnn import PackedSequence, pack_sequence
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


@contextmanager
def slowly() -> Iterator[None]:
    """Layers go the slow way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastrnn.ops, "layers", lambda *_: None)
        yield


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


def check_both_ways(
    layer: nn.Module, call: Callable[..., Any], inputs: list[Tensor], gradients: bool = True
) -> None:
    """Whether `call(*inputs)`, which calls `layer`, gives the same results in both ways, of the
    same form, with the same gradients and of the same random numbers."""
    found: list[list[Any]] = []
    with torch.set_grad_enabled(gradients):
        for way in (nullcontext, slowly):
            torch.manual_seed(5)
            own = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
            with ways() as taken, way():
                out = call(*own)
            assert taken == ["slow"] * (way is slowly)
            results = flatten(out)
            leaves = [t for t in (*own, *layer.parameters()) if t.requires_grad]
            total: Any = sum(t.sin().sum() for t in results)
            grads = torch.autograd.grad(total, leaves) if gradients else ()
            found.append([out, *results, *grads, torch.rand(2)])
    (fast_out, *fast), (slow_out, *slow) = found
    assert type(fast_out[0]) is type(slow_out[0]) and type(fast_out[1]) is type(slow_out[1])
    if isinstance(fast_out[0], PackedSequence):
        assert all(map(lambda a, b: a is b, fast_out[0][1:], slow_out[0][1:]))
    for one, other in zip(fast, slow, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
        assert one.requires_grad == other.requires_grad and one._is_view() == other._is_view()


# Arguments of layers, and how many units a head has.
STACKS: dict[str, dict[str, Any]] = {
    "two": {"num_layers": 2},
    "three, without biases": {"num_layers": 3, "bias": False},
    "two directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"num_layers": 2, "batch_first": True},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "all dropped": {"num_layers": 2, "dropout": 1.0},
    "noise and dropout": {"num_layers": 2, "dropout": 0.4, "zoneout": 0.3},
    "recompute": {"num_layers": 2, "bidirectional": True, "recompute": True},
    "one": {},
    "projected": {"proj_size": 2},
    "projected, two directions": {"proj_size": 3, "bidirectional": True, "bias": False},
    "a projected stack": {"num_layers": 3, "bidirectional": True, "proj_size": 2},
    "heads": {"heads": 7, "batch_first": True},
    "a stack of heads": {"num_layers": 2, "bidirectional": True, "heads": 7, "units": 2},
}
INPUTS = ("dense", "packed", "packed in the caller's order", "lengths", "resets")


def stacked(
    name: str, kind: str, options: dict[str, Any], dtype: torch.dtype
) -> tuple[Any, Callable[..., Any], list[Tensor]]:
    """A layer, how it is called on a kind of input, and the input and initial states."""
    hidden = H * options.get("units", 1)
    options = {key: value for key, value in options.items() if key != "units"}
    layer = getattr(fastrnn, name)(I, hidden, dtype=dtype, **options)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or hidden, hidden][: 1 + (name == "LSTM")]
    hx = [torch.randn(count, B, n, dtype=dtype) for n in widths]
    x = torch.randn(*((B, T) if layer.batch_first else (T, B)), I, dtype=dtype)
    keywords: dict[str, Any] = {}
    wrap: Callable[[Tensor], Any] = lambda x: x  # noqa: E731
    if kind == "lengths":
        keywords["lengths"] = torch.tensor([2, 3, 0, 1])
    elif kind == "resets":
        keywords["resets"] = torch.rand(x.shape[:2]) < 0.4
    elif kind != "dense":
        lengths = [2, 3, 1, 3] if "order" in kind else [3, 3, 2, 1]
        sequences = [torch.empty(n, I, dtype=dtype) for n in lengths]
        form = pack_sequence(sequences, enforce_sorted="order" not in kind)
        x = torch.randn_like(form.data)
        wrap = lambda x: form._replace(data=x)  # noqa: E731

    def call(x: Tensor, *states: Tensor) -> Any:
        given: Any = None if not states else states[0] if len(states) == 1 else states
        return layer(wrap(x), given, **keywords)

    return layer, call, [x, *hx]


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


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("options", ["two directions", "projected", "noise and dropout", "heads"])
def test_modes_see_the_operators_of_a_stack(options: str, kind: str) -> None:
    layer, call, inputs = stacked("LSTM", kind, STACKS[options], torch.float32)
    seen = []
    for way in (nullcontext, slowly):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients), way(), _Operators() as mode:
                call(*inputs)
                call(inputs[0])
            # The fast way reads lengths and sizes of batches without an operator.
            reads = ("aten.aminmax.default", "aten._local_scalar_dense.default", "aten.select.int")
            seen.append(sorted(name for name in mode.seen if name not in reads))
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


def wrong_calls(name: str) -> dict[str, Callable[[nn.Module], Any]]:
    x, hx = torch.randn(T, B, I), states(name)
    tensors = flatten(hx)
    packed = pack_sequence([x[:2, 0], x[:1, 1]])
    pair = name == "LSTM"
    return {
        "a list of states": lambda layer: layer(x, list(tensors) if pair else hx),
        "a tuple of states too many": lambda layer: layer(x, (*tensors, tensors[0])),
        "a tuple of one state": lambda layer: layer(x, tensors[:1] if pair else (hx,)),
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
        "packed input of other features": lambda layer: layer(packed._replace(data=x[..., 0, :2])),
        "packed input of another dtype": lambda layer: layer(
            packed._replace(data=x[:, 0].double())
        ),
        "packed input without rows": lambda layer: layer(packed._replace(data=x[:0, 0])),
        "too few rows": lambda layer: layer(packed._replace(data=x[:2, 0])),
        "sizes of steps that grow": lambda layer: layer(
            packed._replace(batch_sizes=torch.tensor([1, 2]))
        ),
        "states of another batch than the packed input": lambda layer: layer(packed, hx),
        "no order of the packed input": lambda layer: layer(
            packed._replace(sorted_indices=torch.tensor([1]), unsorted_indices=torch.tensor([0, 1]))
        ),
        "another order": lambda layer: layer(
            packed._replace(sorted_indices=torch.tensor([1, 2]), unsorted_indices=None)
        ),
        "a list of lengths": lambda layer: layer(x, lengths=[1, 2, 3, 0]),
        "lengths of another dtype": lambda layer: layer(
            x, lengths=torch.tensor([1, 2, 3, 0]).int()
        ),
        "lengths in floats": lambda layer: layer(x, lengths=torch.tensor([1.0, 2, 3, 0])),
        "too long": lambda layer: layer(x, lengths=torch.tensor([1, 2, T + 1, 0])),
        "too short": lambda layer: layer(x, lengths=torch.tensor([1, 2, -1, 0])),
        "too few lengths": lambda layer: layer(x, lengths=torch.tensor([1, 2])),
        "lengths of packed input": lambda layer: layer(packed, lengths=torch.tensor([2, 1])),
        "resets of another shape": lambda layer: layer(x, resets=torch.ones(B, T).bool()),
        "resets of another dtype": lambda layer: layer(x, resets=torch.ones(T, B)),
        "resets of packed input": lambda layer: layer(packed, resets=torch.ones(3).bool()),
        "packed resets": lambda layer: layer(
            packed, resets=packed._replace(data=torch.ones(3).bool())
        ),
        "no tensor": lambda layer: layer([1.0]),
        "no tensor of states": lambda layer: layer(x, 3),
    }


@pytest.mark.parametrize("name", LAYERS)
def test_uncommon_calls_end_as_slow_ones_do(name: str) -> None:
    def outcome(call: Callable[[nn.Module], Any]) -> Any:
        try:
            return [t.tolist() for t in flatten(call(layer))]
        except Exception as error:
            return type(error), str(error)

    calls = wrong_calls(name)
    stack = {"num_layers": 2}
    for options in ({}, stack, {**stack, "bidirectional": True}, {"heads": 7}):
        layer, _, _ = case(name, **options)
        found = {what: outcome(call) for what, call in calls.items()}
        with slowly():
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
