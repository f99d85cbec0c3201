"""The two ways of a call of a layer or cell, the fast one of `_C` and the slow one through Python,
and calls to compare them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn.nn import functional
from tests.support.names import LAYERS
from tests.support.tensors import flatten

T, B, I, H = 3, 4, 5, 7  # noqa: E741
# Operators by which the slow way alone reads lengths and sizes of batches.
READS = ("aten.aminmax.default", "aten._local_scalar_dense.default", "aten.select.int")


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


class Operators(TorchDispatchMode):
    """Notes every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


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


def states(name: str, directions: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """Initial states of a layer or cell of H units."""
    shape = (directions, B, H) if name in LAYERS else (B, H)
    h, c = torch.randn(2, *shape, dtype=dtype)
    return (h, c) if "LSTM" in name else h


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


def outcome(call: Callable[[nn.Module], Any], layer: nn.Module) -> Any:
    """The numbers of a call, or its error."""
    try:
        return [t.tolist() for t in flatten(call(layer))]
    except Exception as error:
        return type(error), str(error)


def wrong_calls(name: str) -> dict[str, Callable[[nn.Module], Any]]:
    """Calls of a layer of I inputs and H units, most of which are errors."""
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
