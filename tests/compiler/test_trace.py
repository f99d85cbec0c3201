"""Which functions can be traced, which are refused, and what tracing cannot see."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrnn.cells import Cell
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import Underivable, derive
from tests.support.derivations import make, mgu

PARAMETER = torch.nn.Parameter(torch.tensor(0.5))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda u, v, h: h - h.mean(-1, keepdim=True), r"aten\.mean\.dim.*mixed"),
        (lambda u, v, h: h.flip(-1), r"aten\.flip"),
        (lambda u, v, h: torch.softmax(h, -1), r"aten\._softmax"),
        (lambda u, v, h: torch.cumsum(h, -1), r"aten\.cumsum"),
        (lambda u, v, h: h[..., :1] * h, r"aten\.slice\.Tensor.*mixed"),
        (lambda u, v, h: F.layer_norm(h, h.shape[-1:]), "native_layer_norm.*mixed"),
        (lambda u, v, h: torch.atan(h), r"aten\.atan.*not among"),
        (lambda u, v, h: h * torch.rand_like(h), r"aten\.rand_like.*random"),
        (lambda u, v, h: F.dropout(h, 0.5, training=True), "random"),
        (lambda u, v, h: h if h.sum() > 0 else u.a, "reads the value.*torch.where"),
        (lambda u, v, h: h if h > 0 else u.a, "reads the value.*torch.where"),
        (lambda u, v, h: h * h.mean().item(), "reads the value.*torch.where"),
        (lambda u, v, h: h * PARAMETER, "not one of its arguments"),
        (lambda u, v, h: h * PARAMETER.detach().expand(h.shape), "not one of its arguments"),
        (lambda u, v, h: h * h.size(-1) ** -0.5, "depends on the shape"),
        (lambda u, v, h: h * random.random(), "another formula each time"),
        (lambda u, v, h: h.mul_(2), "writes into one of its arguments"),
        (lambda u, v, h: h.detach().mul_(2) + u.a, "writes into one of its arguments"),
        (lambda u, v, h: h.float().double(), "converts torch.float64 to torch.float32"),
        (lambda u, v, h: torch.relu(h) ** u.a, "constant exponent"),
        (lambda u, v, h: h.sum(), r"state 'h' of shape \[\]"),
        (lambda u, v, h: h.float(), "state 'h' of shape .* and torch.float32"),
        (lambda u, v, h: [1.0], "state 'h' a float"),
    ],
)
def test_what_is_no_pointwise_formula_is_refused_by_name(
    function: Callable[..., object], message: str
) -> None:
    with pytest.raises(Underivable, match=message) as refusal:
        derive(make("a", "h", function, "refused"))
    assert "'refused'" in str(refusal.value)


def test_an_error_of_the_function_itself_stays_that_error() -> None:
    with pytest.raises(AttributeError, match="'q'"):
        derive(make("a", "h", lambda u, v, h: u.q, "wrong"))
    with pytest.raises(ValueError, match="returned 2 states, but was declared with 1"):
        derive(make("a", "h", lambda u, v, h: (h, h), "wrong"))


def test_deriving_does_not_see_the_modes_of_the_caller() -> None:
    def fresh() -> Cell:
        return make("fn", "h", lambda u, v, h: mgu(u, v, h), "mode")

    want = emit_cpp.struct(derive(fresh()))
    with FakeTensorMode():
        assert emit_cpp.struct(derive(fresh())) == want
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert emit_cpp.struct(derive(fresh())) == want

    def inside(x: Tensor) -> Tensor:
        assert emit_cpp.struct(derive(fresh())) == want
        return x.sum()

    torch.func.vmap(torch.func.grad(inside))(torch.ones(2, 3))
