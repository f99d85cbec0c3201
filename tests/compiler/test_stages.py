"""Steps in stages: derivatives through reductions and products, and how a step is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import sigmoid, tanh

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.compiler.derive import Derived, Underivable, derive
from tests.support.derivations import by_autograd, derived_step, inputs, make
from tests.support.staged import USERS

PUBLISHED = [
    cells.get(name)
    for name in (
        "dreamer_gru",
        "gru_reset_before",
        "layer_norm_gru",
        "layer_norm_lstm",
        "layer_norm_lstm_sums",
        "mgu_reset_before",
        "multiplicative_lstm",
        "rms_norm_lstm",
    )
]
every_cell = pytest.mark.parametrize("cell", [*USERS, *PUBLISHED], ids=lambda c: c.name)


def rows(cell: Cell, units: int = 7, batch: int = 5) -> list[list[torch.Tensor]]:
    """The arguments of `by_autograd` for a batch of rows; parameters are the same in all."""
    torch.manual_seed(0)
    *groups, params = inputs(cell, units)
    return [[torch.randn(batch, units).double() for _ in group] for group in groups] + [params]


def summed(cell: Cell, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of parameters summed over the batch; the others unchanged."""
    own = len(cell.params)
    plain, params = (grads[:-own], grads[-own:]) if own else (grads, [])
    return [*plain, *(g.sum(0) if g.dim() == 2 else g for g in params)]


@every_cell
def test_values_and_gradients_are_those_of_autograd(cell: Cell) -> None:
    groups = rows(cell)
    after, grads = derived_step(cell, *groups)
    want_after, want_grads = by_autograd(cell, *groups)
    torch.testing.assert_close(after, want_after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(summed(cell, grads), want_grads, rtol=1e-11, atol=1e-11)


def test_units_that_tie_share_the_gradient_of_a_maximum() -> None:
    cell = make("a", "h", lambda u, v, h: u.a + h.amax(-1, keepdim=True), "ties")
    h = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]).double()
    one = torch.ones(1, 5).double()
    derived = derive(cell)
    after, saved = derived.forward([one], [one], [h])
    _, _, (dh,), _ = derived.backward(saved, [h], after, [one])
    torch.testing.assert_close(dh, 5 / 3 * (h == 3).double())


@every_cell
def test_no_stage_reads_what_an_earlier_one_does_not_write(cell: Cell) -> None:
    derived = derive(cell)
    assert derived.programs is not None
    for program in derived.programs:
        written: set[str] = set()
        for stage in program.stages:
            read = {n.label for e in stage.outputs.values() for n in _leaves(e)}
            temporaries = {label for label in read if label.startswith("temp.")}
            assert temporaries <= written
            written |= {label for label in stage.outputs if label.startswith("temp.")}
        assert len(written) == program.temporaries


def _leaves(expr: Any) -> list[Any]:
    return [expr] if not expr.args else [n for arg in expr.args for n in _leaves(arg)]


@pytest.mark.parametrize(
    ("name", "stages", "saved", "results"),
    [
        ("lstm", (1, 1), 4, 0),
        ("gru_reset_before", (2, 2), 3, 0),
        ("mgu_reset_before", (2, 2), 2, 0),
        ("multiplicative_lstm", (2, 2), 6, 0),
        ("rms_norm_lstm", (2, 2), 4, 1),
        ("dreamer_gru", (2, 2), 3, 2),
        ("layer_norm_gru", (2, 2), 6, 12),
        ("layer_norm_lstm", (3, 3), 8, 6),
        ("layer_norm_lstm_sums", (3, 3), 4, 10),
    ],
)
def test_stages_and_saved_values(
    name: str, stages: tuple[int, int], saved: int, results: int
) -> None:
    """As few as the formulas allow."""
    derived = derive(cells.get(name))
    programs = derived.programs
    assert (tuple(len(p.stages) for p in programs) if programs else (1, 1)) == stages
    assert (len(derived.saved), len(derived.rows)) == (saved, results)


def test_a_stage_that_reads_a_gate_saves_it() -> None:
    """So that a stage of copies alone loads nothing; and values between stages are few."""
    programs = derive(cells.get("layer_norm_lstm")).programs
    assert programs is not None
    forward, backward = programs
    assert not forward.stages[0].outputs
    saved = [[k for k in stage.outputs if k.startswith("saved.")] for stage in forward.stages]
    assert list(map(len, saved)) == [0, 6, 2]
    assert (forward.temporaries, backward.temporaries) == (1, 8)


def summed_gates(function: Callable[..., Any]) -> tuple[bool, ...]:
    return derive(make("ab", "h", function, "tried")).summed


def test_gates_of_other_products_are_summed() -> None:
    assert summed_gates(lambda u, v, h: tanh(u.a + v(h * u.b).a)) == (True, False)
    assert summed_gates(lambda u, v, h: tanh(u.a * v(h).a + u.b + v.b)) == (False, True)


def test_the_product_of_the_state_itself_is_no_stage() -> None:
    assert derive(make("a", "h", lambda u, v, h: tanh(u.a + v(h).a), "plain")).programs is None


def test_one_operand_of_several_gates_is_one_product() -> None:
    def both(u: Any, v: Any, h: Any) -> Any:
        x = v(tanh(h))
        return tanh(u.a + x.a) * sigmoid(u.b + x.b)

    derived: Derived = derive(make("ab", "h", both))
    assert [site.gates for site in derived.sites] == [("a", "b")]
    assert [x.kind for x in derived.exchanges] == ["transposed"]


def test_the_width_of_the_tape() -> None:
    """The results of a row follow the values of its units, in float32."""
    derived = derive(cells.layer_norm_lstm)
    assert derived.tape_width(False, hidden=64) == 1 + 8 + 1
    assert derived.tape_width(False, hidden=4) == 1 + 8 + 2
    assert derived.tape_width(False, hidden=4, ratio=2) == 1 + 8 + 3
    assert derive(cells.lstm).tape_width(True, hidden=4, ratio=2) == 1 + 4 + 1


def test_too_many_values_between_stages_are_refused() -> None:
    def many(u: Any, v: Any, h: Any) -> Any:
        for k in range(40):
            h = tanh(h + u.a * (h * (k + 1)).mean(-1, keepdim=True))
        return h + v.a

    with pytest.raises(Underivable, match=r"has \d+ saved values, or .*at most 64"):
        derive(make("a", "h", many))


def test_a_spread_of_zero_has_no_gradient() -> None:
    """As in torch, where the derivative of the root would be infinite."""
    cell = make("a", "h", lambda u, v, h: u.a + h / (1 + h.std(-1, keepdim=True)), "even")
    one, zero = torch.ones(1, 5).double(), torch.zeros(1, 5).double()
    derived = derive(cell)
    after, saved = derived.forward([one], [one], [zero])
    _, _, (dh,), _ = derived.backward(saved, [zero], after, [one])
    torch.testing.assert_close(dh, one)


def test_the_logarithm_of_a_sum_of_nothing() -> None:
    derived = derive(make("a", "h", lambda u, v, h: u.a + torch.logsumexp(h, -1, keepdim=True)))
    one, low = torch.zeros(1, 5).double(), torch.full((1, 5), -torch.inf).double()
    assert (derived.forward([one], [one], [low])[0][0] == -torch.inf).all()


def test_a_number_for_all_units_is_one_number() -> None:
    """Its reductions are those of one number, as the reference has it."""
    cell = make(
        "a", "h", lambda u, v, p, h: tanh(u.a + v.a) * p.S.sum(-1, keepdim=True), params="S"
    )
    assert cell.params["S"].kind == "one"
    one = torch.ones(1, 5).double()
    (after,), _ = derive(cell).forward([one], [one], [one], [torch.full((1,), 3.0).double()])
    torch.testing.assert_close(after, 3 * tanh(2 * one))
