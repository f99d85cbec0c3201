"""Products of the CPU kernel: the rounding of their sums."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from fastrnn import RNN


def test_long_sums_round_less_than_a_running_one() -> None:
    inputs, hidden, rows = 4096, 32, 12
    x, w = torch.rand(1, rows, inputs), torch.rand(hidden, inputs)
    layer: Any = RNN(inputs, hidden, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(w)
        ours = layer(x)[0][0]
    exact = x[0].double() @ w.double().T
    running = numpy.cumsum((x[0][:, None] * w).numpy(), axis=-1, dtype=numpy.float32)[..., -1]
    error = (ours - exact).abs().mean()
    assert error < 0.5 * (torch.from_numpy(running) - exact).abs().mean()
