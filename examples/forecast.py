"""Forecast a real series: the sunspots of the next year, from all years before.

The yearly numbers from 1700 to 2008 come with statsmodels. A GRU reads them one year at a time and
says how the next year differs from this one. It trains on the years before 1930 and is compared,
on the years from then on, with two naive forecasts: the next year is like this one, or like that of
a cycle ago. The states run on from the years of training into the years of the test.

    python examples/forecast.py [--plot forecast.png]
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

import fastrnn

FIRST_TEST_YEAR = 1930
CYCLE = 11


def sunspots() -> tuple[list[int], Tensor]:
    """The years [309], and the number of sunspots in each."""
    try:
        from statsmodels.datasets import sunspots
    except ModuleNotFoundError as error:
        sys.exit(
            f"this example reads the sunspots of statsmodels: pip install statsmodels ({error})"
        )
    data = sunspots.load_pandas().data
    numbers = torch.tensor(data["SUNACTIVITY"].to_numpy(), dtype=torch.float32)
    return [int(year) for year in data["YEAR"]], numbers


class Forecaster(nn.Module):
    """From a series [T] to forecasts [T]: entry t is for year t + 1, made of the years up to t."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = fastrnn.GRU(1, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, series: Tensor) -> Tensor:
        # The square root of a count varies equally much in quiet and in active years.
        x = (series / 100).sqrt()
        output, _ = self.rnn(x[:, None])
        return 100 * (x + self.out(output)[:, 0]).clamp(min=0).square()


def train(series: Tensor, steps: int, seed: int) -> Forecaster:
    torch.manual_seed(seed)
    model = Forecaster()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        # One sequence of all years: the loss has one term for each of them.
        noisy = (series[:-1] + 5 * torch.randn(len(series) - 1)).clamp(min=0)
        loss = (model(noisy) - series[1:])[CYCLE:].div(100).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def main(quick: bool = False, plot: str | None = None) -> dict[str, float]:
    """Returns the root mean square error of each forecast on the years of the test."""
    years, numbers = sunspots()
    split = years.index(FIRST_TEST_YEAR)
    models = [train(numbers[:split], 150 if quick else 300, seed) for seed in range(3)]
    with torch.no_grad():
        forecasts = torch.stack([model(numbers) for model in models]).mean(0)
    # Each has an entry for every year of the test.
    tested = {
        "fastrnn.GRU": forecasts[split - 1 : -1],
        "like this year": numbers[split - 1 : -1],
        f"like {CYCLE} years ago": numbers[split - CYCLE : -CYCLE],
    }
    errors = {
        name: (forecast - numbers[split:]).square().mean().sqrt().item()
        for name, forecast in tested.items()
    }
    print(f"sunspots of the next year, {years[split]} to {years[-1]}; root mean square error:")
    for name, error in errors.items():
        print(f"  {name:18}  {error:5.1f}")
    if plot is not None:
        save(plot, years[split:], numbers[split:], tested["fastrnn.GRU"])
    return errors


def save(file: str, years: list[int], numbers: Tensor, forecast: Tensor) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    axes.plot(years, numbers.tolist(), label="sunspots")
    axes.plot(years, forecast.tolist(), "--", label="forecast a year before")
    axes.set_xlabel("year")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train half as long")
    parser.add_argument("--plot", metavar="FILE", help="save the series and its forecast")
    options = parser.parse_args()
    main(options.quick, options.plot)
