"""Long short-term memory whose gates see the cell's state."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["peephole_lstm"]


@cell(gates="ifgo", states="hc", params={"pi": "unit", "pf": "unit", "po": "unit"})
def peephole_lstm(u, v, p, h, c):  # type: ignore[no-untyped-def]
    """Long short-term memory with peepholes.

    Gers & Schmidhuber 2000, doi:10.1109/IJCNN.2000.861302.

        i  = sigmoid(W_i·x + R_i·h + p_i·c + b_i)
        f  = sigmoid(W_f·x + R_f·h + p_f·c + b_f)
        c' = f·c + i·tanh(W_g·x + R_g·h + b_g)
        o  = sigmoid(W_o·x + R_o·h + p_o·c' + b_o)
        h' = o·tanh(c')

    The peepholes `p` are a number for each unit, as in Greff et al. 2017 (arXiv:1503.04069). The
    first paper has other nonlinearities in the place of the two tanh. All begins with torch.nn's
    values.
    """
    i, f = sigmoid(u.i + v.i + p.pi * c), sigmoid(u.f + v.f + p.pf * c)
    c = f * c + i * tanh(u.g + v.g)
    return sigmoid(u.o + v.o + p.po * c) * tanh(c), c
