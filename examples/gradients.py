"""Vanishing and exploding gradients: see them, then treat them.

The first of many steps shows one of four symbols, the others are noise, and the network names the
symbol at the end. To learn that, gradients must come back from the last step to the first.
`gradient_flow` measures before any training how much of them arrives. Too little vanishes; far more
than 1 explodes. Then each network is trained, and the table says what it learns. The treatments are
initial values, clipped gradients, a schedule of the learning rate, and dropout between two layers.

    python examples/gradients.py [--plot flow.png]
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastrnn
from fastrnn import init
from fastrnn.diagnostics import GradientFlow, gradient_flow

SYMBOLS, NOISE, HIDDEN = 4, 4, 32
RELU = functools.partial(fastrnn.RNN, nonlinearity="relu")


class Network(NamedTuple):
    name: str
    layer: Callable[..., Any]
    start: Callable[[Any], Any] = lambda layer: layer  # writes the initial values
    clip: float = math.inf  # the largest norm of the gradient of all weights
    more: bool = False  # two layers with dropout, and a schedule


def orthogonal_chrono(lstm: Any) -> Any:
    return init.chrono_(init.orthogonal_(lstm), 100)


NETWORKS = [
    Network("RNN", fastrnn.RNN),
    Network("RNN, orthogonal", fastrnn.RNN, init.orthogonal_),
    Network("relu RNN, large weights", RELU, lambda rnn: init.orthogonal_(rnn, 3)),
    Network("relu RNN, identity", RELU, init.identity_),
    Network("relu RNN, identity, clipped", RELU, init.identity_, clip=1.0),
    Network("LSTM", fastrnn.LSTM),
    Network("LSTM, forget gate 1", fastrnn.LSTM, init.forget_gate_bias_),
    Network("LSTM, forget gate 5", fastrnn.LSTM, lambda lstm: init.forget_gate_bias_(lstm, 5)),
    Network("LSTM, chrono", fastrnn.LSTM, lambda lstm: init.chrono_(lstm, 100)),
    Network("LSTM, all treatments", fastrnn.LSTM, orthogonal_chrono, clip=1.0, more=True),
]


class Model(nn.Module):
    """From sequences [T, B, 8] to scores of the symbols [B, 4]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        depth = {"num_layers": 2, "dropout": 0.1} if network.more else {}
        self.rnn = network.start(network.layer(SYMBOLS + NOISE, HIDDEN, **depth))
        self.out = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][-1])


def batch(steps: int, count: int) -> tuple[Tensor, Tensor]:
    """Sequences [T, B, 8] and the symbols of their first steps [B]."""
    symbols = torch.randint(SYMBOLS, (count,))
    x = torch.zeros(steps, count, SYMBOLS + NOISE)
    x[0, torch.arange(count), symbols] = 1
    x[1:, :, SYMBOLS:] = 0.3 * torch.randn(steps - 1, count, NOISE)
    return x, symbols


def arriving(flow: GradientFlow) -> float:
    """The norm of the gradient of all states at the first step, over that at the last step."""
    norms = torch.stack([entry.norms.double() for entry in flow.states]).norm(dim=0)
    return (norms[0] / norms[-1]).item()


def train(network: Network, steps: int, updates: int) -> tuple[GradientFlow, float]:
    """The flow before the training, and the share of new symbols that are named after it."""
    torch.manual_seed(0)
    model = Model(network)
    x, symbols = batch(steps, 32)
    flow = gradient_flow(model, x, lambda scores: cross_entropy(scores, symbols))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = CosineAnnealingLR(optimizer, updates) if network.more else None
    for _ in range(updates):
        x, symbols = batch(steps, 32)
        optimizer.zero_grad()
        cross_entropy(model(x), symbols).backward()
        nn.utils.clip_grad_norm_(model.parameters(), network.clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    x, symbols = batch(steps, 512)
    right = model.eval()(x).argmax(1) == symbols
    return flow, right.float().mean().item()


def main(quick: bool = False, plot: str | None = None) -> dict[str, tuple[float, float]]:
    """Returns, for each network, how much of the gradient arrives and what is named right."""
    steps, updates = (40, 120) if quick else (60, 250)
    print(f"{steps} steps{'gradient that arrives':>45}   named right")
    results, flows = {}, {}
    for network in NETWORKS:
        flow, accuracy = train(network, steps, updates)
        results[network.name], flows[network.name] = (arriving(flow), accuracy), flow
        print(f"{network.name:28}{arriving(flow):25.1e}   {accuracy:11.0%}")
    if plot is not None:
        save(plot, flows)
    return results


def save(file: str, flows: dict[str, GradientFlow]) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, flow in flows.items():
        axes.semilogy(flow["rnn.l0.h"].tolist(), label=name)
    axes.set(xlabel="time step", ylabel="norm of the gradient of h")
    axes.legend(fontsize="small")
    figure.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter sequences, half the training")
    parser.add_argument("--plot", metavar="FILE", help="save the norms over the time steps")
    options = parser.parse_args()
    main(options.quick, options.plot)
