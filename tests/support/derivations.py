"""Cells that use every derivable function, and their steps by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn import cells
from fastrnn.cells import Cell, Param
from fastrnn.compiler.derive import derive
from tests.support.names import BUILT_IN


def make(
    gates: str,
    states: str,
    function: Callable[..., object],
    name: str = "",
    params: str = "",
    **rows: tuple[str, ...],
) -> Cell:
    """A cell outside the registry, so that no other test meets it. Parameters whose name is a
    capital letter are shared by all units."""
    learned = {p: Param("one" if p.isupper() else "unit") for p in params}
    parts = tuple(gates), tuple(states), function, learned
    return Cell(name or function.__name__, *parts, **rows)  # type: ignore[arg-type]


def mgu(u, v, h):
    f = torch.sigmoid(u.f + v.f)
    return (1 - f) * h + f * torch.tanh(u.n + f * v.n)


def slstm(u, v, h, c, n, m):
    """Exponential gating with a stabilizer state (Beck et al. 2024, arXiv:2405.04517)."""
    z, o = torch.tanh(u.z + v.z), torch.sigmoid(u.o + v.o)
    log_f, log_i = F.logsigmoid(u.f + v.f), u.i + v.i
    m_next = torch.maximum(log_f + m, log_i)
    f, i = torch.exp(log_f + m - m_next), torch.exp(log_i - m_next)
    c, n = f * c + i * z, f * n + i
    return o * c / n, c, n, m_next


def peephole(u, v, h, c):
    i, f = torch.sigmoid(u.i + v.i + 0.1 * c), torch.sigmoid(u.f + v.f - 0.2 * c)
    c = f * c + i * torch.tanh(u.g + v.g)
    return torch.sigmoid(u.o + 0.3 * c + v.o) * torch.tanh(c), c


def learned(u, v, p, h, c):
    """Peepholes, and a scale that all units share."""
    i, f = torch.sigmoid(u.i + v.i + p.i * c), torch.sigmoid(u.f + v.f + p.f * c)
    c = f * c + i * torch.tanh(p.S * (u.g + v.g))
    return torch.sigmoid(u.o + p.o * c + v.o) * torch.tanh(c) + p.o.square(), c


def activations(u, v, h, c):
    a = F.silu(u.a + v.a) + F.gelu(u.b + v.b) + F.gelu(v.a, approximate="tanh")
    b = F.softplus(u.c) + F.elu(v.c) - F.logsigmoid(u.d) + F.leaky_relu(v.d, 0.2)
    return torch.tanh(a) * h + b * c, F.mish(h) + F.selu(c) + F.softsign(a) * F.hardtanh(b)


def choices(u, v, h, c):
    gate = torch.where((u.a > 0) & ~(v.a > h), u.a, v.b * 2)
    low = torch.clamp(u.b, -0.5, 0.7) + torch.clamp(v.c, min=h) + torch.clamp(u.c, max=0.1)
    mask = ((c > 0) | (h < u.d)).to(h.dtype)
    return gate + mask * c, torch.maximum(low, v.d) - torch.minimum(h, c) + torch.abs(gate)


def powers(u, v, h, c):
    a = torch.sqrt(1 + u.a**2) + torch.rsqrt(2 + v.a * v.a) + (1 + h * h) ** -1.5
    b = torch.expm1(u.b / 4) + torch.log1p(v.b.square()) + torch.log2(1.5 + torch.cos(u.c))
    d = torch.sin(v.c) / (1 + torch.exp2(u.d)) + torch.erf(v.d) - (c**3).neg()
    return a - b.reciprocal(), torch.sinh(h / 3) + torch.cosh(c / 3) + torch.log(a + b * b) * d


def steps(u, v, h, c):
    """It computes in place, with functions that have no gradient."""
    y = u.a * 1
    y += v.a
    y *= torch.sign(h) + 0.5
    z = y.clone().mul_(torch.floor(u.b * 3) + torch.trunc(v.b))
    z.add_(y.detach(), alpha=0.5)
    return torch.tanh(z) + torch.tensor(0.25), torch.ceil(c) * y + torch.zeros_like(h)


def lacking(u, v, p, h, c):
    """Its gates lack rows: `w` and `n` those of the state, `r` those of the input."""
    c = torch.sigmoid(u.f + v.f) * c + torch.tanh(u.w) * torch.sigmoid(v.r)
    return torch.tanh(c + u.n * v.a + p.k * u.a), c


def alone(u, v, h):
    """Its units do not see each other."""
    return torch.tanh(u.b + h) * u.a


def passing(u, v, h, c):
    """Its next states are inputs, other states or constants."""
    return c, h


USERS = [
    make("fn", "h", mgu),
    make("zifo", "hcnm", slstm),
    make("ifgo", "hc", peephole),
    make("ifgo", "hc", learned, params="ifoS"),
    make("abcd", "hc", activations),
    make("abcd", "hc", choices),
    make("abcd", "hc", powers),
    make("ab", "hc", steps),
    make("wfran", "hc", lacking, params="k", inputs=tuple("wfan"), recurrent=tuple("fra")),
    make("ab", "h", alone, recurrent=()),
    make("a", "hc", passing),
]


BUILT_IN_CELLS = [cells.get(name) for name in BUILT_IN]


ALL = BUILT_IN_CELLS + USERS


every_cell = pytest.mark.parametrize("cell", ALL, ids=lambda c: c.name)


def inputs(cell: Cell, units: int = 64, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Random `u`, `v`, states, gradients of next states, and parameters."""
    of_u, of_v, states = (len(names) for names in (cell.inputs, cell.recurrent, cell.states))
    rows = [units * len(own) for own in cell.param_rows().values()]
    sizes = [[units] * n for n in (of_u, of_v, states, states)] + [rows]
    made = [[torch.randn(n, dtype=torch.float64).to(dtype) for n in group] for group in sizes]
    if cell.name == "slstm":  # its normalizer is positive
        made[2][2] = made[2][2].abs() + 0.5
    return made


class Blocks(NamedTuple):
    """Recurrent weights, a block [H, H] for each gate that has one, for cells that multiply
    another value than their state."""

    weights: Tensor

    @classmethod
    def like(cls, cell: Cell, u: Tensor) -> Blocks:
        random = torch.Generator().manual_seed(0)
        size = len(cell.recurrent), u.size(-1), u.size(-1)
        weights = torch.randn(size, generator=random, dtype=torch.float64).to(u.dtype)
        return cls(weights / u.size(-1) ** 0.5)

    def apply(self, x: Tensor) -> list[Tensor]:
        return [x @ block.T for block in self.weights]

    def transposed(self, gate: int, dv: Tensor) -> Tensor:
        return dv @ self.weights[gate]


def by_autograd(cell: Cell, u, v, s, dnext, p):
    """The next states, and gradients of `u`, `v`, `s` and `p`; zero for a `v` of which the cell
    makes the product itself."""
    leaves = [[x.clone().requires_grad_() for x in group] for group in (u, v, s, p)]
    flat = [x for group in leaves for x in group]
    after = cell.step(leaves[0], leaves[1], leaves[2], leaves[3], Blocks.like(cell, u[0]).apply)
    reached = [(a, d) for a, d in zip(after, dnext, strict=True) if a.requires_grad]
    grads = torch.autograd.grad(
        [a for a, _ in reached],
        flat,
        [d for _, d in reached],
        allow_unused=True,
        materialize_grads=True,
    )
    return [a.detach() for a in after], list(grads)


def derived_step(cell: Cell, u, v, s, dnext, p) -> tuple[list[Tensor], list[Tensor]]:
    """The same, from what is derived."""
    derived = derive(cell)
    blocks = Blocks.like(cell, u[0])
    rows = [row for param in p for row in param.split(u[0].size(-1))]
    after, saved = derived.forward(u, v, s, rows, blocks.apply)
    du, dv, ds, dp = derived.backward(saved, s, after, dnext, rows, blocks.transposed)
    own = {name for site in derived.sites for name in site.gates}
    dv = [torch.zeros_like(d) if g in own else d for g, d in zip(cell.recurrent, dv, strict=True)]
    dp = [torch.cat(dp[group], -1) for group in derived.param_groups()]
    return after, [*du, *dv, *ds, *dp]
