"""Cells of users that several files test layers with: each cell takes seconds to compile."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrnn


@fastrnn.cell(gates="fn", states="h", name="shared_mgu")
def minimal(u: Any, v: Any, h: Tensor) -> Tensor:
    """Minimal gated unit, Zhou et al. 2016, arXiv:1603.09420."""
    f = torch.sigmoid(u.f + v.f)
    return (1 - f) * h + f * torch.tanh(u.n + f * v.n)


@fastrnn.cell(
    gates="ifgo",
    states="hc",
    params={
        "pi": "unit",
        "pf": fastrnn.Param(init=torch.nn.init.normal_),
        "po": fastrnn.Param("unit", init=0.5),
        "scale": "one",
    },
)
def peepholes(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Long short-term memory with peepholes (Gers & Schmidhuber 2000), and a learned scale."""
    i, f = torch.sigmoid(u.i + v.i + p.pi * c), torch.sigmoid(u.f + v.f + p.pf * c)
    c = f * c + i * torch.tanh(p.scale * (u.g + v.g))
    return torch.sigmoid(u.o + v.o + p.po * c) * torch.tanh(c), c


@fastrnn.cell(
    gates="ifgo",
    states="hc",
    params={
        "gain": fastrnn.Param("gates", init=1.0),
        "bias": fastrnn.Param("gates", init=torch.nn.init.normal_),
        "peep": fastrnn.Param("unit", init=torch.nn.init.normal_),
        "scale": fastrnn.Param("one", init=0.7),
    },
    name="shared_staged",
)
def staged(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """What makes stages: a product of another value, a norm over all gates, a maximum."""
    f = torch.sigmoid(u.f + v.f + p.peep * c)
    a = torch.cat([u.i + v.i, u.f * v.f, u.g + v(f * h).g, u.o + v.o], -1)
    i, k, g, o = F.layer_norm(a, a.shape[-1:], p.gain, p.bias).chunk(4, -1)
    c = f * c + torch.sigmoid(i) * torch.tanh(g + p.scale * k)
    return torch.sigmoid(o) * torch.tanh(c / (1 + c.abs().amax(-1, keepdim=True))), c


@fastrnn.cell(
    gates="ifgo",
    states="hc",
    params={"gain": fastrnn.Param("gates", init=1.0)},
    name="shared_normed",
)
def normed(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A norm over all gates, a largest unit, and an output that may be projected."""
    a = torch.cat([u.i + v.i, u.f + v.f, u.g + v.g, u.o + v.o], -1)
    i, f, g, o = F.layer_norm(a, a.shape[-1:], p.gain).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c / (1 + c.abs().amax(-1, keepdim=True))), c


@fastrnn.cell(gates="ifgo", states="hc", params={"scale": "one"}, name="shared_noisy")
def noisy(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Zoneout of c, dropout of the candidate at every step, and of the output once a sequence."""
    i, f, o = torch.sigmoid(u.i + v.i), torch.sigmoid(u.f + v.f), torch.sigmoid(u.o + v.o)
    stay = fastrnn.bernoulli(0.3)
    new = f * c + i * fastrnn.dropout(torch.tanh(u.g + v.g), 0.25) * p.scale
    c = stay * c + (1 - stay) * new
    return fastrnn.dropout(o, 0.5, per="sequence") * torch.tanh(c), c


@fastrnn.cell(
    gates="ifgo",
    states="hc",
    params={"gain": fastrnn.Param("unit", init=1.0)},
    name="shared_noisy_staged",
)
def noisy_staged(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The same of what the recurrent weights multiply, and of a norm."""
    v = v(fastrnn.dropout(h, 0.25, per="sequence"))
    i, f, o = torch.sigmoid(u.i + v.i), torch.sigmoid(u.f + v.f), torch.sigmoid(u.o + v.o)
    c = f * c + i * torch.tanh(u.g + v.g)
    norm = F.layer_norm(fastrnn.dropout(c, 0.5), c.shape[-1:], p.gain)
    return o * torch.tanh(norm), c


def _mixed(u: Any, v: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.sigmoid(u.f + v.f) * c + torch.tanh(u.w) * torch.sigmoid(v.a)
    return torch.tanh(c + u.n * v.n), c


def _staged_rows(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    f = torch.sigmoid(F.layer_norm(v.a, h.shape[-1:], p.gain))
    return f * h + (1 - f) * torch.tanh(u.n + u.w + v(f * h).n)


def _apart(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.sigmoid(u.f + p.r * c) * c + u.w
    return torch.tanh(c), c


# Cells of which gates lack rows of one matrix, in every order, and the same with all rows: `mixed`
# has gates with both, summed and not, and with either; `apart` has no recurrent rows at all.
mixed = fastrnn.cell(gates="wfan", inputs="wfn", recurrent="fan", states="hc", name="rows_mixed")(
    _mixed
)
mixed_full = fastrnn.cell(gates="wfan", states="hc", name="full_mixed")(_mixed)
staged_rows = fastrnn.cell(
    gates="wan",
    inputs="wn",
    recurrent="an",
    states="h",
    params={"gain": fastrnn.Param(init=torch.nn.init.normal_)},
    name="rows_staged",
)(_staged_rows)
staged_full = fastrnn.cell(gates="wan", states="h", params={"gain": "unit"}, name="full_staged")(
    _staged_rows
)
apart = fastrnn.cell(
    gates="wf", recurrent="", states="hc", params={"r": "unit"}, name="rows_apart"
)(_apart)
apart_full = fastrnn.cell(gates="wf", states="hc", params={"r": "unit"}, name="full_apart")(_apart)
