"""Long short-term memory with exponential gates."""

from __future__ import annotations

from torch import clamp, exp, maximum, sigmoid, tanh, where
from torch.nn.functional import logsigmoid

from fastrnn.cells.declare import cell

__all__ = ["slstm"]


@cell(gates="ifzo", states="hcnm")
def slstm(u, v, h, c, n, m):  # type: ignore[no-untyped-def]
    """sLSTM, stabilised (Beck et al. 2024, arXiv:2405.04517).

        a_i, a_f, a_z, a_o = W·x + R·h + b
        m' = a_i in the first step, then max(log sigmoid(a_f) + m, a_i)
        i  = exp(a_i - m')
        f  = exp(min(log sigmoid(a_f) + m - m', 0))
        c' = f·c + i·tanh(a_z)
        n' = f·n + i
        h' = sigmoid(a_o)·c' / n'

    The paper allows sigmoid or exp as the forget gate; this is sigmoid, as in the authors' code.
    Their blocks normalise `h'` over the units of a head; this cell does not. Heads come from the
    layer's `heads=`. As in their code, a step is the first if `n` is 0, and `f` is at most 1.
    """
    log_f, log_i = logsigmoid(u.f + v.f), u.i + v.i
    m_next = where(n == 0, log_i, maximum(log_f + m, log_i))
    f, i = exp(clamp(log_f + m - m_next, max=0)), exp(log_i - m_next)
    c, n = f * c + i * tanh(u.z + v.z), f * n + i
    return sigmoid(u.o + v.o) * c / n, c, n, m_next
