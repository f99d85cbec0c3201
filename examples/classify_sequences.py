"""Classify sequences, with torch.nn and with fastrnn: one line differs.

Handwritten digits arrive row by row: 8 time steps of 8 pixels. A 2-layer RNN reads them; Linear,
ReLU and Linear on its last step name the digit. The images come with scikit-learn.

    python examples/classify_sequences.py [--plot curves.png]
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn

BATCH = 64


class Classifier(nn.Module):
    """From images [B, 8, 8] to scores of the ten digits [B, 10]."""

    def __init__(self, library: Any, hidden: int = 64) -> None:
        super().__init__()
        self.rnn = library.RNN(8, hidden, num_layers=2, batch_first=True)  # the line that differs
        self.head = nn.Sequential(nn.Linear(hidden, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        output, _ = self.rnn(images)
        return self.head(output[:, -1])


class Outcome(NamedTuple):
    accuracy: float  # on images that were not trained on
    seconds: float  # of training
    losses: list[float]  # one for each epoch


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 8, 8] with values from 0 to 1, and the digits they show, shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        sys.exit("this example reads the digits of scikit-learn: pip install scikit-learn")
    bunch = load_digits()
    images, labels = torch.tensor(bunch.images).float() / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def train(library: Any, images: Tensor, labels: Tensor, epochs: int) -> Outcome:
    """Train on four fifths of the images. The seed gives both libraries the same weights."""
    torch.manual_seed(0)
    model = Classifier(library)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    count = len(images) * 4 // 5
    losses = []
    start = time.perf_counter()
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(count).split(BATCH):
            loss = cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            # The first steps of an RNN can have large gradients.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows) / count
        losses.append(total)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model.eval()(images[count:]).argmax(1) == labels[count:]
    return Outcome(right.float().mean().item(), seconds, losses)


def main(quick: bool = False, plot: str | None = None) -> dict[str, Outcome]:
    """Returns what each library reached."""
    images, labels = digits()
    epochs = 4 if quick else 40
    outcomes = {}
    for name, library in (("torch.nn", nn), ("fastrnn", fastrnn)):
        train(library, images[:BATCH], labels[:BATCH], 1)  # a first call takes longer
        outcomes[name] = train(library, images, labels, epochs)
        accuracy, seconds, _ = outcomes[name]
        print(f"{name:8}  accuracy {accuracy:.1%} on unseen images, trained in {seconds:.1f} s")
    if plot is not None:
        save(plot, outcomes)
    return outcomes


def save(file: str, outcomes: dict[str, Outcome]) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for (name, outcome), style in zip(outcomes.items(), ("-", "--"), strict=True):
        axes.semilogy(outcome.losses, style, label=name)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for 4 epochs")
    parser.add_argument("--plot", metavar="FILE", help="save the curves of the loss")
    options = parser.parse_args()
    main(options.quick, options.plot)
