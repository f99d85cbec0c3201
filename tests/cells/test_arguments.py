"""The arguments of a cell's function."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastrnn
from fastrnn import cells, kernels
from fastrnn.cells import Gates
from tests.support.declarations import step, with_params, with_rows


def test_a_misspelt_gate_is_named() -> None:
    @fastrnn.cell(gates="fn", states="h")
    def misspelt(u: Any, v: Any, h: Tensor) -> Tensor:
        return h + u.q

    with pytest.raises(AttributeError, match=r"cell 'misspelt' has no gate 'q'; .* are: f, n"):
        step(misspelt)
    with pytest.raises(AttributeError, match="cell 'misspelt' has no gate 'q'"):
        fastrnn.Recurrent(misspelt, 3, 5)(torch.randn(4, 2, 3))


def test_a_misspelt_parameter_is_named() -> None:
    made = with_params(ratio="unit", bias="one")
    with pytest.raises(
        AttributeError, match="'learning' has no parameter 'rate'; its parameters are: ratio, bias"
    ):
        fastrnn.Recurrent(made, 3, 5)(torch.randn(4, 2, 3))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"recurrent": "a"},
            "'reading' reads v.b, but its gate 'b' has no recurrent rows: it was declared with "
            "recurrent=\"a\"; add 'b' there, or do without v.b",
        ),
        (
            {"inputs": "b"},
            "'reading' reads u.a, but its gate 'a' has no input rows: it was declared with "
            "inputs=\"b\"; add 'a' there, or do without u.a",
        ),
    ],
)
def test_a_function_that_reads_rows_that_are_not_there(rows: dict[str, str], message: str) -> None:
    """In layers, whichever kernel runs them."""
    layer = fastrnn.Recurrent(with_rows("reading", **rows), 3, 5)
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel), pytest.raises(AttributeError, match=re.escape(message)):
            layer(torch.randn(4, 2, 3))


def test_gates_can_be_copied() -> None:
    """`copy` asks an object that has no attributes yet for some."""
    x = torch.randn(2)
    assert torch.equal(copy.copy(Gates(cells.rnn_tanh, [x])).h, x)


def test_gates_are_transparent_to_tracers() -> None:
    x = torch.randn(3)

    def call(x: Tensor) -> Tensor:
        return cells.gru.step([x, 2 * x, 3 * x], [x, x, x], [x])[0]

    wanted = call(x)
    torch.testing.assert_close(make_fx(call)(x)(x), wanted)
    torch.testing.assert_close(torch.func.vmap(call)(x), wanted)
    torch.testing.assert_close(torch.func.vjp(call, x)[0], wanted)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted)
