"""Fast calls that C++ launches: what tensors on a GPU take from the second call of a shape on.

The tensors here are on the CPU, and a library echoes the operands of its launches in the place of
the CUDA kernels. C++ asks whether it knows the launch before it asks for the device, so this is the
way of a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import _C, plan
from tests.cudasim.build import missing
from tests.support.names import CELLS, LAYERS
from tests.support.tensors import flatten
from tests.support.ways import (
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

if reason := missing():
    pytest.skip(str(reason), allow_module_level=True)

KINDS = ("dense", "packed", "packed in the caller's order", "resets")
OPTIONS = [name for name in STACKS if "projected" not in name and "noise" not in name]
MODES = [torch.no_grad, torch.inference_mode]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[plan.Problem]:
    """The problems for which a plan was made."""
    problems: list[plan.Problem] = []
    choose = plan.choose

    def chosen(problem: plan.Problem, device: plan.Device) -> plan.Plan:
        problems.append(problem)
        return choose(problem, device)

    monkeypatch.setattr(plan, "choose", chosen)
    return problems


def run(mode: Any, call: Callable[..., Any], *given: Any) -> Any:
    torch.manual_seed(5)  # for dropout
    with mode():
        return call(*given)


def elsewhere(mode: Any, call: Callable[..., Any], *given: Any) -> Any:
    """Runs in a thread that has no plans for the CPU, and would ask for those that it needs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, mode, call, *given).result()


def same(one: Any, other: Any) -> bool:
    pairs = zip(flatten(one), flatten(other), strict=True)
    return all(torch.equal(a, b) and a.is_inference() == b.is_inference() for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_inference(
    library: Any,
    in_python: list[str],
    asked: list[plan.Problem],
    name: str,
    options: str,
    kind: str,
) -> None:
    for mode, dtype in zip(MODES, DTYPES, strict=True):
        layer, call, (x, *hx) = stacked(name, kind, STACKS[options], dtype)
        for given in ([], hx):
            first = run(mode, call, x, *given)
            in_python.clear()
            asked.clear()
            with ways() as taken:
                assert same(elsewhere(mode, call, x, *given), first)
            assert not taken and not in_python and not asked
            with slowly(), ways() as taken:
                assert same(run(mode, call, x, *given), first)
            assert taken == ["slow"]
            check_both_ways(layer, call, [x, *given], gradients=False)


@pytest.mark.parametrize("kind", KINDS)
# The library does not echo what it is given to compute a tape again.
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "recompute"])
@pytest.mark.parametrize("name", LAYERS)
def test_training(library: Any, in_python: list[str], name: str, options: str, kind: str) -> None:
    for dtype in DTYPES:
        layer, call, (x, *hx) = stacked(name, kind, STACKS[options], dtype)
        for given in ([], hx):
            leaves = [t.clone().requires_grad_() for t in (x, *given)]
            check_both_ways(layer, call, leaves)
            in_python.clear()
            check_both_ways(layer, call, leaves)
            assert not in_python
            # A layer without gradients below one with them.
            layer.weight_ih_l0.requires_grad_(False)
            check_both_ways(layer, call, [x, *given])
            layer.weight_ih_l0.requires_grad_(True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CELLS)
def test_cells(
    library: Any, in_python: list[str], asked: list[plan.Problem], name: str, mode: Any
) -> None:
    cell, x, hx = getattr(fastrnn, name)(I, H), torch.randn(B, I), states(name)
    for given in (None, hx):
        first = run(mode, cell, x, given)
        in_python.clear()
        asked.clear()
        with ways() as taken:
            assert same(elsewhere(mode, cell, x, given), first)
        assert not taken and not in_python and not asked


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(library: Any, kind: str) -> None:
    library.fastrnn_stub_answer(0, 90, 0)  # no echo: the reference gives second derivatives
    layer, call, inputs = stacked("GRU", kind, {"num_layers": 2}, torch.float64)
    leaves = [t.clone().requires_grad_() for t in inputs] + [*layer.parameters()]

    def second() -> list[Tensor]:
        total: Any = sum(t.sum() for t in flatten(call(*leaves[:2])))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        again: Any = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(again, leaves, allow_unused=True))

    call(*inputs)
    assert len(second()) == len(leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_see_the_operators(library: Any, kind: str) -> None:
    layer, call, inputs = stacked("LSTM", kind, STACKS["two directions"], torch.float32)
    call(*inputs)
    call(inputs[0])
    seen = []
    for way in (nullcontext, slowly):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients), way(), Operators() as mode, ways() as taken:
                call(*inputs)
                call(inputs[0])
            assert bool(taken) == (way is slowly)
            seen.append(sorted(name for name in mode.seen if name not in READS))
    assert seen[0] == seen[2] and seen[1] == seen[3]
    assert seen[0].count("fastrnn.scan.default") == 2 * layer.num_layers


def test_what_goes_the_slow_way(library: Any) -> None:
    library.fastrnn_stub_answer(0, 90, 0)  # no echo, which is in float alone

    class Sub(Tensor):
        pass

    x, autocast = torch.randn(T, B, I), torch.autocast("cpu")
    inputs: dict[str, tuple[Tensor, Any]] = {
        "a subclass": (x.as_subclass(Sub), nullcontext()),
        "a negative view": (torch.complex(x, -x).conj().imag, nullcontext()),
        "no batch": (x[:, 0], nullcontext()),
        "autocast": (x, autocast),
    }
    layer = fastrnn.LSTM(I, H)
    with torch.no_grad():
        layer(x)
        for what, (given, around) in inputs.items():
            with around, ways() as taken:
                y, _ = layer(given)
            assert taken == ["slow"], what
            assert y.dtype == (torch.bfloat16 if what == "autocast" else x.dtype)
        with ways() as taken:
            torch.func.vmap(layer)(torch.stack([x, x]))
            torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
        assert taken == ["slow"]
        with ways() as taken:
            layer(x)
        assert not taken


def test_a_wrapper_that_outlived_its_transform(library: Any) -> None:
    """Nothing reads its memory, which is not there."""
    layer, x, kept = fastrnn.LSTM(I, H), torch.randn(T, B, I), []

    def leak(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    torch.func.vmap(leak)(torch.stack([x, x]))
    with torch.no_grad():
        layer(x)
        with ways() as taken, pytest.raises(RuntimeError):
            layer(kept[0])
    assert taken == ["slow"]


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_calls_end_as_slow_ones_do(library: Any, name: str) -> None:
    calls = wrong_calls(name)
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"heads": 7}):
        layer = getattr(fastrnn, name)(I, H, **options)
        with torch.no_grad():
            for dtype in DTYPES:
                layer.to(dtype)
                layer(torch.randn(T, B, I, dtype=dtype))
            layer.float()
            found = {what: outcome(call, layer) for what, call in calls.items()}
            with slowly():
                assert found == {what: outcome(call, layer) for what, call in calls.items()}


def test_packed_input_that_is_wrong(library: Any, in_python: list[str]) -> None:
    """C++ knows the launch; Python raises the errors that the CPU kernel raises."""
    layer, rows = fastrnn.GRU(I, H), torch.randn(9, I)

    def error(sizes: list[int]) -> str:
        with pytest.raises(RuntimeError) as raised:
            layer(PackedSequence(rows, torch.tensor(sizes)))
        return str(raised.value)

    wrong = [4, 4, 2], [4, 1, 3, 1]
    with torch.no_grad():
        layer(PackedSequence(rows, torch.tensor([4, 3, 1, 1])))
        fast = [error(sizes) for sizes in wrong]
        with fastrnn.kernels.use("cpu"):
            assert fast == [error(sizes) for sizes in wrong]


def test_a_switch_of_torch_means_another_launch(library: Any, in_python: list[str]) -> None:
    layer, x = fastrnn.LSTM(I, H, num_layers=2), torch.randn(T, B, I)
    before = torch.backends.cudnn.allow_tf32
    try:
        with torch.no_grad():
            passes = []
            for allowed in (True, False, True, False):
                torch.backends.cudnn.allow_tf32 = allowed
                in_python.clear()
                first = layer(x)
                passes.append(len(in_python))
                assert same(elsewhere(torch.no_grad, layer, x), first)
                with slowly():
                    assert same(layer(x), first)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert passes == [1, 1, 0, 0]


def test_launches_that_were_forgotten(library: Any, in_python: list[str]) -> None:
    layer, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        first = layer(x)
        _C.forget_plans()
        for _ in range(2):
            assert same(layer(x), first)
    assert in_python == ["forward", "forward"]


def test_hooks(library: Any) -> None:
    """Of the module, of a parameter, of the output, and of what autograd saves."""
    layer: Any = fastrnn.LSTM(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    layer(x)
    seen: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    def saved(t: Tensor) -> Tensor:
        seen.append("saved")
        return t

    layer.register_forward_pre_hook(noted("before"))
    layer.register_forward_hook(noted("after"))
    layer.register_full_backward_hook(noted("backward"))
    layer.weight_hh_l0.register_hook(noted("parameter"))
    with ways() as taken, saved_tensors_hooks(saved, lambda t: t):
        y, _ = layer(x)
    assert not taken
    y.register_hook(noted("output"))
    y.sum().backward()
    assert set(seen) == {"before", "saved", "after", "output", "parameter", "backward"}
    assert x.grad is not None and layer.weight_hh_l0.grad is not None


def test_nothing_is_kept(library: Any) -> None:
    _, call, inputs = stacked(
        "LSTM", "packed in the caller's order", STACKS["two directions"], torch.float32
    )
    around: list[Callable[[], AbstractContextManager[Any]]] = [*MODES, nullcontext]
    for mode in around:
        with mode():
            call(*inputs)
            own = [t.clone() for t in inputs]
            out = flatten(call(*own))
            kept = [weakref.ref(t) for t in (*own, *out)]
            del own, out
        gc.collect()
        assert not any(ref() is not None for ref in kept)


def test_operands_that_are_changed_before_the_backward_pass(library: Any) -> None:
    layer: Any = fastrnn.LSTM(I, H, num_layers=2)
    x = torch.randn(T, B, I)
    h, c = torch.randn(2, 2, B, H)
    layer(x, (h, c))
    for place in (x, h, layer.weight_hh_l1):
        y, _ = layer(x, (h, c))
        with torch.no_grad():
            place.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
