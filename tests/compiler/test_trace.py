"""Which functions can be traced, which are refused, and what tracing cannot see."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrnn.cells import Cell
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import Underivable, derive
from tests.support.derivations import make, mgu


class Divided(torch.autograd.Function):
    """Its gradient is divided by a sum over the units."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy / (1 + dy.square().sum(-1, keepdim=True))


class Read(torch.autograd.Function):
    """Its gradient depends on the first number of a tensor."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy if dy.detach().numpy().ravel()[0] > 0.1 else 2 * dy


def hooked(u, v, h):
    y = u.a + v.a
    if y.requires_grad:
        y.register_hook(lambda dy: dy - dy.mean(-1, keepdim=True))
    return torch.tanh(y)


def with_set_data(u, v, h):
    y = torch.zeros_like(h)
    y.data = 3 * u.a.detach()
    return y * v.a


PARAMETER = torch.nn.Parameter(torch.tensor(0.5))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda u, v, h: h - h.mean(), "calls mean over all dimensions.*dim=-1"),
        (lambda u, v, h: h - h.mean(0), "calls mean over dimension 0.*dim=-1"),
        (lambda u, v, h: torch.softmax(h, 0), "calls softmax over dimension 0.*dim=-1"),
        (lambda u, v, h: F.rms_norm(h, h.shape[-1:]), "rms_norm without eps"),
        (lambda u, v, h: F.layer_norm(h, h.shape), r"normalized_shape \[2, 1031\]"),
        (lambda u, v, h: h * v(h * h).a + v.a, "block of gate 'a' with two values"),
        (lambda u, v, h: v(h * h).a * v(u.a).a, "block of gate 'a' with two values"),
        (lambda u, v, h: v(h.sum(-1, keepdim=True)).a, r"calls v with a tensor of shape \[1\]"),
        (lambda u, v, h: torch.cat([h, u.a], 0)[: len(h)], r"aten\.(cat|slice)"),
        (lambda u, v, h: torch.cat([h, u.a], -1)[..., 1:][..., : h.shape[-1]], r"aten\.slice"),
        (
            lambda u, v, h: h * h.max(-1, keepdim=True)[0],
            "calls max, which makes one number of the units",
        ),
        (lambda u, v, h: h.flip(-1), r"aten\.flip"),
        (lambda u, v, h: torch.cumsum(h, -1), r"aten\.cumsum"),
        (lambda u, v, h: h[..., :1] * h, "calls __getitem__, which takes some of the units.*mixed"),
        (lambda u, v, h: torch.atan(h), r"aten\.atan.*not among"),
        (lambda u, v, h: h * torch.rand_like(h), r"aten\.rand_like.*random"),
        (lambda u, v, h: F.dropout(h, 0.5, training=True), "random"),
        (lambda u, v, h: h if h.sum(-1) > 0 else u.a, "reads the value.*torch.where"),
        (lambda u, v, h: h if h > 0 else u.a, "reads the value.*torch.where"),
        (lambda u, v, h: h * h.mean(-1).item(), "reads the value.*torch.where"),
        (lambda u, v, h: h if torch.equal(h, u.a) else u.a, "reads the value.*torch.where"),
        (lambda u, v, h: h * float(h.detach().numpy().sum()), r"reads the value.*\(numpy\)"),
        (
            lambda u, v, h: h if np.asarray(h.detach())[0] > 9 else u.a,
            r"reads the value.*\(__array__\)",
        ),
        (lambda u, v, h: h if h.view(-1).tolist()[0] > 9 else u.a, r"reads the value.*\(tolist\)"),
        (lambda u, v, h: torch.tanh(Divided.apply(u.a + v.a)), "calls sum in a derivative of its"),
        (lambda u, v, h: torch.tanh(Read.apply(u.a + v.a)), r"reads the value.*\(numpy\)"),
        (lambda u, v, h: ((u.a > 0) * 2 & 3) * v.a, r"aten\.bitwise_and.*torch\.int64.*are bits"),
        (lambda u, v, h: ~torch.where(h > 0, 1, 2) * v.a, r"aten\.bitwise_not.*torch\.int64"),
        (
            lambda u, v, h: torch.full_like(h, 2.7, dtype=torch.int64) * v.a,
            r"torch\.int64.*rounded",
        ),
        (lambda u, v, h: torch.full_like(h, 99, dtype=torch.int8) * 2 * h, r"torch\.int8.*wrap"),
        (
            lambda u, v, h: torch.zeros_like(h, dtype=torch.int64).copy_(u.a.detach()) * v.a,
            r"torch\.int64.*rounded",
        ),
        (lambda u, v, h: u.a.view(torch.int64).view(torch.float64) + v.a, r"aten\.view\.dtype"),
        (
            lambda u, v, h: torch.tanh(u.a + v.a) * (2 if h.shape[-1] > 16 else 1),
            "the shape of its",
        ),
        (hooked, "calls mean in a derivative of its own"),
        (with_set_data, "sets the data of a tensor"),
        (lambda u, v, h: h * torch.nansum(h, -1, keepdim=True), "calls nansum, which makes one"),
        (lambda u, v, h: h.sum_to_size(*h.shape[:-1], 1) * h, "calls sum_to_size, which makes one"),
        (lambda u, v, h: h * h.sum(-1).sum(-1), "calls sum of a tensor of 0 dimensions"),
        (lambda u, v, h: h * h.sum(-1) + u.a, "keepdim=True"),
        (lambda u, v, h: h * (h > 0).sum(-1, keepdim=True), r"reduces a mask.*mask\.to"),
        (lambda u, v, h: v(h > 0).a, r"calls v with a mask.*mask\.to"),
        (lambda u, v, h: v(0.5).a + h, "calls v with a float"),
        (lambda u, v, h: v([h]).a, "calls v with a list"),
        (lambda u, v, h: torch.no_grad()(lambda: v(h * 2).a)() * h, "under no_grad"),
        (lambda u, v, h: torch.no_grad()(lambda: h.sum(-1, keepdim=True))() * h, "under no_grad"),
        (lambda u, v, h: h * PARAMETER, "not one of its arguments"),
        (lambda u, v, h: h * PARAMETER.detach().expand(h.shape), "not one of its arguments"),
        (lambda u, v, h: h * h.size(-1) ** -0.5, "depends on the shape"),
        (lambda u, v, h: h * random.random(), "another formula each time"),
        (lambda u, v, h: h.mul_(2), "writes into one of its arguments"),
        (lambda u, v, h: h.detach().mul_(2) + u.a, "writes into one of its arguments"),
        (lambda u, v, h: torch.relu(h) ** u.a, "constant exponent"),
        (lambda u, v, h: h.sum(-1), r"state 'h' of shape \[\]"),
        (lambda u, v, h: [1.0], "state 'h' a float"),
    ],
)
def test_what_is_no_pointwise_formula_is_refused_by_name(
    function: Callable[..., object], message: str
) -> None:
    with pytest.raises(Underivable, match=message) as refusal:
        derive(make("a", "h", function, "refused"))
    assert "'refused'" in str(refusal.value)


def test_constants_may_be_read_and_written() -> None:
    def structure(function: Callable[..., object]) -> str:
        return emit_cpp.struct(derive(make("a", "h", function, "constants")))

    def written(u, v, h):
        three = torch.tensor(1.0, dtype=torch.float64)
        three.add_(2)
        return u.a + h * three

    wanted = structure(lambda u, v, h: u.a + h * 3.0)
    assert structure(written) == wanted
    assert structure(lambda u, v, h: u.a + h * (torch.tensor(1.5) * 2).item()) == wanted
    assert structure(lambda u, v, h: u.a + h * 3 if torch.tensor(True) else h) == wanted
    assert structure(lambda u, v, h: u.a + h * torch.full_like(h, 3)) == wanted


def test_a_state_that_follows_from_no_argument_has_zero_gradients() -> None:
    nothing = derive(make("a", "h", lambda u, v, h: torch.zeros_like(h), "nothing"))
    one = derive(make("a", "h", lambda u, v, h: h * 0 + 1, "nothing"))
    assert "ds[0] = splat<V>(0.0)" in emit_cpp.struct(nothing)
    assert "ds[0] = " in emit_cpp.struct(one)


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
