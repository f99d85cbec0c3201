"""Cells with a norm over the units of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, sigmoid, tanh

from fastrnn.cells.declare import Param, cell
from fastrnn.cells.published import fill

__all__ = [
    "dreamer_gru",
    "layer_norm_gru",
    "layer_norm_lstm",
    "layer_norm_lstm_sums",
    "rms_norm_lstm",
]

_GAINS = Param("gates", init=1.0)
_BIASES = Param("gates", init=0.0)
_GAIN = Param("unit", init=1.0)
_BIAS = Param("unit", init=0.0)


def _norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, bias)


def _orthogonal(gates: str) -> Callable[[Any, Any, Any], None]:
    def initialize(u: Any, v: Any, p: Any) -> None:
        for name in gates:
            first, second = getattr(u, name), getattr(v, name)
            fill.orthogonal(second.weight)
            fill.bias(first, second, 0)

    return initialize


def _forget_gate(u: Any, v: Any, p: Any) -> None:
    for first, second in ((u.i, v.i), (u.f, v.f), (u.g, v.g), (u.o, v.o)):
        fill.bias(first, second, 0)
    p.bias.chunk(4)[1].fill_(1)


def _glorot(u: Any, v: Any, p: Any) -> None:
    """One matrix for input and state, as Glorot & Bengio 2010 have it."""
    for first, second in ((u.r, v.r), (u.n, v.n), (u.z, v.z)):
        inputs = first.weight.size(1) + second.weight.size(1)
        bound = (6 / (inputs + 3 * len(first.weight))) ** 0.5
        nn.init.uniform_(first.weight, -bound, bound)
        nn.init.uniform_(second.weight, -bound, bound)
        fill.bias(first, second, 0)


@cell(
    gates="ifgo",
    states="hc",
    params={
        "gain_x": _GAINS,
        "bias_x": _BIASES,
        "gain_h": _GAINS,
        "bias_h": _BIASES,
        "gain_c": _GAIN,
        "bias_c": _BIAS,
    },
    initialize=_orthogonal("ifgo"),
)
def layer_norm_lstm(u, v, p, h, c):  # type: ignore[no-untyped-def]
    """Long short-term memory with layer norms (Ba et al. 2016, arXiv:1607.06450, equations 20-22).

        i, f, g, o = LN(W·x + b; gain_x, bias_x) + LN(R·h + c; gain_h, bias_h)
        c' = sigmoid(f)·c + sigmoid(i)·tanh(g)
        h' = sigmoid(o)·tanh(LN(c'; gain_c, bias_c))

    A norm is over all gates together. The biases of a layer lie within the norms; a layer with
    `bias=False` is that of the paper, whose bias `b` is `bias_x`. As in the authors' code, the
    gains begin with 1, all biases with 0, and each gate's rows of `R` orthogonal; `W` begins with
    torch.nn's values.
    """
    a = torch.cat([u.i, u.f, u.g, u.o], -1), torch.cat([v.i, v.f, v.g, v.o], -1)
    both = _norm(a[0], p.gain_x, p.bias_x) + _norm(a[1], p.gain_h, p.bias_h)
    i, f, g, o = both.chunk(4, -1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(_norm(c, p.gain_c, p.bias_c)), c


@cell(
    gates="ifgo",
    states="hc",
    params={"gain": _GAINS, "bias": _BIASES, "gain_c": _GAIN, "bias_c": _BIAS},
    initialize=_forget_gate,
)
def layer_norm_lstm_sums(u, v, p, h, c):  # type: ignore[no-untyped-def]
    """Long short-term memory with a layer norm (Ba et al. 2016, arXiv:1607.06450) for each gate's
    sum, and one for the cell state.

        a_k = LN(W_k·x + R_k·h + b_k; gain_k, bias_k) for each gate k
        c'  = LN(sigmoid(a_f)·c + sigmoid(a_i)·tanh(a_g); gain_c, bias_c)
        h'  = sigmoid(a_o)·tanh(c')

    This is the placement of TensorFlow's `LayerNormBasicLSTMCell`, which also adds 1 to the forget
    gate after its norm: here `bias_f` begins with 1 for that. The other biases begin with 0 and the
    gains with 1, as there, and the matrices with torch.nn's values.
    """
    gains, biases = p.gain.chunk(4, -1), p.bias.chunk(4, -1)
    sums = u.i + v.i, u.f + v.f, u.g + v.g, u.o + v.o
    i, f, g, o = (_norm(a, gains[k], biases[k]) for k, a in enumerate(sums))
    c = _norm(sigmoid(f) * c + sigmoid(i) * tanh(g), p.gain_c, p.bias_c)
    return sigmoid(o) * tanh(c), c


@cell(gates="ifgo", states="hc", params={"gain": _GAINS}, initialize=_orthogonal("ifgo"))
def rms_norm_lstm(u, v, p, h, c):  # type: ignore[no-untyped-def]
    """Long short-term memory with a root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467)
    over the sums of all gates.

        i, f, g, o = RMSNorm(W·x + R·h + b; gain)
        c' = sigmoid(f)·c + sigmoid(i)·tanh(g)
        h' = sigmoid(o)·tanh(c')

    The authors' code has the norms of `layer_norm_lstm`. It begins as here: the gains with 1, the
    biases with 0, each gate's rows of `R` orthogonal; `W` begins with torch.nn's values.
    """
    a = torch.cat([u.i + v.i, u.f + v.f, u.g + v.g, u.o + v.o], -1)
    i, f, g, o = F.rms_norm(a, a.shape[-1:], p.gain, 1e-6).chunk(4, -1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell(
    gates="rzn",
    states="h",
    params={"gain_x": _GAINS, "bias_x": _BIASES, "gain_h": _GAINS, "bias_h": _BIASES},
    initialize=_orthogonal("rzn"),
)
def layer_norm_gru(u, v, p, h):  # type: ignore[no-untyped-def]
    """Gated recurrent unit with a layer norm for each product (Ba et al. 2016, arXiv:1607.06450).

        r  = sigmoid(LN(W_r·x) + LN(R_r·h))
        z  = sigmoid(LN(W_z·x) + LN(R_z·h))
        n  = tanh(LN(W_n·x) + r·LN(R_n·h))
        h' = (1 - z)·n + z·h

    Every norm has its own gain and bias, and the biases of a layer lie within it. The paper has one
    norm for the sums of `r` and `z` together; here each gate has its own. It begins as
    `layer_norm_lstm` does.
    """
    gain_x, bias_x = p.gain_x.chunk(3, -1), p.bias_x.chunk(3, -1)
    gain_h, bias_h = p.gain_h.chunk(3, -1), p.bias_h.chunk(3, -1)
    x = [_norm(a, gain_x[k], bias_x[k]) for k, a in enumerate((u.r, u.z, u.n))]
    y = [_norm(a, gain_h[k], bias_h[k]) for k, a in enumerate((v.r, v.z, v.n))]
    z = sigmoid(x[1] + y[1])
    n = tanh(x[2] + sigmoid(x[0] + y[0]) * y[2])
    return n + z * (h - n)


@cell(gates="rnz", states="h", params={"gain": _GAINS, "bias": _BIASES}, initialize=_glorot)
def dreamer_gru(u, v, p, h):  # type: ignore[no-untyped-def]
    """Gated recurrent unit with one layer norm over all gates, of the world models of Dreamer
    (Hafner et al. 2020, arXiv:2010.02193; the authors' code).

        r, n, z = LN(W·x + R·h + b; gain, bias)
        n  = tanh(sigmoid(r)·n)
        z  = sigmoid(z - 1)
        h' = z·n + (1 - z)·h

    This is the cell of DreamerV2, whose code adds 1e-3 to the variance, and not 1e-5. As there,
    `[W R]` begins from U(-a, a), `a = √(6 / (I + H + 3·H))`, biases with 0 and gains with 1.

    With the layer's `heads=`, the products are block diagonal and a norm is over the gates of one
    head. The block GRU of DreamerV3 (Hafner et al. 2023, arXiv:2301.04104) is another network: its
    code has no norm at the gates, whose products are block diagonal, but one before them, over all
    units of a block-diagonal layer of its own. Cells cannot reduce over heads, so a norm over all
    units needs `heads=1`, where a parametrization can make `weight_hh` block diagonal.
    """
    a = torch.cat([u.r + v.r, u.n + v.n, u.z + v.z], -1)
    r, n, z = _norm(a, p.gain, p.bias).chunk(3, -1)
    return h + sigmoid(z - 1) * (tanh(sigmoid(r) * n) - h)
