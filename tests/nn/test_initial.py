"""The initial values that a cell gives to the weights of a layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

import fastrnn
from fastrnn.cells import Cell
from fastrnn.compiler.emit_cpp import key
from tests.support.weights import Doubled


def leaky(u: Any, v: Any, h: Tensor) -> Tensor:
    return 0.5 * h + torch.tanh(u.a + v.a) + u.b + v.b


def with_values(initialize: Callable[..., object] | None) -> Cell:
    return Cell("leaky", ("a", "b"), ("h",), leaky, initialize=initialize)


def rows(layer: Any, name: str, gate: int) -> Tensor:
    return getattr(layer, name).detach().chunk(2)[gate]


def test_every_recurrence_is_passed_once() -> None:
    seen: list[list[Any]] = []

    def note(u: Any, v: Any) -> None:
        assert not torch.is_grad_enabled()
        seen.append([*u.a, *v.a, *u.b, *v.b])

    layer: Any = fastrnn.Recurrent(
        with_values(note), 3, 8, num_layers=2, bidirectional=True, heads=2
    )
    assert len(seen) == 2 * 2 * 2
    for found, inputs in zip(seen, [3] * 4 + [16] * 4, strict=True):
        assert [t.shape for t in found] == [(4, inputs), (4,), (4, 4), (4,)] * 2
    at = layer.weight_hh_l1_reverse[1, 4:]
    assert seen[-1][6].data_ptr() == at.data_ptr()


def test_values_are_written_after_torchs_into_the_rows_of_the_gate() -> None:
    def fill(u: Any, v: Any) -> None:
        assert 0 < u.a.weight.abs().max() <= 7**-0.5
        for number, part in enumerate((u.a.weight, u.b.bias, v.b.weight, v.a.bias)):
            part.fill_(number + 2)

    layer: Any = fastrnn.Recurrent(with_values(fill), 3, 7)
    for number, (name, gate) in enumerate(
        [("weight_ih_l0", 0), ("bias_ih_l0", 1), ("weight_hh_l0", 1), ("bias_hh_l0", 0)]
    ):
        assert (rows(layer, name, gate) == number + 2).all()
        assert (rows(layer, name, 1 - gate).abs() <= 7**-0.5).all()
        assert getattr(layer, name).requires_grad
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
    layer.reset_parameters()
    assert (rows(layer, "weight_ih_l0", 0) == 2).all()


def test_a_cell_without_values_has_torchs() -> None:
    torch.manual_seed(1)
    ours = dict(fastrnn.Recurrent(fastrnn.cells.lstm, 3, 5).named_parameters())
    torch.manual_seed(1)
    theirs = torch.nn.LSTM(3, 5).named_parameters()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs)


def test_biases_are_none_in_a_layer_without() -> None:
    seen: list[Any] = []
    fastrnn.Recurrent(with_values(lambda u, v: seen.append((u.a.bias, v.b.bias))), 3, 5, bias=False)
    assert seen == [(None, None)]


def test_a_misspelt_gate_is_named() -> None:
    with pytest.raises(AttributeError, match=r"cell 'leaky' has no gate 'q'; its gates are: a, b"):
        fastrnn.Recurrent(with_values(lambda u, v: u.q.weight.zero_()), 3, 5)


def test_a_part_cannot_be_replaced() -> None:
    def replace(u: Any, v: Any) -> None:
        u.a.weight = torch.zeros(5, 3)

    with pytest.raises(AttributeError):
        fastrnn.Recurrent(with_values(replace), 3, 5)


def test_a_parametrized_weight_begins_where_it_is_stored() -> None:
    layer: Any = fastrnn.Recurrent(with_values(lambda u, v: v.a.weight.fill_(3)), 3, 5)
    parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    parametrizations.weight_norm(layer, "weight_ih_l0")
    layer.reset_parameters()
    assert (rows(layer, "weight_hh_l0", 0) == 6).all()


# Compiled code and saved layers do not depend on initial values.


def test_cells_that_begin_differently_share_their_code() -> None:
    cells = [with_values(None), with_values(lambda u, v: None)]
    assert cells[0] == cells[1]
    assert key(cells[0]) == key(cells[1])


@fastrnn.cell(gates="ab", states="h", initialize=lambda u, v: u.a.bias.fill_(4))
def beginning(u: Any, v: Any, h: Tensor) -> Tensor:
    return leaky(u, v, h)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copied_and_saved_layers_begin_as_before(again: Callable[[Any], Any]) -> None:
    layer: Any = fastrnn.Recurrent(beginning, 3, 5)
    with torch.no_grad():
        layer.bias_ih_l0.fill_(7)
    other = again(layer)
    assert (other.bias_ih_l0 == 7).all()
    other.reset_parameters()
    assert (rows(other, "bias_ih_l0", 0) == 4).all()
