"""The derivation of cells: gradients against autograd and finite differences, and which gates are
summed and which values saved."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.compiler import expression
from fastrnn.compiler.derive import Derived, derive
from tests.support.derivations import (
    ALL,
    BUILT_IN_CELLS,
    by_autograd,
    derived_step,
    every_cell,
    inputs,
    make,
)
from tests.support.properties import given, settings, st


@every_cell
def test_values_and_gradients_are_those_of_autograd(cell: Cell) -> None:
    u, v, s, dnext, p = inputs(cell)
    after, grads = derived_step(cell, u, v, s, dnext, p)
    want_after, want_grads = by_autograd(cell, u, v, s, dnext, p)
    torch.testing.assert_close(after, want_after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, want_grads, rtol=1e-12, atol=1e-12)


SMOOTH = [c for c in ALL if c.name not in ("rnn_relu", "choices", "steps", "activations")]


@pytest.mark.parametrize("cell", SMOOTH, ids=lambda c: c.name)
def test_gradients_are_those_of_finite_differences(cell: Cell) -> None:
    u, v, s, dnext, p = inputs(cell)
    _, grads = derived_step(cell, u, v, s, dnext, p)
    flat, of_u, of_uv, states = [*u, *v, *s, *p], len(u), len(u) + len(v), len(s)
    step = 1e-5

    def loss(moved: list[Tensor]) -> Tensor:
        ends = of_u, of_uv, of_uv + states
        groups = (moved[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True))
        own_u, own_v, own_s, own_p = groups
        after = cell.step(own_u, own_v, own_s, own_p)
        return sum((a * d for a, d in zip(after, dnext, strict=True)), torch.zeros(()))

    for k, grad in enumerate(grads):
        up, down = ([x + sign * step * (i == k) for i, x in enumerate(flat)] for sign in (1, -1))
        torch.testing.assert_close((loss(up) - loss(down)) / (2 * step), grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cell", BUILT_IN_CELLS, ids=lambda c: c.name)
def test_special_values_go_the_way_autograd_sends_them(cell: Cell) -> None:
    special = torch.tensor([0.0, -0.0, 1e-40, 1e30, -1e30, math.inf, -math.inf, math.nan])
    special = special.double()
    groups = inputs(cell, units=1)
    for k, group in enumerate(groups):
        for i in range(len(group)):
            changed = [[x.expand(len(special)).clone() for x in g] for g in groups]
            changed[k][i] = special.clone()
            got = derived_step(cell, *changed)
            torch.testing.assert_close(got, by_autograd(cell, *changed), equal_nan=True)


# Summed gates and saved values.


@pytest.mark.parametrize(
    ("name", "summed", "saved"),
    [
        ("rnn_tanh", [True], ""),
        ("rnn_relu", [True], ""),
        ("lstm", [True] * 4, "i f g o"),
        ("gru", [True, True, False], "r z n v.n"),
    ],
)
def test_built_in_cells_keep_what_the_best_kernels_do(
    name: str, summed: list[bool], saved: str
) -> None:
    derived = derive(cells.get(name))
    assert list(derived.summed) == summed
    assert list(derived.saved) == saved.split()


@pytest.mark.parametrize(
    ("function", "summed"),
    [
        (lambda u, v, h: torch.tanh(u.a + v.a), True),
        (lambda u, v, h: torch.tanh(v.a + 1 + u.a), True),
        (lambda u, v, h: torch.tanh(u.a * 2 + v.a * 2), True),
        (lambda u, v, h: h * 2, True),
        (lambda u, v, h: torch.floor(u.a + v.a) * h, True),
        (lambda u, v, h: torch.tanh(u.a - v.a), False),
        (lambda u, v, h: u.a * v.a, False),
        (lambda u, v, h: u.a + v.a + torch.sign(u.a), False),
        (lambda u, v, h: torch.where(u.a > 0, h, 2 * h), False),
        (lambda u, v, h: torch.floor(v.a) * h, False),
    ],
)
def test_a_gate_is_summed_where_only_the_sum_matters(
    function: Callable[..., Tensor], summed: bool
) -> None:
    cell = make("a", "h", function, "summed")
    derived = derive(cell)
    assert derived.summed == (summed,)
    u, v, s, *_ = inputs(cell)
    torch.testing.assert_close(derived.forward(u, v, s)[0], cell.step(u, v, s))


@pytest.mark.parametrize(
    ("function", "saved"),
    [
        # tanh(c) is recomputed from the states.
        (lambda u, v, h, c: (torch.tanh(c) * h, c), ""),
        (lambda u, v, h, c: (torch.exp(u.a), c), ""),
        # One product is saved in place of its two factors if only the product is used.
        (lambda u, v, h, c: ((torch.exp(u.a) * torch.exp(u.b)).detach() * h, c), "k0"),
        (lambda u, v, h, c: (torch.exp(u.a) * torch.exp(u.b) * h, c), "a b"),
        # A mask cannot be saved, so the values that it compares are.
        (lambda u, v, h, c: (torch.where(u.a > v.a, h, c), c), "u.a v.a"),
        (lambda u, v, h, c: (torch.relu(u.a + v.a) * h, c), "a.a"),
        # A function is computed again if its argument is saved anyway.
        (lambda u, v, h, c: (F.silu(u.b + v.b) * u.a, h), "u.a a.b"),
        (lambda u, v, h, c: (torch.tanh(torch.sigmoid(u.a)) * v.a * h, c), "a v.a"),
        # Not exp, whose error grows with that of a rounded argument.
        (lambda u, v, h, c: (torch.where(u.a > 0, torch.exp(u.a), v.b) * h, c), "a u.a v.b"),
    ],
)
def test_the_fewest_values_are_saved(function: Callable[..., object], saved: str) -> None:
    assert list(derive(make("ab", "hc", function, "saved")).saved) == saved.split()


@every_cell
def test_each_function_that_is_computed_again_saves_a_value(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_saved(derived: Derived) -> int:
        again = [
            node.op
            for node in expression.ordered(derived.gradients)
            if node.op in expression.TRANSCENDENTAL
            and any(label.startswith("saved.") for label in expression.uses([node]))
        ]
        assert set(again) <= expression.SATURATING  # a saved value may be rounded to 16 bits
        return len(again)

    derived = derive(cell)
    monkeypatch.setattr("fastrnn.compiler.saved._AGAIN", float("inf"))
    without = importlib.import_module("fastrnn.compiler.derive")._derive_here(cell)
    assert of_saved(without) == 0
    assert len(derived.saved) + of_saved(derived) <= len(without.saved)


# Random cells.

LEAVES: dict[str, Callable[..., Tensor]] = {
    "u.a": lambda u, v, h, c: u.a,
    "u.b": lambda u, v, h, c: u.b,
    "v.a": lambda u, v, h, c: v.a,
    "v.b": lambda u, v, h, c: v.b,
    "h": lambda u, v, h, c: h,
    "c": lambda u, v, h, c: c,
    "0.5": lambda u, v, h, c: torch.full_like(h, 0.5),
    "-1": lambda u, v, h, c: torch.full_like(h, -1.0),
    "0": lambda u, v, h, c: torch.zeros_like(h),
}
OPERATIONS: list[tuple[int, Callable[..., Tensor]]] = [
    (1, torch.neg),
    (1, torch.tanh),
    (1, torch.sigmoid),
    (1, torch.relu),
    (1, torch.abs),
    (1, torch.sin),
    (1, lambda x: torch.exp(torch.clamp(x, -3, 2))),
    (1, lambda x: torch.sqrt(1 + x * x)),
    (1, lambda x: torch.log1p(torch.abs(x))),
    (1, lambda x: x**3 / 4),
    (1, torch.floor),
    (1, F.softplus),
    (2, torch.add),
    (2, torch.add),
    (2, torch.sub),
    (2, torch.mul),
    (2, torch.mul),
    (2, lambda x, y: x / (2 + y * y)),
    (2, torch.maximum),
    (2, torch.minimum),
    (3, lambda x, y, z: torch.where(x > y, y, z)),
    (3, lambda x, y, z: torch.lerp(x, y, torch.sigmoid(z))),
]


def formula(
    arity_and_function: tuple[int, Callable[..., Tensor]], parts: list
) -> Callable[..., Tensor]:
    arity, function = arity_and_function
    return lambda *given: function(*(part(*given) for part in parts[:arity]))


formulas = st.recursive(
    st.sampled_from(sorted(LEAVES)).map(LEAVES.__getitem__),
    lambda inner: st.builds(
        formula, st.sampled_from(OPERATIONS), st.lists(inner, min_size=3, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=20)
@given(formulas, formulas)
def test_random_cells_agree_with_autograd(
    first: Callable[..., Tensor], second: Callable[..., Tensor]
) -> None:
    cell = make("ab", "hc", lambda *given: (first(*given), second(*given)), "random")
    u, v, s, dnext, p = inputs(cell, units=16)
    after, grads = derived_step(cell, u, v, s, dnext, p)
    want_after, want_grads = by_autograd(cell, u, v, s, dnext, p)
    torch.testing.assert_close(after, want_after, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(grads, want_grads, rtol=1e-9, atol=1e-9, equal_nan=True)
