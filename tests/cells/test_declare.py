"""Declaring cells: what is declared, and what it computes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cells, kernels
from tests.support.declarations import leaky, scaled, step, with_params, with_rows


def test_gates_with_rows() -> None:
    every = with_rows()
    assert every.inputs == every.recurrent == every.gates and every.has_all_rows
    some = with_rows(inputs=["a"], recurrent="b")
    assert (some.inputs, some.recurrent) == (("a",), ("b",)) and not some.has_all_rows
    assert some != every
    in_order = with_rows(inputs="ba", recurrent="")
    assert (in_order.inputs, in_order.recurrent) == (("a", "b"), ())
    one, other = torch.ones(1, 2), torch.zeros(1, 2)
    (after,) = some.step([one], [other], [one])
    assert torch.equal(after, torch.sigmoid(one))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"recurrent": "b"},
            r"'unread' declares inputs=\"ab\", but its result does not depend on u\.b, so those "
            r"rows of weight_ih would be learned .* write inputs=\"a\", or read u\.b",
        ),
        ({"inputs": "a"}, r"recurrent=\"ab\", .* on v\.a, .* weight_hh .* recurrent=\"b\""),
    ],
)
def test_rows_that_nothing_reads(rows: dict[str, str], message: str) -> None:
    layer = fastrnn.Recurrent(with_rows("unread", **rows), 3, 5)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(4, 2, 3))


def test_torchs_layout_may_have_rows_that_nothing_reads() -> None:
    layer = fastrnn.Recurrent(with_rows("all_rows"), 3, 5)
    with kernels.use("reference"):
        layer(torch.randn(4, 2, 3))
    assert layer.weight_hh_l0.shape == (10, 5)


def test_variants_have_the_rows_of_their_cell() -> None:
    cell = with_rows("varied", inputs="a", recurrent="b")
    for made in (cells.zoneout(cell, 0.1), cells.clip_grad(cell, 1.0), cell.noisy):
        assert (made.inputs, made.recurrent) == (("a",), ("b",))


def test_cell_must_be_called() -> None:
    with pytest.raises(TypeError, match=r'write @fastrnn\.cell\(gates="fn", states="h"\) above'):

        @fastrnn.cell
        def forgotten(u: Any, v: Any, h: Tensor) -> Tensor:
            return h


def test_parameters_with_defaults_are_the_functions_own() -> None:
    made = fastrnn.cell(gates="a", states="h")(leaky)
    torch.testing.assert_close(step(made), torch.full((1, 2), 0.125).add(torch.tensor(0.5).tanh()))
    layer = fastrnn.Recurrent(made, 3, 5)
    assert layer(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)


def test_partial_functions() -> None:
    slow = functools.partial(leaky, rate=0.0)
    with pytest.raises(ValueError, match=r"partial objects cannot name .*cell\(name=...\)"):
        fastrnn.cell(gates="a", states="h")(slow)
    made = fastrnn.cell(gates="a", states="h", name="slow")(slow)
    torch.testing.assert_close(step(made), torch.tensor(0.5).tanh().expand(1, 2))
    layer = fastrnn.Recurrent(made, 3, 5)
    assert layer(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)


def test_lambdas_need_a_name() -> None:
    with pytest.raises(ValueError, match=r"a lambda cannot name the cell; pass cell\(name=...\)"):
        fastrnn.cell(gates="a", states="h")(lambda u, v, h: h)
    made = fastrnn.cell(gates="a", states="h", name="keep")(lambda u, v, h: h)
    assert cells.get("keep") is made


def test_only_functions() -> None:
    with pytest.raises(TypeError, match="made from a function, got int"):
        fastrnn.cell(gates="a", states="h")(3)  # type: ignore[arg-type]


def test_the_order_of_params_is_part_of_a_cell() -> None:
    """It is the order of compiled code."""
    one, other = with_params(rate="unit", more="unit"), with_params(more="unit", rate="unit")
    assert one != other and one == with_params(rate=fastrnn.Param(init=2.0), more="unit")
    layers: Any = [fastrnn.Recurrent(cell, 3, 5) for cell in (one, other)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(4, 2, 3)
    assert torch.equal(layers[0](x)[0], layers[1](x)[0])


def test_params_are_a_dict() -> None:
    for wrong in (["rate"], "rate"):
        with pytest.raises(TypeError, match="params should be a dict of names and kinds"):
            fastrnn.cell(gates="a", states="h", name="wrong", params=wrong)(scaled)  # type: ignore[arg-type]


def test_first_values_are_written_in_place() -> None:
    made = with_params(rate=fastrnn.Param(init=torch.ones_like))
    with pytest.raises(TypeError, match=r"should fill the tensor in place, but .*ones_like"):
        fastrnn.Recurrent(made, 3, 5)

    def replaces(u: Any, v: Any, p: Any) -> None:
        p.rate = torch.ones(5)

    made = fastrnn.cell(
        gates="a", states="h", name="replacing", params={"rate": "unit"}, initialize=replaces
    )(scaled)
    with pytest.raises(TypeError, match=r"replaced p\.rate, .* as p\.rate\.fill_\(1\) does"):
        fastrnn.Recurrent(made, 3, 5)
