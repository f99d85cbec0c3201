"""A cell with one projection, which is its gate and its content."""

from __future__ import annotations

from torch import sigmoid, tanh

from fastrnn.cells.declare import cell

__all__ = ["sgrn"]


@cell(gates="f", states="h")
def sgrn(u, v, h):  # type: ignore[no-untyped-def]
    """Simple gated recurrent network (Zu et al. 2020, doi:10.1049/gtd2.12056; equations as in the
    packages torchrecurrent and LuxRecurrentLayers.jl).

        p  = W·x + b_ih
        f  = sigmoid(p + R·h + b_hh)
        h' = tanh((1 - f)·p + f·h)

    It begins with torch.nn's values.
    """
    return tanh(u.f + sigmoid(u.f + v.f) * (h - u.f))
