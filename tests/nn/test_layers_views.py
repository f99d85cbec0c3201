"""Outputs are views to autograd exactly if torch.nn's are: `detach_` and changes in place, which
autograd forbids for some views, work on the same outputs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from tests.support.names import CELLS
from tests.support.tensors import flatten, sum_of

CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {"num_layers": layers, "bidirectional": both, "batch_first": batch_first})
        for name in ("RNN", "GRU", "LSTM")
        for layers, both, batch_first in product((1, 2), (False, True), (False, True))
    ),
    *(("LSTM", {"proj_size": 3, "batch_first": batch_first}) for batch_first in (False, True)),
    *((name, {"bias": False, "batch_first": True}) for name in ("RNN", "GRU", "LSTM")),
]
INPUTS = ["dense", "unbatched", "packed", "one step"]


def examples(kind: str, batch_first: bool) -> Any:
    torch.manual_seed(3)
    if kind == "packed":
        return pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    if kind == "unbatched":
        return torch.randn(5, 4)
    batch, steps = (1, 1) if kind == "one step" else (2, 5)
    return torch.randn(*((batch, steps) if batch_first else (steps, batch)), 4)


def twins(name: str, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
    for library in (nn, fastrnn):
        torch.manual_seed(0)
        yield getattr(library, name)(*args, **kwargs)


def detached(t: Tensor) -> bool:
    try:
        t.detach_()
    except RuntimeError as error:
        assert "Can't detach views in-place" in str(error)
        return False
    return True


def check(name: str, kwargs: dict[str, Any], x: Any, states: Any, grad: bool) -> None:
    views, detachable, shapes = [], [], []
    gradients: list[Any] = []
    for module in twins(name, 4, 6, **kwargs):
        with torch.set_grad_enabled(grad):
            outputs = flatten(module(x, states))
            views.append([t._is_view() for t in outputs])
            shapes.append([(t.shape, t.stride()) for t in outputs])
            detachable.append([detached(t) for t in flatten(module(x, states))])
            # A change in place, like that of a mask, to the last of the outputs first.
            outputs = flatten(module(x, states))
            for t in reversed(outputs):
                try:
                    t *= (torch.arange(t.numel()).view(t.shape) % 3 > 0).to(t.dtype)
                except RuntimeError as error:
                    assert "modified inplace" in str(error), error
        if grad:
            module.zero_grad()
            try:
                sum_of(t.square().sum() for t in outputs).backward()
            except RuntimeError as error:
                # Then torch.nn's backward raises for some; ours computes the changed outputs again.
                assert "modified by an inplace operation" in str(error)
                assert type(module).__module__ == "torch.nn.modules.rnn"
                gradients.append(None)
            else:
                gradients.append([cast(Tensor, p.grad).clone() for p in module.parameters()])
    assert views[0] == views[1]
    assert detachable[0] == detachable[1]
    assert shapes[0] == shapes[1]
    if grad and gradients[0] is not None:
        for theirs, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    CONFIGURATIONS,
    ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={int(n)}" for k, n in v.items()),
)
def test_layers(name: str, kwargs: dict[str, Any], kind: str, grad: bool) -> None:
    x = examples(kind, kwargs.get("batch_first", False))
    check(name, kwargs, x, None, grad)
    _, states = getattr(nn, name)(4, 6, **kwargs)(x)
    given = states.detach() if isinstance(states, Tensor) else tuple(s.detach() for s in states)
    check(name, kwargs, x, given, grad)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, with_states: bool, batch: int | None, grad: bool) -> None:
    before = () if batch is None else (batch,)
    state = torch.randn(*before, 6)
    states = None if not with_states else (state, state + 1) if name == "LSTMCell" else state
    check(name, {}, torch.randn(*before, 4), states, grad)


def test_a_change_of_a_transposed_output_is_noticed() -> None:
    """It shares memory, and the count of changes, with a tensor that backward reads."""
    gradients = []
    for module in twins("GRU", 4, 6, batch_first=True):
        y, _ = module(torch.ones(2, 5, 4))
        y.mul_(3)
        y.sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("change", ["clamp", "numpy", "double"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_an_output_written_past_torchs_count(name: str, change: str) -> None:
    """torch.nn's outputs share no memory with tensors that backward reads."""
    gradients = []
    for module in twins(name, 4, 6, dtype=torch.float64):  # torch.nn's float32 LSTM is wrong here
        y, _ = module(torch.ones(5, 2, 4, dtype=torch.float64))
        if change == "clamp":
            y.data.clamp_(-0.1, 0.1)
        elif change == "numpy":
            y.detach().numpy()[:] *= 0.5
        else:
            y.data.mul_(2)
        y.sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
