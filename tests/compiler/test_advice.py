"""What the author of a cell that cannot be derived is told: what it did, and what to write."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrnn
from fastrnn import kernels
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import Underivable, derive
from tests.support.derivations import make

MATRIX, LINEAR = torch.ones(6, 6), torch.nn.Linear(6, 6)


def written_by_index(u, v, h):
    z = torch.tanh(u.a + v.a)
    z[..., 0] = 0
    return z


def written_by_index_of_a_sum(u, v, h):
    z = u.a + v.a
    z[..., 0] = 0
    return z


def written_by_mask(u, v, h):
    z = torch.tanh(u.a + v.a)
    z[z < 0] = 0
    return z


def written_in_place(u, v, h):
    z = u.a * v.a
    y = z * z
    return z.tanh_() * y


def scaled_in_place(u, v, h):
    z = torch.tanh(u.a + v.a)
    z *= 0.5
    return z


def chosen(u, v, h):
    return torch.cond(h.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (h,))


def chosen_by_a_mask(u, v, h):
    return torch.cond((h > 0).all(), lambda a: a.sin(), lambda a: a.cos(), (h,))


BRANCH = ["reads the value of a tensor", "branch", "torch.where"]
PRODUCT = ["a product of matrices", "v(x).a", "a further gate"]
NORM = ["F.layer_norm(x, x.shape[-1:])", "F.rms_norm(x, x.shape[-1:], eps=", "heads="]
MOVED = ["takes some of the units", "or moves them", "a gate or a state of its own"]


@pytest.mark.parametrize(
    ("function", "fragments"),
    [
        (lambda u, v, h: F.batch_norm(v.a, None, None, training=True), ["batch_norm", *NORM]),
        (lambda u, v, h: F.group_norm(h, 2), ["calls group_norm", *NORM]),
        (lambda u, v, h: F.normalize(h, dim=-1), ["normalize", "(x * x).sum(-1, keepdim=True)"]),
        (lambda u, v, h: torch.tanh(u.a + h @ MATRIX), ["calls matmul", *PRODUCT]),
        (lambda u, v, h: torch.tanh(LINEAR(h)), ["calls linear", *PRODUCT]),
        (lambda u, v, h: torch.einsum("...i,...i->...i", h, u.a), ["calls einsum", *PRODUCT]),
        (lambda u, v, h: (h[..., None] @ u.a[..., None, :]).sum(-1), ["calls matmul", *PRODUCT]),
        (
            lambda u, v, h: (h.unsqueeze(-1) * u.a.unsqueeze(-2)).sum(-1),
            ["sum of a tensor of 2 dimensions", "no outer products", "(x * y).sum(-1, keepdim="],
        ),
        (lambda u, v, h: h if h.mean() > 0 else u.a, BRANCH),
        (lambda u, v, h: h if torch.any(h > 0) else u.a, BRANCH),
        (lambda u, v, h: h * h.mean().item(), BRANCH),
        (lambda u, v, h: u.a + v.a(h * h), ["calls a tensor", "v(x).a"]),
        (chosen, [*BRANCH, "torch.cond"]),
        (chosen_by_a_mask, [*BRANCH, "torch.cond"]),
        (written_by_index, ["some of the units", "torch.where(z < 0, 0, z)"]),
        (written_by_index_of_a_sum, ["some of the units", "torch.where(z < 0, 0, z)"]),
        (written_by_mask, ["some of the units", "torch.where(z < 0, 0, z)"]),
        (written_in_place, ["its gradient needs (tanh_)", "z = torch.tanh(z)"]),
        (scaled_in_place, ["its gradient needs (mul_)", "z = z * 0.5"]),
        (lambda u, v, h: torch.cat(h.chunk(2, -1)[::-1], -1), ["calls chunk", *MOVED]),
        (lambda u, v, h: h.chunk(2, -1)[0] * u.a, ["calls chunk", *MOVED]),
        (lambda u, v, h: torch.roll(h, 1, -1), ["calls roll", *MOVED]),
        (lambda u, v, h: h.sort(-1)[0], ["calls sort", *MOVED]),
        (lambda u, v, h: h / h.shape[-1], ["x.mean(-1, keepdim=True)", "ones_like(x).sum(-1"]),
        (lambda u, v, h: h.view(-1, 2, 3).sum(1), ["calls view", "changes the shape"]),
        (lambda u, v, h: torch.linalg.svd(h)[1], ["linalg_svd, which fails", "for some numbers"]),
        (lambda u, v, h: torch.cat([h, h], -1), ["state 'h' of shape [6]", "for each unit"]),
        (lambda u, v, h: v(torch.cat([h, h], -1)).a, ["v with a tensor of shape [6]"]),
    ],
)
def test_the_author_is_told_what_to_write(
    function: Callable[..., Any], fragments: list[str]
) -> None:
    with pytest.raises(Underivable) as refusal:
        derive(make("a", "h", function, "refused"))
    missing = [f for f in ("cell 'refused'", *fragments) if f not in str(refusal.value)]
    assert not missing, str(refusal.value)


def test_errors_of_torch_are_chained() -> None:
    with pytest.raises(Underivable) as refusal:
        derive(make("a", "h", lambda u, v, h: torch.linalg.svd(h)[1], "chained"))
    assert "at least 2 dimensions" in str(refusal.value.__cause__)


@pytest.mark.parametrize("returned", [0.5, None])
def test_what_is_no_state(returned: Any) -> None:
    with pytest.raises(TypeError, match=r"'stateless' returned a .*a tensor for each state.* h, c"):
        derive(make("a", "hc", lambda u, v, h, c: returned, "stateless"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda u, v, h: torch.cat([h, h], -1), r"'wide' returned state 'h' of shape \[2, 14\]"),
        (lambda u, v, h: v(torch.cat([h, h], -1)).a, r"'wide' calls v with .* \[2, 14\]"),
        (lambda u, v, h: [1.0], "'wide' returned state 'h' a float"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_reference_says_it_too(function: Callable[..., Any], message: str) -> None:
    layer = fastrnn.Recurrent(make("a", "h", function, "wide"), 5, 7)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(3, 2, 5))


# Dtypes: what a cell says about them means the same for every kernel and every dtype of the layer.


def rounded(u, v, h):
    return (((u.a + v.a).double() + 1e9) - 1e9).to(h.dtype)


def into_float32(u, v, h):
    return torch.zeros(h.shape).copy_(u.a) * v.a


def by_dtype(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda u, v, h: u.a * 2 if h.dtype == dtype else u.a + v.a


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (rounded, "calls double"),
        (lambda u, v, h: torch.tanh(u.a + v.a).double(), "calls double"),
        (lambda u, v, h: torch.tanh(u.a + v.a).float(), "calls float"),
        (lambda u, v, h: h.half().to(h.dtype), "calls half"),
        (lambda u, v, h: h.bfloat16().to(h.dtype), "calls bfloat16"),
        (lambda u, v, h: h.to(torch.float64).to(h.dtype), "calls to"),
        (lambda u, v, h: h.to(torch.float32).to(h.dtype), "calls to"),
        (lambda u, v, h: h.type(torch.float64).type_as(h), "calls type"),
        (lambda u, v, h: h.type_as(torch.ones(1)).to(h.dtype), "calls type_as"),
        (lambda u, v, h: torch.softmax(h, -1, torch.float64).to(h.dtype), "calls softmax"),
        (lambda u, v, h: F.softmax(h, -1, dtype=torch.float32).to(h.dtype), "calls softmax"),
        (lambda u, v, h: h.sum(-1, True, dtype=torch.float64).to(h.dtype) * h, "calls sum"),
        (lambda u, v, h: h.mean(-1, True, dtype=torch.float64).to(h.dtype) * h, "calls mean"),
        (lambda u, v, h: u.a + torch.zeros(h.shape, dtype=torch.float64), "calls add"),
        (lambda u, v, h: h * torch.zeros_like(h, dtype=torch.float64), "calls zeros_like"),
        (lambda u, v, h: u.a * (h > 0).double(), "calls mul"),
        (lambda u, v, h: torch.where(h > 0, 0.1, 0.2).exp() * u.a, "calls exp"),
        (into_float32, "calls copy_"),
        (lambda u, v, h: F.prelu(u.a, torch.tensor(0.2)), "meets tensors of several dtypes"),
        (by_dtype(torch.float64), "in torch.float32 than in torch.float64"),
        (by_dtype(torch.float32), "in torch.float32 than in torch.float64"),
        (by_dtype(torch.float16), "in torch.float16 than in torch.float64"),
        (by_dtype(torch.bfloat16), "in torch.bfloat16 than in torch.float64"),
        (lambda u, v, h: u.a + torch.finfo(h.dtype).eps, "in torch.float32 than"),
        (lambda u, v, h: u.a * h.element_size(), "in torch.float32 than"),
        (lambda u, v, h: torch.nan_to_num(u.a) + v.a, "in torch.float32 than"),
    ],
)
def test_a_dtype_of_its_own_is_refused(function: Callable[..., Any], said: str) -> None:
    wanted = f"cell 'cast'.*{re.escape(said)}.*computed in the dtype of its layer.*to\\(h.dtype\\)"
    with pytest.raises(Underivable, match=wanted):
        derive(make("a", "h", function, "cast"))


def in_float32_if_half(u, v, h):
    return u.a.float() * v.a.float() if h.dtype == torch.float16 else u.a * v.a


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (lambda u, v, h: (u.a * v.a).to(h.dtype), lambda u, v, h: u.a * v.a),
        (lambda u, v, h: (u.a * v.a).type_as(h), lambda u, v, h: u.a * v.a),
        (in_float32_if_half, lambda u, v, h: u.a * v.a),
        (
            lambda u, v, h: u.a - torch.softmax(v.a, -1, dtype=h.dtype),
            lambda u, v, h: u.a - torch.softmax(v.a, -1),
        ),
        (
            lambda u, v, h: u.a + v.a * torch.full(h.shape, 0.3, dtype=h.dtype),
            lambda u, v, h: u.a + v.a * 0.3,
        ),
        (
            lambda u, v, h: u.a + v.a * h.new_tensor(0.5),
            lambda u, v, h: u.a + v.a * 0.5,
        ),
        (
            lambda u, v, h: u.a * torch.tensor(0.3, dtype=torch.float64) * v.a,
            lambda u, v, h: u.a * 0.3 * v.a,
        ),
        (
            lambda u, v, h: (h > 0).float() * u.a + (1 - (v.a > 0).float()) * h,
            lambda u, v, h: (h > 0) * u.a + (1 - (v.a > 0).to(h.dtype)) * h,
        ),
        (
            lambda u, v, h: torch.where(h > 0, 0.25, 2.0) * u.a,
            lambda u, v, h: torch.where(h > 0, 0.25 * torch.ones_like(h), 2.0) * u.a,
        ),
    ],
)
def test_what_does_nothing_to_a_dtype_is_nothing(
    function: Callable[..., Any], same: Callable[..., Any]
) -> None:
    one, other = (derive(make("a", "h", each, "same")) for each in (function, same))
    assert emit_cpp.struct(one) == emit_cpp.struct(other)


def test_a_number_of_a_fixed_dtype_has_the_digits_of_that_dtype() -> None:
    def function(u, v, h):
        return torch.where(h > 0, 0.1, 0.2) * u.a * (torch.tensor(0.1) * 3) + v.a

    cell = make("a", "h", function, "digits")
    values = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    u, v, s = ([value] for value in values)
    torch.testing.assert_close(
        derive(cell).forward(u, v, s)[0], cell.step(u, v, s), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore")
def test_kernel_and_reference_see_the_same_cast(dtype: torch.dtype) -> None:
    layer = fastrnn.Recurrent(make("a", "h", rounded, "rounded"), 5, 7).to(dtype)
    x = torch.randn(3, 2, 5, dtype=dtype)
    output = layer(x)[0]
    with kernels.use("reference"):
        assert torch.equal(layer(x)[0], output)
    assert output.count_nonzero()
