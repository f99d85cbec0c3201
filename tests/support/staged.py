"""Cells whose units need each other within a step, in every way that code is derived for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import sigmoid, tanh

from tests.support.derivations import make

__all__ = ["USERS"]


def moments(u: Any, v: Any, h: Any, c: Any) -> Any:
    a = u.a + v.a
    c = c + a.mean(-1, keepdim=True) * u.b
    return tanh(a / (1 + a.std(-1, keepdim=True))) + c * a.var(-1, correction=0, keepdim=True), c


def squeezed(u: Any, v: Any, h: Any, c: Any) -> Any:
    total, least = (u.a * h).sum(-1), (v.b + c).amin(dim=-1)
    return tanh(u.a + total.unsqueeze(-1)), c * 0.5 + v.a * least.unsqueeze(-1) + u.b


def largest(u: Any, v: Any, h: Any, c: Any) -> Any:
    a = tanh(u.a + v.a)
    return h * 0.5 + a / (1 + a.abs().amax(-1, keepdim=True)), c + u.b


def softmaxes(u: Any, v: Any, h: Any, c: Any) -> Any:
    a, b = torch.softmax(u.a + v.a, -1), F.log_softmax(u.b, dim=-1)
    return tanh(5 * a + c), tanh(b + v.b * torch.logsumexp(h, -1, keepdim=True))


def side_by_side(u: Any, v: Any, h: Any, c: Any) -> Any:
    both = torch.cat([u.a + v.a, u.b + v.b], -1)
    a, b = F.softmax(F.layer_norm(both, both.shape[-1:]), -1).chunk(2, -1)
    least = both.amin(-1, keepdim=True)
    return tanh(3 * a + h), c * b + tanh(both[..., h.shape[-1] :]) / (1 + least * least)


def of_every_state(u: Any, v: Any, h: Any, c: Any) -> Any:
    """A product of another state, one of a norm of the state, and a norm of the next state."""
    a, b = v(F.layer_norm(h, h.shape[-1:])).a, v(c).b
    c = tanh(u.b + b) * c + a
    return F.rms_norm(c + u.a, c.shape[-1:], eps=1e-5), c


def one_after_the_other(u: Any, v: Any, h: Any, c: Any) -> Any:
    a = tanh(u.a + v(tanh(h)).a)
    b = v(a * c).b
    return tanh(u.b + b + b.mean(-1, keepdim=True)), sigmoid(b) * c


def norm_twice(u: Any, v: Any, h: Any, c: Any) -> Any:
    """Reductions whose results meet no unit, and one of an input alone."""
    ratio = (u.a.sum(-1, keepdim=True) / (1 + (h * h).sum(-1, keepdim=True))).tanh()
    return h * 0.3 + u.b + ratio, c * ratio + v.a + v.b


def variances(u: Any, v: Any, h: Any, c: Any) -> Any:
    """Of one only the mean is read again by the backward pass."""
    a = u.b.var(-1, keepdim=True) - 2 * v.b.var(-1, keepdim=True)
    return tanh(u.a + v.a + a), c + h.mean(-1, keepdim=True)


def written_after(u: Any, v: Any, h: Any, c: Any) -> Any:
    """What was reduced or multiplied is written into later."""
    a = u.a + c
    total = a.sum(-1, keepdim=True)
    a += 1
    a -= a.mean(-1, keepdim=True)
    b = u.b * h
    product = v(b)
    b.mul_(2)
    return tanh(a + total + b), tanh(product.a + b) * product.b


def of_rows(u: Any, v: Any, h: Any, c: Any) -> Any:
    """Reductions of a number for each row, and by other spellings."""
    total = h.sum(-1, keepdim=True).sum(-1, keepdim=True)
    whole = (
        torch.sum(input=c, dim=-1, keepdim=True)
        + c.sum(axis=-1, keepdim=True)
        + total.amax(-1, keepdim=True)
    )
    both = torch.cat([u.a, v.b], -1).mean(-1, keepdim=True).expand(*h.shape[:-1], 2 * h.shape[-1])
    a, b = both.chunk(2, -1)
    return tanh(u.a + v.a + total + a), tanh(u.b * whole + v.b + b)


def masks(u: Any, v: Any, h: Any, c: Any) -> Any:
    """Masks of rows and of units, on both sides of a norm."""
    mask = torch.sin(3 * u.a) > torch.cos(2 * v.a)
    a = F.layer_norm(torch.where(mask, h, c), h.shape[-1:])
    return torch.where(v.b.mean(-1, keepdim=True) > 0, a, u.b), torch.where(mask, a * c, u.a)


def summed_products(u: Any, v: Any, h: Any, c: Any) -> Any:
    """All gates are summed, and yet their rows multiply different values."""
    a = tanh(u.a + v.a)
    return tanh(u.b + v(a * c).b), c * 0.5 + a


USERS = [
    make("ab", "hc", function)
    for function in (
        variances,
        written_after,
        of_rows,
        masks,
        moments,
        squeezed,
        largest,
        softmaxes,
        side_by_side,
        of_every_state,
        one_after_the_other,
        norm_twice,
        summed_products,
    )
]
