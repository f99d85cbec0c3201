"""The description that `python -m fastrnn cell` prints."""

from __future__ import annotations

from fastrnn import cells
from fastrnn.compiler.derive import derive
from fastrnn.compiler.describe import describe


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


def test_a_saved_gate_is_not_taken_for_a_state_of_its_name() -> None:
    text = describe(derive(cells.get("fast_rnn")))
    assert "  params  alpha (one for all units) beta (one for all units)\n" in text
    assert "  saved.h = tanh(a.h)\n" in text
    assert "  h'      = " in text and " * h + " in text
    assert "dh' * saved.h" in text
