"""What a side-by-side training gave: losses and times of each copy, as a table and as a plot."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch

__all__ = [
    "COMPILED",
    "FASTRNN",
    "LOOP",
    "TORCH",
    "Comparison",
    "largest",
    "plot",
    "table",
]

TORCH, FASTRNN = "torch.nn", "fastrnn"
LOOP, COMPILED = "loop", "compiled loop"  # the baselines of a cell that torch.nn lacks
CHECKPOINTS = 10
EARLY_STEPS = 10
# Training with norms amplifies the last bit faster: within 10 steps, the loop with layer norms in
# float32 is 5e-4 from the loop in float64, and within 3 steps 2e-6.
EARLY_STEPS_OF_LOOPS = 3


@dataclass(frozen=True)
class Comparison:
    """The result of a side-by-side training: loss (nats) and time (s) per step of each copy.

    The first name is that of the baseline, the last one is fastrnn.
    """

    cell: str
    names: tuple[str, ...] = (TORCH, FASTRNN)
    losses: dict[str, list[float]] = field(init=False)
    times: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        for entry in ("losses", "times"):
            object.__setattr__(self, entry, {name: [] for name in self.names})

    @property
    def baselines(self) -> tuple[str, ...]:
        return self.names[:-1]

    @property
    def early_steps(self) -> int:
        """How many steps the early difference is about, at most."""
        return EARLY_STEPS if self.names[0] == TORCH else EARLY_STEPS_OF_LOOPS

    @property
    def steps(self) -> int:
        return len(self.losses[FASTRNN])

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, mean loss since the previous checkpoint) at about ten checkpoints."""
        n, parts = self.steps, min(CHECKPOINTS, self.steps)
        edges = [n * k // parts for k in range(parts + 1)]
        return [(b, statistics.fmean(self.losses[name][a:b])) for a, b in pairwise(edges)]

    def early_difference(self) -> float:
        """Largest distance of fastrnn's losses to a baseline's, in the first steps."""
        ours = self.losses[FASTRNN]
        pairs = (zip(self.losses[name], ours, strict=True) for name in self.baselines)
        return largest(a - b for both in pairs for a, b in islice(both, self.early_steps))

    def curve_difference(self) -> float:
        """Largest distance of fastrnn's curve to a baseline's."""
        ours = self.curve(FASTRNN)
        pairs = (zip(self.curve(name), ours, strict=True) for name in self.baselines)
        return largest(a - b for both in pairs for (_, a), (_, b) in both)

    def speed(self, name: str) -> float:
        """Steps per second, from the median step."""
        return 1 / statistics.median(self.times[name])

    def ratio(self, name: str | None = None) -> float:
        """How many times as fast as a baseline, by default the first, fastrnn is."""
        return self.speed(FASTRNN) / self.speed(name or self.names[0])


def largest(values: Iterable[float]) -> float:
    """Largest magnitude, or NaN if there is one; the built-in max may miss it."""
    return float(torch.tensor(list(values), dtype=torch.float64, device="cpu").abs().max())


def table(comparison: Comparison) -> str:
    """All loss curves and speeds, as text."""
    names = comparison.names
    curves = [comparison.curve(name) for name in names]
    widths = [max(10, len(name)) for name in names]
    head = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'step':>7} {head} {'difference':>11}   (loss in nats)"]
    for points in zip(*curves, strict=True):
        losses = [loss for _, loss in points]
        row = " ".join(f"{loss:>{width}.4f}" for loss, width in zip(losses, widths, strict=True))
        difference = largest(loss - losses[-1] for loss in losses)
        lines.append(f"{points[0][0]:>7} {row} {difference:>11.1e}")
    early = min(comparison.early_steps, comparison.steps)
    lines.append(
        f"largest difference of losses: {comparison.early_difference():.1e} in the first {early} "
        f"steps, {comparison.curve_difference():.1e} between the curves"
    )
    speeds = ", ".join(f"{name} {comparison.speed(name):.1f}" for name in names)
    first, *others = comparison.baselines
    more = "".join(f", and {comparison.ratio(n):.2f} times as the {n}" for n in others)
    than = f" as the {first}" if others else ""
    lines.append(
        f"training steps per second: {speeds}: {comparison.ratio():.2f} times as fast{than}{more} "
        f"(medians of {comparison.steps} interleaved steps)"
    )
    return "\n".join(lines)


def plot(comparisons: Sequence[Comparison], conditions: str, path: Path) -> None:
    """Save loss over steps and loss over time, one row per cell.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    figures = importlib.import_module("matplotlib.pyplot")
    figure, axes = figures.subplots(
        len(comparisons), 2, figsize=(10, 0.8 + 3.2 * len(comparisons)), squeeze=False, sharey="row"
    )
    styles = {
        TORCH: ("#888888", "-", 3.0),
        LOOP: ("#888888", "-", 3.0),
        COMPILED: ("#30638e", "-", 2.0),
        FASTRNN: ("#d1495b", "--", 1.6),
    }
    for comparison, (by_step, by_time) in zip(comparisons, axes, strict=True):
        for name in comparison.names:
            color, line, width = styles[name]
            steps = [s for s, _ in comparison.curve(name)]
            clock = list(accumulate(comparison.times[name]))
            loss = [y for _, y in comparison.curve(name)]
            label = f"{name} ({comparison.speed(name):.0f} steps/s)"
            by_step.plot(steps, loss, line, color=color, lw=width, label=name)
            by_time.plot(
                [clock[s - 1] for s in steps], loss, line, color=color, lw=width, label=label
            )
        by_step.set(xlabel="training step", ylabel="loss (nats per character)")
        by_step.set_title(f"{comparison.cell.upper()}: the same training", fontsize=11)
        by_time.set(xlabel="own training time (s)", xlim=(0, None))
        by_time.set_title(
            f"{comparison.cell.upper()}: {comparison.ratio():.2f} times as fast", fontsize=11
        )
        for axis in (by_step, by_time):
            axis.legend(frameon=False)
            axis.grid(alpha=0.25)
    figure.text(0.5, 0.01, conditions, ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    figures.close(figure)
