"""fastrnn beside torch.nn on this machine: time of a layer over its hidden size, and of a call.

    python benchmarks/compare.py [--out benchmarks/results/NAME] [--quick]

Both are timed in one process, one call of either in turn; medians. A shape is timed only after both
gave the same outputs and gradients. Writes NAME.json and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import _C, info

LAYERS = ("RNN", "GRU", "LSTM")
SIZES = (32, 64, 128, 256, 512)
SHAPES = {"one row, 200 steps": (200, 1), "batch of 32, 100 steps": (100, 32)}
BUDGET = 1.5  # seconds per row of the table


@dataclass(frozen=True)
class Row:
    """Medians in microseconds of torch.nn and fastrnn for one layer of H inputs and H units."""

    layer: str
    shape: str
    hidden: int
    training: bool
    torch: float
    fastrnn: float

    @property
    def ratio(self) -> float:
        return self.torch / self.fastrnn


def rows(sizes: Sequence[int], budget: float) -> Iterator[Row]:
    """Every layer, shape and size, inference and training, as they are measured."""
    for shape, (steps, batch) in SHAPES.items():
        for layer in LAYERS:
            for hidden in sizes:
                torch.manual_seed(0)
                theirs = getattr(nn, layer)(hidden, hidden)
                ours = fastrnn.from_torch(theirs)
                x = torch.randn(steps, batch, hidden)
                gradient = torch.randn(steps, batch, hidden)
                _check_equal(theirs, ours, x, gradient)
                for training in (False, True):
                    calls = [_call(module, x, gradient, training) for module in (theirs, ours)]
                    yield Row(layer, shape, hidden, training, *interleaved(calls, budget))


def overhead(budget: float) -> dict[str, tuple[float, float]]:
    """Medians in microseconds of calls so small that only the way to the kernel counts."""
    found = {}
    for name, cell in (("LSTMCell", nn.LSTMCell), ("GRUCell", nn.GRUCell)):
        theirs = cell(64, 64)
        ours = fastrnn.from_torch(theirs)
        x, h = torch.randn(1, 64), torch.zeros(1, 64)
        state = (h, h) if name == "LSTMCell" else h

        def step(module: nn.Module, x: Tensor = x, state: object = state) -> Callable[[], object]:
            def call() -> object:
                with torch.no_grad():
                    return module(x, state)

            return call

        found[f"{name}(64, 64), one row, no gradient"] = interleaved(
            [step(theirs), step(ours)], budget
        )
    layer = nn.LSTM(2, 2)
    x, gradient = torch.randn(2, 1, 2), torch.randn(2, 1, 2)
    calls = [_call(m, x, gradient, True) for m in (layer, fastrnn.from_torch(layer))]
    found["LSTM(2, 2), 2 steps, forward and backward"] = interleaved(calls, budget)
    return found


def interleaved(calls: Sequence[Callable[[], object]], budget: float) -> tuple[float, ...]:
    """Median microseconds of each, one call of each in turn until `budget` seconds are spent."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return tuple(statistics.median(taken) * 1e6 for taken in times)


def _call(module: nn.Module, x: Tensor, gradient: Tensor, training: bool) -> Callable[[], object]:
    def inference() -> object:
        with torch.no_grad():
            return module(x)

    leaf = x.clone().requires_grad_()
    leaves = [leaf, *module.parameters()]

    def both_ways() -> object:
        return torch.autograd.grad(module(leaf)[0], leaves, gradient)

    return both_ways if training else inference


def _check_equal(theirs: nn.Module, ours: nn.Module, x: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], atol=1e-5, rtol=1e-4)
    pairs = zip(*(_call(m, x, gradient, True)() for m in (ours, theirs)), strict=True)  # type: ignore[call-overload]
    for a, b in pairs:
        scale = b.abs().max().clamp_min(1)
        torch.testing.assert_close(a / scale, b / scale, atol=1e-4, rtol=1e-3)


def conditions() -> dict[str, object]:
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "device": info.processor(),
        "threads": torch.get_num_threads(),
        "instruction set": _C.isa(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }


def plot(measured: Sequence[Row], about: dict[str, object], path: Path) -> None:
    """Times as fast as torch.nn, over the hidden size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), sharey=True, layout="constrained")
    panels = [(shape, training) for shape in SHAPES for training in (False, True)]
    for axis, (shape, training) in zip(axes, panels, strict=True):
        for layer in LAYERS:
            line = [
                r for r in measured if (r.layer, r.shape, r.training) == (layer, shape, training)
            ]
            axis.plot([r.hidden for r in line], [r.ratio for r in line], marker="o", label=layer)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="hidden size")
        axis.set_xticks(SIZES, [str(n) for n in SIZES], minor=False)
        axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_title(f"{'training' if training else 'inference'}\n{shape}", fontsize=10)
    axes[0].set_ylabel("times as fast as torch.nn")
    axes[0].legend()
    figure.suptitle(
        f"{about['device']}, {about['threads']} threads, float32, torch {about['torch']}, "
        f"fastrnn {about['commit']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.png", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="two sizes, a tenth of the time")
    given = parser.parse_args()
    budget = BUDGET / 10 if given.quick else BUDGET
    about = conditions()
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(
        f"\n{'layer':<6}{'shape':<24}{'H':>5}  {'':<10}{'torch.nn':>12}{'fastrnn':>12}{'ratio':>8}"
    )
    measured = []
    for row in rows(SIZES[1:3] if given.quick else SIZES, budget):
        measured.append(row)
        what = "training" if row.training else "inference"
        print(
            f"{row.layer:<6}{row.shape:<24}{row.hidden:>5}  {what:<10}"
            f"{row.torch:>9.0f} us{row.fastrnn:>9.0f} us{row.ratio:>8.2f}",
            flush=True,
        )
    calls = overhead(budget)
    for name, (theirs, ours) in calls.items():
        print(f"{name:<47}{theirs:>9.1f} us{ours:>9.1f} us{theirs / ours:>8.2f}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        record = {**about, "rows": [asdict(r) for r in measured], "calls": calls}
        given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        plot(measured, about, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
