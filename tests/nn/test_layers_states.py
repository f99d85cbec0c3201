"""The states after every step, which a layer returns if it is asked to, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import kernels
from fastrnn.nn import functional
from tests.support.shared import peepholes
from tests.support.tensors import flatten, sum_of

F64 = torch.float64
LAYERS: dict[str, Callable[..., Any]] = {
    "rnn": fastrnn.RNN,
    "lstm": fastrnn.LSTM,
    "gru": fastrnn.GRU,
    "projected": lambda *sizes, **options: fastrnn.LSTM(*sizes, **(options | {"proj_size": 3})),
    "custom": lambda *sizes, **options: fastrnn.Recurrent(peepholes, *sizes, **options),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str, layers: int = 1, **options: Any) -> Any:
    """A layer with 4 inputs and 7 units."""
    return LAYERS[name](4, 7, layers, **{"dtype": F64, **options})


def states_of(hx: Any) -> tuple[Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


@every_layer
@pytest.mark.parametrize("layers", [1, 2])
def test_they_are_the_last_states_of_shorter_sequences(name: str, layers: int) -> None:
    layer, x = made(name, layers), torch.randn(6, 3, 4, dtype=F64)
    output, last, every = layer(x, return_states=True)
    plain, plain_last = layer(x)
    for one, other in zip(flatten([output, last]), flatten([plain, plain_last]), strict=True):
        assert torch.equal(one, other)
    assert len(every) == layers
    assert every[-1][0] is output
    for t in range(6):
        shorter = states_of(layer(x[: t + 1])[1])
        for k, of_layer in enumerate(every):
            for state, expected in zip(of_layer, shorter, strict=True):
                assert torch.equal(state[t], expected[k])


@every_layer
def test_the_second_direction_ends_at_the_first_step(name: str) -> None:
    layer, x = made(name, bidirectional=True), torch.randn(6, 3, 4, dtype=F64)
    ((_, *others),) = layer(x, return_states=True)[2]
    for t in range(6):
        shorter = states_of(layer(x[t:])[1])[1:]
        for state, expected in zip(others, shorter, strict=True):
            assert torch.equal(state[t, :, 7:], expected[1])


def arguments(layout: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The input, keywords of the call, and options of the layer."""
    x = torch.randn(6, 3, 4, dtype=F64)
    lengths = torch.tensor([4, 6, 1])
    if layout == "packed":
        return pack_padded_sequence(x, lengths, enforce_sorted=False), {}, {}
    return {
        "dense": (x, {}, {}),
        "batch first": (x, {}, {"batch_first": True}),
        "one sequence": (x[:, 0], {}, {}),
        "one sequence, batch first": (x[:, 0], {}, {"batch_first": True}),
        "lengths": (x, {"lengths": lengths - 1}, {}),
        "resets": (x, {"resets": torch.rand(6, 3) < 0.4}, {}),
        "two directions": (x, {"lengths": lengths}, {"bidirectional": True}),
    }[layout]


LAYOUTS = [
    *("dense", "batch first", "one sequence", "one sequence, batch first", "packed", "lengths"),
    *("resets", "two directions"),
]


def loss(results: Any) -> Tensor:
    tensors = [r.data if hasattr(r, "batch_sizes") else r for r in flatten(results)]
    return sum_of((t * (k + 1)).square().sum() for k, t in enumerate(tensors))


@every_layer
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_the_reference(name: str, layout: str) -> None:
    x, keywords, options = arguments(layout)
    layer = made(name, 2, **options)
    found = []
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel):
            *results, every = layer(x, **keywords, return_states=True)
            weights = torch.autograd.grad(loss([*results, *every]), list(layer.parameters()))
        shapes = [type(state) for of_layer in every for state in of_layer]
        assert set(shapes) == {type(results[0])}
        found.append([*results, *every, weights])
    for one, other in zip(*map(flatten, found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_their_forms_are_those_of_the_output() -> None:
    layer = made("lstm", batch_first=True)
    x, lengths = torch.randn(3, 6, 4, dtype=F64), torch.tensor([4, 6, 1])
    ((_, c),) = layer(x, lengths=lengths, return_states=True)[2]
    assert c.shape == (3, 6, 7)
    for k, n in enumerate(lengths):
        assert c[k, :n].all() and not c[k, n:].any()
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    ((_, again),) = layer(packed, return_states=True)[2]
    assert torch.equal(pad_packed_sequence(again, batch_first=True)[0], c)
    ((_, alone),) = layer(x[1], return_states=True)[2]
    assert torch.equal(alone, c[1])


def test_past_the_end_there_are_zeros_without_a_gradient() -> None:
    """In the kernel and in plain operations, which transforms see."""
    layer, lengths = made("lstm"), torch.tensor([2, 6, 0])
    x = torch.randn(6, 3, 4, dtype=F64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        ((_, c),) = layer(x, lengths=lengths, return_states=True)[2]
        return c

    past = torch.arange(6).unsqueeze(1) >= lengths
    found = []
    for c in (call(x), torch.vmap(call)(x.unsqueeze(0))[0]):
        assert not c[past].any()
        found.append([c, torch.autograd.grad(c.sum() + c[past].sum(), x)[0]])
    with kernels.use("reference"):
        found.append([found[0][0], torch.autograd.grad(call(x).sum(), x)[0]])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_heads() -> None:
    layer = made("lstm", heads=7)
    x = torch.randn(5, 2, 4, dtype=F64)
    _, (_, last), ((_, c),) = layer(x, return_states=True)
    assert torch.equal(c[-1], last[0])


def test_a_state_may_be_changed_in_place() -> None:
    layer, x = made("lstm"), torch.randn(6, 3, 4, dtype=F64)
    gradients = []
    for in_place in (False, True):
        output, _, ((_, c),) = layer(x, return_states=True)
        c = c.mul_(3) if in_place else c * 3
        gradients.append(torch.autograd.grad((output + c).sum(), list(layer.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = made("lstm", dtype=dtype), torch.randn(6, 3, 4).to(dtype)
    _, (_, last), ((_, c),) = layer(x, return_states=True)
    assert c.dtype == dtype
    assert torch.equal(c[-1], last[0])
    c.float().sum().backward()
    assert layer.weight_ih_l0.grad.abs().sum() > 0


def test_autocast() -> None:
    layer, x = made("lstm", dtype=torch.float32), torch.randn(6, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ((h, c),) = layer(x, return_states=True)[2]
    assert h.dtype == c.dtype == torch.bfloat16


def test_recompute_gives_the_same_gradients() -> None:
    layer, x = made("lstm", 2), torch.randn(6, 3, 4, dtype=F64)
    gradients = []
    for recompute in (False, True):
        layer.recompute = recompute
        every = layer(x, return_states=True)[2]
        gradients.append(torch.autograd.grad(loss(every), list(layer.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("prepared", ["frozen", "int8", "bfloat16", "int8 alone"])
def test_without_gradients(prepared: str) -> None:
    layer, x = made("lstm", 2, dtype=torch.float32), torch.randn(6, 3, 4)
    plain = layer(x, return_states=True)
    if prepared == "frozen":
        fastrnn.freeze(layer)
    else:
        weights, *alone = prepared.split()
        fastrnn.quantize_(layer, weights, keep_float=not alone)
    with torch.no_grad():
        output, last, every = layer(x, return_states=True)
        for one, other in zip(flatten([output, last]), flatten(layer(x)), strict=True):
            assert torch.equal(one, other)
    limit = 0.0 if prepared == "frozen" else 0.02
    for one, other in zip(flatten(every), flatten(plain[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=limit)
        assert not one.requires_grad
    assert torch.equal(torch.stack([c[-1] for _, c in every]), last[1])


@pytest.mark.parametrize("name", ["lstm", "custom", "gru"])
def test_derivatives_and_transforms(name: str) -> None:
    layer = made(name)
    x = torch.randn(3, 2, 4, dtype=F64, requires_grad=True)

    def call(x: Tensor) -> list[Tensor]:
        return flatten(list(layer(x, return_states=True)[2]))

    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)
    many = torch.randn(3, *x.shape, dtype=F64)
    together = torch.vmap(lambda x: tuple(call(x)))(many)
    for k in range(3):
        for one, other in zip(together, call(many[k]), strict=True):
            torch.testing.assert_close(one[k], other)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x), call(x), strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(loss(run(x)), x)[0] for run in (compiled, call)]
    torch.testing.assert_close(*gradients)


def test_an_exported_program_returns_them() -> None:
    layer, x = made("lstm"), torch.randn(3, 2, 4, dtype=F64)
    program = torch.export.export(layer, (x,), {"return_states": True}).module()
    ((_, c),) = program(x, return_states=True)[2]
    assert torch.equal(c, layer(x, return_states=True)[2][0][1])


def test_the_functional_form() -> None:
    layer, x = made("lstm", 2), torch.randn(6, 3, 4, dtype=F64)
    ours = functional.rnn(layer._cell(), x, layer.all_weights, return_states=True)
    for one, other in zip(flatten(ours), flatten(layer(x, return_states=True)), strict=True):
        assert torch.equal(one, other)


def test_no_steps() -> None:
    layer = made("lstm")
    x, lengths = torch.randn(0, 2, 4, dtype=F64), torch.zeros(2, dtype=torch.int64)
    ((h, c),) = layer(x, lengths=lengths, return_states=True)[2]
    assert h.shape == c.shape == (0, 2, 7)
