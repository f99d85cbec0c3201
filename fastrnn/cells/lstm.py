"""Long short-term memory, in the gate order of torch.nn."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["lstm"]


@cell(gates="ifgo", states="hc")
def lstm(u, v, h, c):  # type: ignore[no-untyped-def]
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000)."""
    i, f, o = sigmoid(u.i + v.i), sigmoid(u.f + v.f), sigmoid(u.o + v.o)
    c = f * c + i * tanh(u.g + v.g)
    return o * tanh(c), c
