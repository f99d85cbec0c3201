"""Declarations that make no cell are refused, with advice."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import cells
from tests.support.declarations import leaky, scaled, with_params, with_rows
from tests.support.paths import ROOT


def test_limits_are_those_of_the_kernels() -> None:
    source = (ROOT / "csrc" / "cpu" / "contract.h").read_text()
    limits = dict(re.findall(r"constexpr int (kMax\w+) = (\d+);", source))
    assert int(limits["kMaxGates"]) == cells.MAX_GATES
    assert int(limits["kMaxStates"]) == cells.MAX_STATES
    assert int(limits["kMaxParams"]) == cells.MAX_PARAMS


@pytest.mark.parametrize(("kind", "most"), [("gates", 16), ("states", 8)])
def test_no_more_than_the_kernels_take(kind: str, most: int) -> None:
    letters = "abcdefghijklmnopq"
    options: dict[str, Any] = {"gates": "a", "states": "h"}
    fastrnn.cell(**options | {kind: letters[:most]}, name="largest")(lambda u, v, *s: s)
    with pytest.raises(ValueError, match=f"'larger' has {most + 1} {kind}, .* at most {most};"):
        fastrnn.cell(**options | {kind: letters[: most + 1]}, name="larger")(lambda u, v, *s: s)
    assert "larger" not in cells.names()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"inputs": "c"}, "inputs of cell 'wrong' names the gates .* are a, b, got c"),
        ({"recurrent": "aa"}, "recurrent of cell 'wrong' names .* each once.* got a, a"),
        ({"inputs": ""}, "no gate with input rows, so it would not see its input"),
        ({"inputs": "a", "recurrent": "a"}, "gate 'b' of cell 'wrong' has neither .* gates="),
    ],
)
def test_rows_that_cannot_be(rows: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_rows("wrong", **rows)
    assert "wrong" not in cells.names()


@pytest.mark.parametrize("missing", ["gates", "states"])
def test_gates_and_states_must_be_given(missing: str) -> None:
    options: dict[str, Any] = {"gates": "a", "states": "h"}
    del options[missing]
    with pytest.raises(ValueError, match=rf"at least one of {missing}: cell\({missing}=...\)"):
        fastrnn.cell(**options)(leaky)


@pytest.mark.parametrize(
    "function",
    [lambda u, v: v, lambda u, v, h, c: h, lambda u, v, h, *, rate: h],
    ids=["too few", "too many", "a keyword that nobody gives"],
)
def test_functions_that_cannot_be_called(function: Any) -> None:
    with pytest.raises(ValueError, match=r"'wrong' must be a function of \(u, v, h\), any further"):
        fastrnn.cell(gates="a", states="h", name="wrong")(function)


def test_initial_values_need_a_function_of_two() -> None:
    options: dict[str, Any] = {"gates": "a", "states": "h", "name": "wrong"}
    with pytest.raises(TypeError, match=r"of cell 'wrong' must be a function of \(u, v\), got int"):
        fastrnn.cell(**options, initialize=3)(leaky)  # type: ignore[arg-type]
    for function in (lambda u: None, lambda u, v, w: None):
        with pytest.raises(ValueError, match=r"of \(u, v\), any further .*; got \(u"):
            fastrnn.cell(**options, initialize=function)(leaky)
    assert "wrong" not in cells.names()
    made = fastrnn.cell(**options, initialize=lambda u, v, by=1: None)(leaky)
    assert made.initialize is not None


def test_params_are_of_a_kind() -> None:
    made = with_params(rate="unit", other=fastrnn.Param("one", init=2.0))
    assert made.params == {"rate": fastrnn.Param("unit"), "other": fastrnn.Param("one", 2.0)}
    x = torch.full((1, 2), 3.0)
    assert torch.equal(made.step([x], [x], [x], [x, x])[0], x * x + x)
    for wrong in ("units", 3, fastrnn.Param("gate"), None):
        with pytest.raises(ValueError, match="'rate' of cell 'wrong' must be 'unit'"):
            with_params("wrong", rate=wrong)
    assert "wrong" not in cells.names()


@pytest.mark.parametrize("name", ["ih", "hh", "hr", "a b", "", "lambda"])
def test_params_that_cannot_be_named(name: str) -> None:
    with pytest.raises(ValueError, match="params of cell 'wrong' must be identifiers other than"):
        with_params("wrong", **{name: "unit"})


def test_no_more_params_than_the_kernels_take() -> None:
    many = {f"p{k}": "one" for k in range(33)}
    with pytest.raises(ValueError, match=r"'wrong' has 33 params, .* at most 32;"):
        with_params("wrong", **many)


def test_the_function_takes_params_only_if_there_are_some() -> None:
    with pytest.raises(ValueError, match=r"'wrong' must be a function of \(u, v, p, h\), any"):
        fastrnn.cell(gates="a", states="h", name="wrong", params={"rate": "unit"})(
            lambda u, v, h: h
        )
    with pytest.raises(ValueError, match=r"'wrong' must be a function of \(u, v, h\), any"):
        fastrnn.cell(gates="a", states="h", name="wrong")(scaled)


def test_a_function_that_forgets_its_params() -> None:
    with pytest.raises(ValueError, match="the third argument is `p`, the learned parameters"):
        fastrnn.cell(gates="a", states="h", name="wrong", params={"rate": "unit"})(
            lambda u, v, h, scale=0.5: h
        )
