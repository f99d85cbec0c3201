"""Long short-term memory with exponential gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import clamp, exp, linspace, maximum, nn, sigmoid, tanh, where
from torch.nn.functional import logsigmoid

from fastrnn.cells.declare import cell
from fastrnn.cells.published import fill

__all__ = ["powerlaw", "slstm"]


def powerlaw(block: int = 0, blocks: int = 1) -> Callable[[Any, Any], None]:
    """The authors' values for `initialize` of `slstm`, which depend on the place of its layer in a
    stack of blocks: units of a head forget at different speeds, more of them slowly in later
    blocks.

    Args:
        block: index of the layer's block, from 0.
        blocks: number of blocks.

    Raises:
        ValueError: if there is no such block.
    """
    if not 0 <= block < blocks:
        raise ValueError(f"powerlaw takes 0 <= block < blocks, got {block} and {blocks}")
    exponent = 0.3 + 1.3 * (block / (blocks - 1) if blocks > 1 else 0.0)

    def initialize(u: Any, v: Any) -> None:
        for first, second in ((u.i, v.i), (u.f, v.f), (u.z, v.z), (u.o, v.o)):
            nn.init.normal_(first.weight, std=(2 / (5 * first.weight.size(1))) ** 0.5)
            nn.init.zeros_(second.weight)
            fill.bias(first, second, 0)
        if (bias := u.f.bias) is not None:
            place = linspace(0, 1, len(bias), device=bias.device)
            bias.copy_(5 - 12 * place**exponent)

    return initialize


@cell(gates="ifzo", states="hcnm", initialize=powerlaw())
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
    Their blocks normalise `h'` over the units of a head and feed nothing of that back: the layer
    `fastrnn.SLSTM` does so with `norm=True`, and this cell does not. Heads come from the layer's
    `heads=`. As in their code, a step is the first if `n` is 0, and `f` is at most 1.

    It begins as their code does: `W` from N(0, 2/(5·I)) for `I` inputs, `R` and the biases with 0,
    but `b_f` with 5 - 12·(k/(K - 1))^0.3 for unit k of the K units of a head. In a stack of blocks
    the exponent depends on the block; see `powerlaw`.
    """
    log_f, log_i = logsigmoid(u.f + v.f), u.i + v.i
    m_next = where(n == 0, log_i, maximum(log_f + m, log_i))
    f, i = exp(clamp(log_f + m - m_next, max=0)), exp(log_i - m_next)
    c, n = f * c + i * tanh(u.z + v.z), f * n + i
    return sigmoid(u.o + v.o) * c / n, c, n, m_next
