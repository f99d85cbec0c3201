"""Learned parameters of cells in layers: their names, shapes and first values, and every way in
which a layer uses its weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cells, kernels
from fastrnn.nn import functional
from tests.support import weights as attached
from tests.support.forms import FORMS, given, with_gradients
from tests.support.kernels import planned
from tests.support.shared import peepholes
from tests.support.tensors import flatten

F64 = torch.float64
LEARNED = ["pi", "pf", "po", "scale"]


def layer_of(inputs: int = 3, hidden: int = 21, layers: int = 1, **options: Any) -> Any:
    return fastrnn.Recurrent(peepholes, inputs, hidden, layers, **options)


def test_names_and_shapes() -> None:
    layer = layer_of(3, 5, 2, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *(f"weight_{n}" for n in LEARNED)]
    ends = [f"_l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse")]
    assert list(shapes) == [kind + end for end in ends for kind in kinds]
    for end in ends:
        assert [shapes[f"weight_{name}{end}"] for name in LEARNED] == [(5,), (5,), (5,), (1,)]
    assert [w.shape for w in layer.all_weights[0]] == [shapes[kind + ends[0]] for kind in kinds]
    heads = dict(layer_of(3, 8, heads=2).named_parameters())
    assert heads["weight_pi_l0"].shape == (2, 4)
    assert heads["weight_scale_l0"].shape == (2, 1)


def test_first_values() -> None:
    layer = layer_of(3, 400, 2)
    for _ in range(2):
        for k in range(2):
            first, normal, half, scale = (getattr(layer, f"weight_{n}_l{k}") for n in LEARNED)
            assert 0.8 / 20 < first.abs().max() <= 1 / 20  # uniform, as weights
            assert scale.abs() <= 1 / 20
            assert 0.9 < normal.std() < 1.1
            assert (half == 0.5).all()
        with torch.no_grad():
            layer.weight_po_l1 += 1
        before = layer.weight_pi_l0.clone()
        layer.reset_parameters()
        assert not torch.equal(before, layer.weight_pi_l0)


def test_the_layers_of_a_model_train_them() -> None:
    layer = layer_of(3, 16, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(6, 2, 3)
    before = copy.deepcopy(layer.state_dict())
    layer(x)[0].square().sum().backward()
    optimizer.step()
    for name, value in layer.state_dict().items():
        assert not torch.equal(value, before[name]), name
    other = layer_of(3, 16, 2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])


def test_heads_are_layers_of_their_own() -> None:
    layer = layer_of(3, 12, heads=3, dtype=F64)
    x = torch.randn(5, 2, 3, dtype=F64)
    outputs = []
    for head in range(3):
        own = layer_of(3, 4, dtype=F64)
        own.load_state_dict({name: w[head] for name, w in layer.state_dict().items()})
        outputs.append(own(x)[0])
    torch.testing.assert_close(layer(x)[0], torch.cat(outputs, -1))


def test_the_functional_form_takes_them_at_the_end_of_a_list() -> None:
    layer = layer_of(bias=False)
    x = torch.randn(5, 2, 3)
    ours = functional.rnn(peepholes, x, layer.all_weights)
    for one, other in zip(flatten(ours), flatten(layer(x)), strict=True):
        assert torch.equal(one, other)


def test_parametrized() -> None:
    layer = layer_of(dtype=F64)
    double = copy.deepcopy(layer)
    with torch.no_grad():
        double.weight_pi_l0 *= 2
    attached.parametrized(layer, "weight_pi_l0")
    x = torch.randn(5, 2, 3, dtype=F64)
    y = layer(x)[0]
    assert torch.equal(y, double(x)[0])
    y.sum().backward()
    double(x)[0].sum().backward()
    own = layer.parametrizations.weight_pi_l0.original.grad
    torch.testing.assert_close(own, 2 * double.weight_pi_l0.grad)


@pytest.mark.parametrize("name", LEARNED)
def test_frozen_layers_notice_changes(name: str) -> None:
    layer = layer_of()
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        before = layer(x)[0]
        fastrnn.freeze(layer)
        assert torch.equal(layer(x)[0], before)
        getattr(layer, f"weight_{name}_l0").add_(1)
        with pytest.raises(RuntimeError, match="changed or replaced after freezing"):
            layer(x)
        fastrnn.freeze(layer)
        after = layer(x)[0]
    assert not torch.equal(after, before)
    fastrnn.unfreeze(layer)
    assert torch.equal(layer(x)[0], after)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16], ids=str)
def test_streams(dtype: torch.dtype, threads: int) -> None:
    layer = layer_of(5, 33, dtype=dtype)
    x = torch.randn(7, 2, 5).to(dtype)
    stepper = layer.stream(2, threads=threads)
    with torch.no_grad():
        whole = layer(x)[0]
    assert torch.equal(torch.stack([stepper.step(step) for step in x]), whole)


@pytest.mark.parametrize("keep_float", [True, False])
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_quantised_layers_leave_them_as_they_are(weights: str, keep_float: bool) -> None:
    layer = layer_of(5, 33)
    before = {n: w.clone() for n, w in layer.state_dict().items()}
    x = torch.randn(7, 2, 5)
    expected = layer(x)[0]
    fastrnn.quantize_(layer, weights, keep_float=keep_float)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=0.05)
    for name in LEARNED:
        assert torch.equal(layer.state_dict()[f"weight_{name}_l0"], before[f"weight_{name}_l0"])
        assert f"weight_{name}_l0_scale" not in layer.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_near_to_float(dtype: torch.dtype) -> None:
    layer = layer_of(5, 33).to(dtype)
    x = torch.randn(7, 2, 5).to(dtype)
    double = copy.deepcopy(layer).to(F64)
    y, right = layer(x)[0], double(x.to(F64))[0]
    torch.testing.assert_close(y.to(F64), right, rtol=0, atol=0.02)
    y.sum().backward()
    right.sum().backward()
    for name in LEARNED:
        ours, theirs = (getattr(m, f"weight_{name}_l0").grad for m in (layer, double))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.to(F64), theirs, rtol=0.03, atol=0.05)


def test_autocast() -> None:
    layer = layer_of(5, 33)
    x = torch.randn(7, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight_scale_l0.grad.dtype == torch.float32


def test_recompute_gives_the_same_gradients() -> None:
    layer = layer_of(5, 33, 2)
    x = torch.randn(7, 2, 5)
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        layer.recompute = recompute
        found.append(list(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_reference_computes_the_same() -> None:
    layer = layer_of(3, 21, 2, bidirectional=True, dtype=F64)
    x = torch.randn(5, 2, 3, dtype=F64)
    found = []
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel):
            y = layer(x)[0]
            found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    torch.testing.assert_close(*found)


def test_every_learned_number_may_be_unused() -> None:
    def plain(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
        return torch.tanh(u.h + v.h)

    params = {"unread": fastrnn.Param()}
    layer: Any = fastrnn.Recurrent(cells.Cell("unread", ("h",), ("h",), plain, params), 3, 5)
    layer(torch.randn(4, 2, 3))[0].sum().backward()
    assert torch.equal(layer.weight_unread_l0.grad, torch.zeros(5))


def _both(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    return torch.tanh(u.h + v.h + p.x + p.y) * p.z


def _both_in_stages(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    return torch.tanh(u.h + v.h + p.x + p.y - h.mean(-1, keepdim=True)) * p.z


@pytest.mark.compiles
@pytest.mark.parametrize("function", [_both, _both_in_stages], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("form", FORMS)
def test_two_may_have_one_gradient(form: str, function: Any) -> None:
    # In the reverse direction, the chunk of the first steps has no row of a short sequence.
    params = {"x": fastrnn.Param(), "y": fastrnn.Param(), "z": fastrnn.Param(init=1.0)}
    cell = cells.Cell(function.__name__[1:], ("h",), ("h",), function, params)
    layer: Any = fastrnn.Recurrent(cell, 3, 19, bidirectional=True, dtype=F64)
    x, states = given(layer, 9, 6)
    found = []
    for kernel in ("cpu", "reference"):
        with (
            kernels.use(kernel),
            planned(chunk_rows=7, split_sequences=2) if kernel == "cpu" else nullcontext(),
        ):
            found.append(with_gradients(layer, form, x, states))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_state_may_be_a_learned_number(kernel: str) -> None:
    def constant(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> Any:
        return p.each, p.all

    params = {"each": fastrnn.Param(), "all": fastrnn.Param("one")}
    cell = cells.Cell("constant", ("h",), ("h", "c"), constant, params)
    layer: Any = fastrnn.Recurrent(cell, 3, 5)
    with kernels.use(kernel):
        y, (_, last), ((_, c),) = layer(torch.randn(4, 2, 3), return_states=True)
    assert torch.equal(y, layer.weight_each_l0.expand(4, 2, 5))
    assert torch.equal(c, layer.weight_all_l0.expand(4, 2, 5)) and torch.equal(last[0], c[0])


def test_a_layer_that_holds_int8_does_not_begin_anew() -> None:
    layer = fastrnn.Recurrent(cells.get("fast_grnn"), 3, 5)
    fastrnn.quantize_(layer, keep_float=False)
    with pytest.raises(RuntimeError, match=r"dequantize_\(module\) before reset_parameters"):
        layer.reset_parameters()


def test_wrong_shapes_are_refused() -> None:
    layer = layer_of()
    own = layer._weights()[0]
    x = torch.randn(5, 2, 3)
    for params, message in [
        (own.params[:3], "params should hold 4 tensors per recurrence, got 3"),
        ((own.params[0][:5], *own.params[1:]), r"parameter 0 of cell peepholes.* should be \[21\]"),
        ((*own.params[:3], own.params[0]), r"parameter 3 of cell peepholes.* should be \[1\]"),
        ((own.params[0].double(), *own.params[1:]), "parameter 0 is Double"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            functional.rnn(peepholes, x, [own._replace(params=params)])


@fastrnn.cell(
    gates="zn",
    states="h",
    params={"gain": fastrnn.Param("gates", init=torch.nn.init.normal_), "own": "unit"},
    name="scaled_gates",
)
def scaled_gates(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    z, n = (p.gain * torch.cat([u.z + v.z, u.n + v.n], -1)).chunk(2, -1)
    return h + torch.sigmoid(z + p.own) * (torch.tanh(n) - h)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_parameter_may_have_a_number_for_each_gate(heads: int) -> None:
    layer: Any = fastrnn.Recurrent(scaled_gates, 3, 6, 2, bidirectional=True, heads=heads).double()
    assert layer.weight_gain_l0.shape == ((2, 6) if heads > 1 else (12,))
    x = torch.randn(5, 2, 3, dtype=F64)
    found = []
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel):
            y = layer(x)[0]
            found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    torch.testing.assert_close(*found)
    own = layer._weights()[0]
    with pytest.raises(RuntimeError, match=r"parameter 0 of cell scaled_gates.* should be \["):
        functional.rnn(scaled_gates, x[..., :3], [own._replace(params=own.params[::-1])])
