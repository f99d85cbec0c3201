"""Layers of cells of which gates lack rows of a matrix, against layers with all rows."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import kernels, ops
from fastrnn.cells import Cell
from fastrnn.kernels.operands import Operands, Weights
from fastrnn.kernels.operands import named as operand_names
from fastrnn.nn import functional
from tests.support import shared
from tests.support.forms import FORMS, call, given, with_gradients
from tests.support.kernels import planned
from tests.support.operands import by_reference, operands, run
from tests.support.tensors import flatten

F64 = torch.float64
PAIRS = {
    "mixed": (shared.mixed, shared.mixed_full),
    "staged": (shared.staged_rows, shared.staged_full),
    "apart": (shared.apart, shared.apart_full),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def rows_of(cell: Cell, kind: str, tensor: Tensor, heads: int = 1) -> Tensor:
    """Of a weight with rows for all gates, those that the cell has."""
    names = {"ih": cell.inputs, "hh": cell.recurrent}.get(kind.split("_")[1])
    if names is None:
        return tensor
    blocks = tensor.chunk(len(cell.gates), int(heads > 1))
    own = [block for name, block in zip(cell.gates, blocks, strict=True) if name in names]
    return torch.cat(own, int(heads > 1)) if own else tensor.new_empty(0)


def pair_of(name: str, inputs: int = 3, hidden: int = 21, **options: Any) -> tuple[Any, Any]:
    """A layer without these rows, and one with rows that nothing reads, and the same weights."""
    few, all_rows = PAIRS[name]
    torch.manual_seed(4)
    full: Any = fastrnn.Recurrent(all_rows, inputs, hidden, **options)
    layer: Any = fastrnn.Recurrent(few, inputs, hidden, **options)
    with torch.no_grad():
        for key, own in layer.named_parameters():
            own.copy_(rows_of(few, key, getattr(full, key), layer.heads))
    return layer, full


def both_gradients(layer: Any, full: Any, form: str, x: Tensor, states: Any) -> Any:
    """The results and gradients of both, of the same rows."""
    ours, theirs = (with_gradients(one, form, x, states) for one in (layer, full))
    names = [key for key, _ in full.named_parameters()]
    own = [key for key, _ in layer.named_parameters()]
    head = len(theirs) - len(names)
    rows = {
        key: rows_of(layer.cell, key, gradient, layer.heads)
        for key, gradient in zip(names, theirs[head:], strict=True)
    }
    return ours, [*theirs[:head], *(rows[key] for key in own)]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for what, right in theirs.items():
        if right is None:  # autograd does not reach an operand that the reference does not read
            assert not ours[what].any(), what
            continue
        torch.testing.assert_close(ours[what], right, rtol=1e-11, atol=1e-12, msg=what)


# What a layer has.


def test_names_and_shapes() -> None:
    layer = fastrnn.Recurrent(shared.mixed, 3, 5, 2, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert list(shapes)[:4] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert [shapes[n] for n in list(shapes)[:4]] == [(15, 3), (15, 5), (15,), (15,)]
    assert shapes["weight_ih_l1_reverse"] == (15, 10)
    staged = dict(fastrnn.Recurrent(shared.staged_rows, 3, 5).named_parameters())
    assert [tuple(p.shape) for p in staged.values()] == [(10, 3), (10, 5), (10,), (10,), (5,)]


def test_a_matrix_without_rows_is_no_parameter() -> None:
    layer = fastrnn.Recurrent(shared.apart, 3, 5, 2)
    assert [name for name, _ in layer.named_parameters()] == [
        f"{kind}_l{k}" for k in range(2) for kind in ("weight_ih", "bias_ih", "weight_r")
    ]
    assert [tuple(w.shape) for w in layer.all_weights[0]] == [(10, 3), (10,), (5,)]
    assert not hasattr(layer, "weight_hh_l0") and not hasattr(layer, "bias_hh_l0")
    bare = fastrnn.Recurrent(shared.apart, 3, 5, bias=False)
    assert list(bare.state_dict()) == ["weight_ih_l0", "weight_r_l0"]
    heads = fastrnn.Recurrent(shared.apart, 3, 8, heads=2)
    assert [tuple(w.shape) for w in heads.all_weights[0]] == [(2, 8, 3), (2, 8), (2, 4)]


# What it computes.


@every_pair
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_results_and_gradients(name: str, form: str, bidirectional: bool) -> None:
    layer, full = pair_of(name, num_layers=2, bidirectional=bidirectional, dtype=F64)
    x, states = given(layer, 7, 5)
    ours, theirs = both_gradients(layer, full, form, x, states)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@every_pair
@pytest.mark.parametrize("options", [{"bias": False}, {"heads": 3}], ids=["bias", "heads"])
def test_without_bias_and_with_heads(name: str, options: dict[str, Any]) -> None:
    layer, full = pair_of(name, dtype=F64, **options)
    x, states = given(layer, 7, 5)
    ours, theirs = both_gradients(layer, full, "dense", x, states)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@every_pair
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("hidden", [1, 16, 37])
def test_sizes(name: str, batch: int, hidden: int) -> None:
    layer, full = pair_of(name, 2, hidden, dtype=F64)
    x, states = given(layer, 4, batch)
    ours, theirs = both_gradients(layer, full, "dense", x, states)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@every_pair
@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_and_autograd_of_the_reference(name: str, bias: bool) -> None:
    """Gradients of all operands, also of empty ones."""
    cell = PAIRS[name][0]
    made = operands(cell, 6, 3, 4, 19, recurrences=2, bias=bias)
    with kernels.use("cpu"):
        ours = run(ops.scan, cell, made)
    assert_same(ours, run(by_reference, cell, made))


@fastrnn.cell(gates="wfo", inputs="wfo", recurrent="f", states="hc", name="rows_projectable")
def projectable(u: Any, v: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.sigmoid(u.f + v.f) * c + u.w
    return u.o * torch.tanh(c), c


@fastrnn.cell(gates="wfo", recurrent="", states="hc", name="rows_projected_apart")
def projected_apart(u: Any, v: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.sigmoid(u.f) * c + u.w
    return u.o * torch.tanh(c), c


@pytest.mark.parametrize("cell", [projectable, projected_apart], ids=lambda c: c.name)
@pytest.mark.parametrize("units", [1, 2])
def test_projected(cell: Cell, units: int) -> None:
    made = operands(cell, 6, 3, 4, 70, projected=11)
    with kernels.use("cpu"), planned(split_units=units):
        ours = run(ops.scan, cell, made)
    assert_same(ours, run(by_reference, cell, made))


@pytest.mark.parametrize("name", ["mixed", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_all_rows(name: str, dtype: torch.dtype) -> None:
    """A sum over a row of a matrix does not depend on the other rows."""
    layer, full = pair_of(name, 19, 45, dtype=dtype)
    x, states = given(layer, 6, 9, dtype)
    for one, other in zip(
        call(layer, "dense", x, states), call(full, "dense", x, states), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mixed", "apart"])
@pytest.mark.parametrize(
    "precision",
    [{"weights": "int8"}, {"weights": "int8", "activations": "int16"}, {"weights": "bfloat16"}],
    ids=["int8", "int16", "bfloat16"],
)
@pytest.mark.parametrize("options", [{}, {"heads": 3}, {"num_layers": 2}], ids=str)
def test_quantised(name: str, precision: dict[str, Any], options: dict[str, Any]) -> None:
    layer, full = pair_of(name, 19, 45, **options)
    fastrnn.quantize_(layer, **precision)
    fastrnn.quantize_(full, **precision)
    x, states = given(layer, 6, 9, torch.float32)
    with torch.no_grad():
        ours, theirs = call(layer, "dense", x, states), call(full, "dense", x, states)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    again = pickle.loads(pickle.dumps(layer))
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    again.load_state_dict(torch.load(saved))
    with torch.no_grad():
        assert torch.equal(call(again, "dense", x, states)[0], ours[0])
    fastrnn.dequantize_(layer)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}


@every_pair
def test_streams(name: str) -> None:
    layer, full = pair_of(name, 5, 70, num_layers=2)
    x = torch.randn(6, 2, 5)
    steppers = [one.stream(2, threads=2) for one in (layer, full)]
    assert steppers[0].nbytes < steppers[1].nbytes
    slots = layer.stream_slots(3)
    own = [slots.add(), slots.add()]
    with torch.no_grad():
        whole = layer(x)[0]
    for t, step in enumerate(x.contiguous()):
        ours, theirs = (stepper.step(step) for stepper in steppers)
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(slots.step(step, own), ours)
        assert torch.equal(ours, whole[t])


# In every way in which a layer is used.


@every_pair
def test_saved_copied_and_frozen(name: str) -> None:
    layer, _ = pair_of(name)
    x, states = given(layer, 5, 2, torch.float32)
    expected = call(layer, "dense", x, states)[0]
    other = fastrnn.Recurrent(layer.cell, 3, 21)
    other.load_state_dict(layer.state_dict())
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(call(again, "dense", x, states)[0], expected)
    with torch.no_grad():
        fastrnn.freeze(layer)
        assert torch.equal(call(layer, "dense", x, states)[0], expected)
        assert torch.equal(call(layer, "dense", x, states)[0], expected)
        layer.weight_ih_l0.add_(1)
        with pytest.raises(RuntimeError, match="changed or replaced after freezing"):
            layer(x)
    fastrnn.unfreeze(layer)


@every_pair
@pytest.mark.parametrize("bias", [True, False])
def test_the_functional_form(name: str, bias: bool) -> None:
    layer, _ = pair_of(name, bias=bias)
    x = torch.randn(5, 2, 3)
    ours = functional.rnn(layer.cell, x, layer.all_weights)
    for one, other in zip(flatten(ours), flatten(layer(x)), strict=True):
        assert torch.equal(one, other)


@every_pair
def test_second_derivatives(name: str) -> None:
    layer, _ = pair_of(name, 2, 3, dtype=F64)
    x, _ = given(layer, 3, 2)
    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    keys = [key for key, _ in layer.named_parameters()]

    def function(x: Tensor, *own: Tensor) -> Tensor:
        made = torch.func.functional_call(layer, dict(zip(keys, own, strict=True)), (x,))
        return made[0]

    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(), *weights))


@every_pair
def test_vmap_over_models(name: str) -> None:
    layers = [pair_of(name, dtype=F64)[0] for _ in range(2)]
    with torch.no_grad():
        for p in layers[1].parameters():
            p.mul_(0.5)
    x, _ = given(layers[0], 4, 2)
    params, buffers = torch.func.stack_module_state(layers)
    base = layers[0]

    def one(params: Any, buffers: Any) -> Tensor:
        y: Tensor = torch.func.functional_call(base, (params, buffers), (x,))[0]
        return y

    made = torch.func.vmap(one)(params, buffers)
    torch.testing.assert_close(made, torch.stack([layer(x)[0] for layer in layers]))


@every_pair
@pytest.mark.takes(20)
def test_compiled_and_exported(name: str) -> None:
    layer, _ = pair_of(name)
    x, _ = given(layer, 5, 2, torch.float32)
    with torch.no_grad():
        expected = layer(x)[0]
        assert torch.equal(
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], expected
        )
        program = torch.export.export(layer.eval(), (x,))
        assert torch.equal(program.module()(x)[0], expected)


def test_noise_of_the_layer() -> None:
    layer = fastrnn.Recurrent(shared.mixed, 3, 21, zoneout=0.3, recurrent_dropout=0.2)
    x, states = given(layer, 5, 3, torch.float32)
    with kernels.use("cpu"):
        ours = call(layer, "dense", x, states)
    with kernels.use("reference"):
        theirs = call(layer, "dense", x, states)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="cell 'rows_apart' has none; use zoneout"):
        fastrnn.Recurrent(shared.apart, 3, 21, recurrent_dropout=0.2)


def test_no_thread_waits_without_recurrent_rows() -> None:
    """Units do not need each other, so a step with any split gives the same bits."""
    layer, _ = pair_of("apart", 20, 200)
    x, states = given(layer, 30, 4, torch.float32)
    expected = with_gradients(layer, "lengths", x, states)
    for units in (2, 3):
        with planned(split_units=units, chunk_rows=7):
            for one, other in zip(
                with_gradients(layer, "lengths", x, states), expected, strict=True
            ):
                assert torch.equal(one, other)


def test_initial_values() -> None:
    for kind, matrices in (("orthogonal", "hh"), ("xavier_uniform", "ih")):
        layer = fastrnn.Recurrent(shared.mixed, 8, 8)
        getattr(fastrnn.init, f"{kind}_")(layer)
        for block in getattr(layer, f"weight_{matrices}_l0").detach().chunk(3):
            if matrices == "hh":
                torch.testing.assert_close(block @ block.T, torch.eye(8))
            else:
                assert 0.4 < block.abs().max() <= (6 / 16) ** 0.5
    alone: Any = fastrnn.Recurrent(shared.apart, 3, 8)
    fastrnn.init.orthogonal_(alone)
    fastrnn.init.forget_gate_bias_(alone, 30.0)
    assert (alone.bias_ih_l0[8:] == 30).all()
    fastrnn.init.chrono_(alone, 50)
    assert 0 < alone.bias_ih_l0[8:].max() < 4
    with pytest.raises(ValueError, match="identity_ is for weight_hh"):
        fastrnn.init.identity_(fastrnn.Recurrent(fastrnn.cells.indrnn, 3, 8))


def test_operands_of_another_number_of_rows() -> None:
    made = operands(shared.mixed, 3, 2, 4, 5)
    full = operands(shared.mixed_full, 3, 2, 4, 5)
    for name in ("w_hh", "b_ih", "b_hh"):
        wrong = {**made, name: full[name]}
        with pytest.raises(RuntimeError, match=f"{name} should be"):
            ops.scan(shared.mixed, **wrong)
    assert Operands(**made).w_hh[0].shape == (15, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_behind_a_matrix_without_rows(bias: bool) -> None:
    x, w_ih, w_hr = torch.randn(5, 2, 3), torch.randn(12, 3), torch.randn(3, 4)
    weights = [w_ih, *([torch.randn(12)] if bias else []), w_hr]
    named = operand_names(projected_apart, weights)
    assert named.w_hr is w_hr and named.w_hh.shape == (0, 3)
    assert (named.b_ih is None) == (not bias) and named.params == ()
    y, _ = functional.rnn(projected_apart, x, [weights])
    assert y.shape == (5, 2, 3)


def test_one_bias_of_a_cell() -> None:
    star = fastrnn.cells.star
    x, w_ih, w_hh, b = torch.randn(2, 3), torch.randn(8, 3), torch.randn(4, 4), torch.randn(8)
    (ours,) = functional.rnn_cell(star, x, (), Weights(w_ih, w_hh, b, None, None))
    (both,) = functional.rnn_cell(star, x, (), Weights(w_ih, w_hh, b, torch.zeros(4), None))
    assert torch.equal(ours, both)
