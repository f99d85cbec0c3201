"""Times training with every published cell beside a loop of torch operations that computes the
same, beside that loop with its step under `torch.compile`, and beside our LSTM.

    python -m benchmarks.cells                           every cell, about 25 minutes
    python -m benchmarks.cells --only janet,cifg         some cells
    python -m benchmarks.cells --shape 100,8,64,128      other T, B, I, H; may be repeated
    python -m benchmarks.cells --no-compiled             without torch.compile
    python -m benchmarks.cells --save                    writes results/<machine>/cells.md too

The loop projects the whole input at once and calls the cell's function on every step. A cell is
timed only if outputs and gradients of ours are as near to those of float64 as the loop's. Cells
with random numbers draw them in ours alone: they are compared, and the loop is timed, as in
evaluation.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrnn
from benchmarks.report import RESULTS
from fastrnn import cells
from fastrnn.cells.published import MODULES
from fastrnn.tools.bench import measure, store
from fastrnn.tools.bench.implementation import Prepared
from fastrnn.tools.loop import Loop

SHAPES = ((100, 8, 64, 64), (100, 8, 128, 128))  # T, B, I, H
LEAST_OVER_LOOP = 8.0
BUILT_IN = ("rnn_tanh", "gru", "lstm")
# Our LSTM with noise, or with clipped gradients.
VARIANTS: dict[str, Callable[[], cells.Cell]] = {
    "lstm+zoneout": lambda: cells.zoneout(cells.lstm, 0.1),
    "lstm+recurrent_dropout": lambda: cells.recurrent_dropout(cells.lstm, 0.25),
    "lstm+recurrent_dropout_per_step": lambda: cells.recurrent_dropout(cells.lstm, 0.25, "step"),
    "lstm+clip_grad": lambda: cells.clip_grad(cells.lstm, 1.0),
}
# Of the error, relative to the largest number: a floor, and a multiple of the loop's own error,
# since some cells amplify rounding from step to step.
FLOOR, MULTIPLE = 1e-4, 4.0


@dataclass(frozen=True)
class Row:
    """Microseconds of a training step: forward and backward pass."""

    shape: tuple[int, ...]
    cell: str
    ours: float
    loop: float
    compiled: float | None
    lstm: float


def training(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        y = forward()
        return [y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True)]

    return call


def time_cell(name: str, shape: tuple[int, ...], compiled: bool, seconds: float) -> Row:
    steps, batch, inputs, hidden = shape
    torch.manual_seed(0)
    cell = VARIANTS[name]() if name in VARIANTS else cells.get(name)
    layer: Any = fastrnn.Recurrent(cell, inputs, hidden).eval()
    lstm: Any = fastrnn.LSTM(inputs, hidden)
    x = torch.randn(steps, batch, inputs, requires_grad=True)
    leaves = [x, *layer.parameters()]
    loop = Loop(layer)
    calls = {
        "ours": training(lambda: layer(x)[0], leaves),
        "loop": training(lambda: loop(x)[0], leaves),
    }
    if compiled:
        torch._dynamo.reset()
        in_one = Loop(layer, compiled=True)
        calls["compiled"] = training(lambda: in_one(x)[0], leaves)
    right = exact(layer, x)
    loops = calls["loop"]()
    for other, call in calls.items():
        for one, theirs, expected in zip(call(), loops, right, strict=True):
            gate(f"{name}, {other}", one, theirs, expected)
    layer.train()
    calls["lstm"] = training(lambda: lstm(x)[0], [x, *lstm.parameters()])
    prepared = {n: Prepared(call, lambda result: {}, nullcontext) for n, call in calls.items()}
    times = measure.interleaved(prepared, seconds)
    medians = {n: each.median for n, each in times.items()}
    compiled_loop = medians.get("compiled")
    return Row(shape, name, medians["ours"], medians["loop"], compiled_loop, medians["lstm"])


def exact(layer: torch.nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output and gradients of the loop in float64."""
    double = copy.deepcopy(layer).double()
    inputs = x.detach().double().requires_grad_()
    loop = Loop(double)
    made: list[Tensor | None] = training(lambda: loop(inputs)[0], [inputs, *double.parameters()])()
    return made


def gate(which: str, one: Tensor | None, theirs: Tensor | None, expected: Tensor | None) -> None:
    if expected is None or theirs is None:  # a parameter that the cell does not read
        assert one is None or not one.any(), which
        return
    assert one is not None, which
    size = expected.detach().abs().max().clamp_min(1)
    error, own = ((a - expected).detach().abs().max() / size for a in (one, theirs))
    assert error <= FLOOR + MULTIPLE * own, (
        f"{which}: an error of {error:.2g}, the loop's {own:.2g}"
    )


def line(row: Row) -> str:
    over = row.loop / row.ours
    entries = [row.cell, f"{row.ours / 1e3:.2f}", f"{row.loop / 1e3:.1f}"]
    entries.append("" if row.compiled is None else f"{row.compiled / 1e3:.1f}")
    entries.append(f"{over:.1f}" if over >= LEAST_OVER_LOOP else f"**{over:.1f}**")
    entries.append("" if row.compiled is None else f"{row.compiled / row.ours:.1f}")
    entries.append(f"{row.ours / row.lstm:.2f}")
    return f"| {' | '.join(entries)} |"


HEAD = """\
| cell | ours, ms | loop, ms | compiled, ms | loop ÷ ours | compiled ÷ ours | ours ÷ our LSTM |
|---|---|---|---|---|---|---|"""


def head(shape: Sequence[int]) -> str:
    return f"(T, B, I, H) = {tuple(shape)}\n\n{HEAD}"


def page(rows: Sequence[Row], command: str) -> str:
    """A table for each shape, with the conditions of the run."""
    return (
        "# Training with the published cells\n\n"
        f"{store.made_by(command)} One layer, float32: medians "
        "of a forward and a backward pass, interleaved. *loop* is the cell's function called on "
        "every step, *compiled* the same with the step under `torch.compile`. Cells with random "
        "numbers draw them in ours alone.\n\n"
        + "\n\n".join(
            table([row for row in rows if row.shape == shape])
            for shape in dict.fromkeys(row.shape for row in rows)
        )
        + "\n"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows of one shape."""
    held = sum(row.loop / row.ours >= LEAST_OVER_LOOP for row in rows)
    return (
        f"{head(rows[0].shape)}\n"
        + "\n".join(map(line, rows))
        + f"\n\n{held} of {len(rows)} are at least {LEAST_OVER_LOOP:.0f} times as fast as the loop."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cells", description=__doc__)
    names = lambda text: tuple(text.split(","))  # noqa: E731
    sizes = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser.add_argument(
        "--only", type=names, default=(*BUILT_IN, *MODULES, *VARIANTS), help="cells"
    )
    parser.add_argument("--shape", type=sizes, action="append", help="T,B,I,H; may be repeated")
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls, for each entry")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false")
    parser.add_argument("--save", action="store_true", help="write the table to the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all machines")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for shape in options.shape or SHAPES:
        print(head(shape))
        for name in options.only:
            rows.append(time_cell(name, shape, options.compiled, options.seconds))
            print(line(rows[-1]), flush=True)
        print()
    if options.save:
        words = sys.argv[1:] if arguments is None else arguments
        text = page(rows, store.command("benchmarks.cells", words))
        store.save_page(options.results, "cells.md", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
