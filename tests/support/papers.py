"""Loops of the published cells, written from their papers: every gate is a product of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, sigmoid, tanh

from fastrnn.cells import Cell

__all__ = ["STEPS", "loop"]


class Gate(NamedTuple):
    """The weights of one gate, `W`, `R` and both biases; None for those that it lacks."""

    w: Tensor | None
    r: Tensor | None
    b: Tensor | None
    c: Tensor | None

    def of_x(self, x: Tensor) -> Tensor:
        assert self.w is not None
        y = torch.einsum("oi,bi->bo", self.w, x)
        return y if self.b is None else y + self.b

    def of_h(self, h: Tensor) -> Tensor:
        assert self.r is not None
        y = torch.einsum("oi,bi->bo", self.r, h)
        return y if self.c is None else y + self.c

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        return self.of_x(x) + self.of_h(h)


Gates = Mapping[str, Gate]
Learned = Mapping[str, Tensor]


def antisymmetric_rnn(k: Gates, x: Tensor, h: Tensor) -> Any:
    return h + 0.01 * tanh(k["h"](x, h))


def gated_antisymmetric_rnn(k: Gates, x: Tensor, h: Tensor) -> Any:
    z = sigmoid(k["z"](x, h))
    return h + 0.01 * z * tanh(k["h"](x, h))


def atr(k: Gates, x: Tensor, h: Tensor) -> Any:
    p, q = k["p"].of_x(x), k["p"].of_h(h)
    i, f = sigmoid(p + q), sigmoid(p - q)
    return i * p + f * h


def cfn(k: Gates, x: Tensor, h: Tensor) -> Any:
    theta, eta = sigmoid(k["theta"](x, h)), sigmoid(k["eta"](x, h))
    return theta * tanh(h) + eta * tanh(k["w"].of_x(x))


def cifg(k: Gates, x: Tensor, h: Tensor, c: Tensor) -> Any:
    i, o, g = sigmoid(k["i"](x, h)), sigmoid(k["o"](x, h)), tanh(k["g"](x, h))
    f = 1 - i
    c = f * c + i * g
    return o * tanh(c), c


def fast_rnn(k: Gates, p: Learned, x: Tensor, h: Tensor) -> Any:
    return sigmoid(p["beta"]) * h + sigmoid(p["alpha"]) * tanh(k["h"](x, h))


def fast_grnn(k: Gates, p: Learned, x: Tensor, h: Tensor) -> Any:
    a = k["h"](x, h)
    z, n = sigmoid(a + p["bz"]), tanh(a + p["bn"])
    return z * h + (sigmoid(p["zeta"]) * (1 - z) + sigmoid(p["nu"])) * n


def indrnn(k: Gates, p: Learned, x: Tensor, h: Tensor) -> Any:
    return torch.clamp(k["h"].of_x(x) + p["u"] * h, min=0)


def irnn(k: Gates, x: Tensor, h: Tensor) -> Any:
    return torch.clamp(k["h"](x, h), min=0)


def janet(k: Gates, x: Tensor, h: Tensor) -> Any:
    s, beta = k["f"](x, h), 1
    content = tanh(k["c"](x, h))
    return sigmoid(s) * h + (1 - sigmoid(s - beta)) * content


def normed(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """A layer norm over the last dimension."""
    centred = x - x.sum(-1, keepdim=True) / x.size(-1)
    variance = (centred**2).sum(-1, keepdim=True) / x.size(-1)
    return gain * centred / torch.sqrt(variance + 1e-5) + bias


def layer_norm_lstm(k: Gates, p: Learned, x: Tensor, h: Tensor, c: Tensor) -> Any:
    of_x = torch.cat([k[name].of_x(x) for name in "ifgo"], -1)
    of_h = torch.cat([k[name].of_h(h) for name in "ifgo"], -1)
    a = normed(of_x, p["gain_x"], p["bias_x"]) + normed(of_h, p["gain_h"], p["bias_h"])
    i, f, g, o = a.split(h.size(-1), -1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(normed(c, p["gain_c"], p["bias_c"])), c


def layer_norm_lstm_sums(k: Gates, p: Learned, x: Tensor, h: Tensor, c: Tensor) -> Any:
    gains, biases = p["gain"].view(4, -1), p["bias"].view(4, -1)
    i, f, g, o = (normed(k[n](x, h), gains[j], biases[j]) for j, n in enumerate("ifgo"))
    c = normed(sigmoid(f) * c + sigmoid(i) * tanh(g), p["gain_c"], p["bias_c"])
    return sigmoid(o) * tanh(c), c


def rms_norm_lstm(k: Gates, p: Learned, x: Tensor, h: Tensor, c: Tensor) -> Any:
    a = torch.cat([k[name](x, h) for name in "ifgo"], -1)
    a = p["gain"] * a / torch.sqrt((a**2).sum(-1, keepdim=True) / a.size(-1) + 1e-6)
    i, f, g, o = a.split(h.size(-1), -1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def layer_norm_gru(k: Gates, p: Learned, x: Tensor, h: Tensor) -> Any:
    rows = {name: each.view(3, -1) for name, each in p.items()}
    of_x, of_h = (
        {
            n: normed(side(k[n]), rows[f"gain_{end}"][j], rows[f"bias_{end}"][j])
            for j, n in enumerate("rzn")
        }
        for end, side in (("x", lambda g: g.of_x(x)), ("h", lambda g: g.of_h(h)))
    )
    r, z = sigmoid(of_x["r"] + of_h["r"]), sigmoid(of_x["z"] + of_h["z"])
    return (1 - z) * tanh(of_x["n"] + r * of_h["n"]) + z * h


def dreamer_gru(k: Gates, p: Learned, x: Tensor, h: Tensor) -> Any:
    a = normed(torch.cat([k[name](x, h) for name in "rnz"], -1), p["gain"], p["bias"])
    r, n, z = a.split(h.size(-1), -1)
    z = sigmoid(z - 1)
    return z * tanh(sigmoid(r) * n) + (1 - z) * h


def gru_reset_before(k: Gates, x: Tensor, h: Tensor) -> Any:
    r, z = sigmoid(k["r"](x, h)), sigmoid(k["z"](x, h))
    return (1 - z) * tanh(k["n"](x, r * h)) + z * h


def mgu_reset_before(k: Gates, x: Tensor, h: Tensor) -> Any:
    f = sigmoid(k["f"](x, h))
    return (1 - f) * h + f * tanh(k["n"](x, f * h))


def mgu2(k: Gates, x: Tensor, h: Tensor) -> Any:
    f = sigmoid(k["f"].of_h(h))
    return (1 - f) * h + f * tanh(k["n"](x, f * h))


def multiplicative_lstm(k: Gates, x: Tensor, h: Tensor, c: Tensor) -> Any:
    m = k["m"].of_x(x) * k["m"].of_h(h)
    i, f, o = (sigmoid(k[name](x, m)) for name in "ifo")
    c = f * c + i * tanh(k["g"](x, m))
    return o * tanh(c), c


def ligru(k: Gates, x: Tensor, h: Tensor) -> Any:
    z = sigmoid(k["z"](x, h))
    return z * h + (1 - z) * torch.clamp(k["n"](x, h), min=0)


def mgu(k: Gates, x: Tensor, h: Tensor) -> Any:
    f = sigmoid(k["f"](x, h))
    n = tanh(k["n"].of_x(x) + f * k["n"].of_h(h))
    return (1 - f) * h + f * n


def nas(k: Gates, x: Tensor, h: Tensor, c: Tensor) -> Any:
    a = [k[f"g{j}"](x, h) for j in range(8)]
    product = k["g3"].of_x(x) * k["g3"].of_h(h)
    first = [
        sigmoid(a[0]),
        torch.clamp(a[1], min=0),
        sigmoid(a[2]),
        torch.clamp(product, min=0),
        tanh(a[4]),
        sigmoid(a[5]),
        tanh(a[6]),
        sigmoid(a[7]),
    ]
    second = [
        tanh(first[0] * first[1]),
        tanh(first[2] + first[3]),
        tanh(first[4] * first[5]),
        sigmoid(first[6] + first[7]),
    ]
    c = tanh(second[0] + c) * second[1]
    return tanh(c * tanh(second[2] + second[3])), c


def nbrc(k: Gates, x: Tensor, h: Tensor) -> Any:
    a, c = 1 + tanh(k["a"](x, h)), sigmoid(k["c"](x, h))
    return c * h + (1 - c) * tanh(k["n"].of_x(x) + a * h)


def peephole_lstm(k: Gates, p: Learned, x: Tensor, h: Tensor, c: Tensor) -> Any:
    i, f = sigmoid(k["i"](x, h) + p["pi"] * c), sigmoid(k["f"](x, h) + p["pf"] * c)
    c = f * c + i * tanh(k["g"](x, h))
    return sigmoid(k["o"](x, h) + p["po"] * c) * tanh(c), c


def ran(k: Gates, x: Tensor, h: Tensor, c: Tensor) -> Any:
    i, f = sigmoid(k["i"](x, h)), sigmoid(k["f"](x, h))
    c = i * k["g"].of_x(x) + f * c
    return tanh(c), c


def sgrn(k: Gates, x: Tensor, h: Tensor) -> Any:
    p, f = k["f"].of_x(x), sigmoid(k["f"](x, h))
    return tanh((1 - f) * p + f * h)


def slstm(k: Gates, x: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> Any:
    i, f, z, o = (k[name](x, h) for name in "ifzo")
    f = torch.log(sigmoid(f))
    after = torch.where((n != 0) & (f + m > i), f + m, i)
    i, f = torch.exp(i - after), torch.where(f + m > after, 1, torch.exp(f + m - after))
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * (c / n), c, n, after


def star(k: Gates, x: Tensor, h: Tensor) -> Any:
    z, gate = tanh(k["z"].of_x(x)), sigmoid(k["k"](x, h))
    return tanh((1 - gate) * h + gate * z)


def ugrnn(k: Gates, x: Tensor, h: Tensor) -> Any:
    g, c = sigmoid(k["g"](x, h)), tanh(k["c"](x, h))
    return g * h + (1 - g) * c


STEPS: dict[str, Callable[..., Any]] = {
    step.__name__: step
    for step in (
        antisymmetric_rnn,
        atr,
        cfn,
        cifg,
        dreamer_gru,
        fast_grnn,
        fast_rnn,
        gated_antisymmetric_rnn,
        gru_reset_before,
        indrnn,
        irnn,
        janet,
        layer_norm_gru,
        layer_norm_lstm,
        layer_norm_lstm_sums,
        ligru,
        mgu,
        mgu2,
        mgu_reset_before,
        multiplicative_lstm,
        nas,
        nbrc,
        peephole_lstm,
        ran,
        rms_norm_lstm,
        sgrn,
        slstm,
        star,
        ugrnn,
    )
}


def loop(
    cell: Cell,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    params: Sequence[Tensor],
    s0: Sequence[Tensor],
    **others: Any,
) -> tuple[Tensor, list[Tensor]]:
    """A scan of one recurrence over dense input, in the arguments of `ops.scan`. Of the cell it
    reads the names of itself, its gates, its parameters and its states."""
    assert len(w_ih) == 1 and not any(others.values())
    hidden = w_ih[0].size(0) // len(cell.inputs)
    parts: list[dict[str, Tensor]] = []
    for names, given in ((cell.inputs, (w_ih, b_ih)), (cell.recurrent, (w_hh, b_hh))):
        parts += [
            dict(zip(names, t[0].split(hidden), strict=bool(names))) if t else {} for t in given
        ]
    w, b, r, c = (part.get for part in parts)
    gates = {name: Gate(w(name), r(name), b(name), c(name)) for name in cell.gates}
    learned = [dict(zip(cell.params, params, strict=True))] if params else []
    states = [s[0] for s in s0]
    ys = []
    for step in x:
        after = STEPS[cell.name](gates, *learned, step, *states)
        states = [after] if isinstance(after, Tensor) else list(after)
        ys.append(states[0])
    return torch.stack(ys), [s.unsqueeze(0) for s in states]
