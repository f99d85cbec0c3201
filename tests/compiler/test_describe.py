"""The description that `python -m fastrnn cell` prints."""

from __future__ import annotations

import torch

from fastrnn import cells
from fastrnn.compiler.derive import derive
from fastrnn.compiler.describe import describe
from tests.support.derivations import make


def test_description_of_gru() -> None:
    assert describe(derive(cells.get("gru"))) == (
        "cell gru\n"
        "  gates   r z n\n"
        "  states  h\n"
        "  summed  r z\n"
        "  saves   r z n v.n: 16 bytes per unit and step in float32, besides the states\n"
        "\n"
        "forward: 8 operations, 3 transcendental\n"
        "  r  = sigmoid(a.r)\n"
        "  n  = tanh(u.n + r * v.n)\n"
        "  z  = sigmoid(a.z)\n"
        "  h' = n + z * (h - n)\n"
        "\n"
        "backward: 15 operations, 0 transcendental\n"
        "  dh   = dh' * z\n"
        "  du.n = (dh' - dh) * (1 - n * n)\n"
        "  da.r = du.n * v.n * (r * (1 - r))\n"
        "  da.z = dh' * (h - n) * (z * (1 - z))\n"
        "  dv.n = du.n * r"
    )


def test_gates_without_rows() -> None:
    text = describe(derive(cells.get("mgu2")))
    assert (
        "  gates   f n\n  inputs  n: rows of weight_ih\n  recurs  f n: rows of weight_hh\n" in text
    )
    assert "du.f" not in text and "dv.f" in text and "da.n" in text
    assert "  recurs  none: rows of weight_hh\n" in describe(derive(cells.get("indrnn")))


def test_rows_that_nothing_reads() -> None:
    cell = make("ab", "h", lambda u, v, h: torch.tanh(u.a + v.a) * u.b + h, "unread")
    assert '\n  unread  v.b: recurrent="a" would leave out these rows\n' in describe(derive(cell))
    assert "unread" not in describe(derive(cells.get("gru")))


def test_a_saved_gate_is_not_taken_for_a_state_of_its_name() -> None:
    text = describe(derive(cells.get("fast_rnn")))
    assert "  params  alpha (one for all units) beta (one for all units)\n" in text
    assert "  saved.h = tanh(a.h)\n" in text
    assert "  h'      = " in text and " * h + " in text
    assert "dh' * saved.h" in text


def test_description_of_stages() -> None:
    assert describe(derive(cells.get("gru_reset_before"))) == (
        "cell gru_reset_before\n"
        "  gates   r z n\n"
        "  states  h\n"
        "  summed  r z n\n"
        "  saves   r z n: 12 bytes per unit and step in float32, besides the states\n"
        "\n"
        "forward, stage 0: 3 operations, 2 transcendental\n"
        "  saved.r = sigmoid(a.r)\n"
        "  saved.z = sigmoid(a.z)\n"
        "  temp.0  = saved.r * h\n"
        "  temp.1  = saved.z\n"
        "\n"
        "forward, stage 1: 4 operations, 1 transcendental\n"
        "  begins with v.n: R times temp.0\n"
        "  saved.n = tanh(a.n)\n"
        "  h'      = saved.n + temp.1 * (h - saved.n)\n"
        "\n"
        "backward, stage 0: 11 operations, 0 transcendental\n"
        "  da.z      = dh' * (h - saved.n) * (saved.z * (1 - saved.z))\n"
        "  da.n      = (dh' - dh' * saved.z) * (1 - saved.n * saved.n)\n"
        "  operand.0 = saved.r * h\n"
        "\n"
        "backward, stage 1: 7 operations, 0 transcendental\n"
        "  begins with back.0: transposed R times dv.n\n"
        "  da.r = back.0 * h * (saved.r * (1 - saved.r))\n"
        "  dh   = dh' * saved.z + back.0 * saved.r"
    )


def test_description_of_reductions() -> None:
    text = describe(derive(cells.get("layer_norm_lstm")))
    assert "saves   u.i v.i u.f v.f u.g v.g u.o v.o mean.0 dev.0 mean.1 " in text
    assert ": 32 bytes per unit, and 24 bytes per row and step in float32" in text
    assert "mean.1 dev.1: mean and squared deviations of v.i v.f v.g v.o over the units" in text
    assert "  begins with dmean.0: sum over the units\n" in text


def test_a_limit_of_gradients_is_told_and_is_no_part_of_the_formulas() -> None:
    text = describe(derive(cells.clip_grad(cells.clip_grad(cells.lstm, 1.0), 0.5)))
    told, plain = "  clips   gradients of states to 0.5\n", describe(derive(cells.lstm))
    assert told in text
    assert text.replace(told, "").split("\n", 1)[1] == plain.split("\n", 1)[1]
    without = describe(derive(cells.clip_grad(cells.lstm, float("inf"))))
    assert without.split("\n", 1)[1] == plain.split("\n", 1)[1]
