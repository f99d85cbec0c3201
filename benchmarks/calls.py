"""Times what a call of a tiny layer costs, where Python and the framework take most of the time.

    python -m benchmarks.calls                        every row on one thread, about 8 minutes
    python -m benchmarks.calls --only stack,packed    rows whose names begin so
    python -m benchmarks.calls --cell lstm            one cell
    python -m benchmarks.calls --shape 1,1,16,16      one T, B, I, H
    python -m benchmarks.calls --save                 writes results/<machine>/calls.md too

Each row times inference, and a forward and backward pass with the gradients of the input and of
all weights, beside torch.nn's module with the same weights. Ours and torch.nn's take turns. Calls
with `lengths=` are timed beside the packed sequence that a user of torch.nn makes and pads again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from benchmarks.report import RESULTS
from fastrnn.tools.bench import measure, store
from fastrnn.tools.bench.implementation import Prepared

SHAPES = ((1, 1, 16, 16), (4, 1, 64, 64))  # T, B, I, H
CELLS = ("LSTM", "GRU", "RNN")

Call = Callable[[Any, Any], Any]  # of a module on its input


def plainly(module: Any, x: Any) -> Any:
    return module(x)


def with_states(module: Any, x: Any) -> Any:
    """Passes initial states, which are zeros, and takes the final ones."""
    state = module.given
    return module(x, (state, state) if "LSTM" in type(module).__name__ else state)


def with_lengths(module: Any, x: Tensor) -> Any:
    if isinstance(module, fastrnn.LSTM | fastrnn.GRU | fastrnn.RNN):
        return module(x, lengths=module.lengths)
    packed = pack_padded_sequence(x, module.lengths, enforce_sorted=False)
    y, last = module(packed)
    return pad_packed_sequence(y, total_length=x.shape[0])[0], last


def with_resets(module: Any, x: Tensor) -> Any:
    """An episode begins at every step, but not in the layer that takes the place of torch.nn's."""
    return module(x) if module.resets is None else module(x, resets=module.resets)


@dataclass(frozen=True)
class Case:
    """A kind of call.

    Attributes:
        options: arguments of the layer.
        call: how it is called.
        packed: whether the input is a packed sequence.
        ours: whether torch.nn has no such layer; then our own layer without the options is timed in
            its place.
    """

    name: str
    options: dict[str, Any]
    call: Call = plainly
    packed: bool = False
    ours: bool = False
    cells: Sequence[str] = CELLS


CASES = (
    Case("layer", {}),
    Case("stack of 2", {"num_layers": 2}),
    Case("stack of 4", {"num_layers": 4}),
    Case("bidirectional", {"bidirectional": True}),
    Case("stack of 2, bidirectional", {"num_layers": 2, "bidirectional": True}),
    Case("batch first", {"batch_first": True}),
    Case("stack of 2, batch first", {"num_layers": 2, "batch_first": True}),
    Case("initial states", {}, with_states),
    Case("stack of 2, initial states", {"num_layers": 2}, with_states),
    Case("packed", {}, packed=True),
    Case("stack of 2, packed", {"num_layers": 2}, packed=True),
    Case("lengths", {}, with_lengths),
    Case("resets", {}, with_resets, ours=True),
    Case("projection", {"proj_size": 8}, cells=("LSTM",)),
    Case("stack of 2, projection", {"num_layers": 2, "proj_size": 8}, cells=("LSTM",)),
    Case("heads", {"heads": 2}, ours=True),
    Case("noise", {"zoneout": 0.1}, ours=True),
    Case("stack of 2, noise", {"num_layers": 2, "zoneout": 0.1}, ours=True),
    Case("cell", {}),
    Case("cell, initial states", {}, with_states),
)


@dataclass(frozen=True)
class Row:
    """Microseconds of a call: ours, and torch.nn's or what took its place."""

    case: Case
    cell: str
    shape: tuple[int, ...]
    inference: tuple[float, float]
    training: tuple[float, float]

    @property
    def line(self) -> str:
        entries = [self.case.name, self.cell, str(self.shape)]
        for ours, theirs in (self.inference, self.training):
            if self.case.ours:
                entries += [f"{ours:.1f}", f"({theirs:.1f})", ""]
            else:
                over = f"{theirs / ours:.2f}"
                entries += [
                    f"{ours:.1f}",
                    f"{theirs:.1f}",
                    over if theirs >= ours else f"**{over}**",
                ]
        return f"| {' | '.join(entries)} |"


def modules(case: Case, cell: str, shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """Ours, and torch.nn's or what takes its place."""
    steps, batch, inputs, hidden = shape
    name = cell + "Cell" * case.name.startswith("cell")
    ours: Any
    theirs: Any
    if case.ours:
        ours, theirs = (getattr(fastrnn, name)(inputs, hidden, **o) for o in (case.options, {}))
    else:
        theirs = getattr(nn, name)(inputs, hidden, **case.options)
        ours = fastrnn.from_torch(theirs)
    for module in (ours, theirs):
        module.given = torch.zeros(batch, hidden)
        if name == cell:
            count = module.num_layers * (2 if module.bidirectional else 1)
            module.given = module.given.expand(count, batch, hidden).contiguous()
        module.lengths = torch.full((batch,), steps)
        module.resets = torch.ones(steps, batch, dtype=torch.bool) if module is ours else None
    return ours, theirs


def input_of(case: Case, shape: Sequence[int]) -> tuple[Any, Tensor]:
    """The input of a call, and the leaf in it."""
    steps, batch, inputs, _ = shape
    x = torch.randn(steps, batch, inputs)
    if case.name.startswith("cell"):
        x = x[0]
    elif case.packed:
        made = pack_padded_sequence(x, torch.full((batch,), steps))
        leaf = made.data.clone().requires_grad_()
        return made._replace(data=leaf), leaf
    elif case.options.get("batch_first"):
        x = x.transpose(0, 1).contiguous()
    leaf = x.requires_grad_()
    return leaf, leaf


def first(result: Any) -> Tensor:
    while not isinstance(result, Tensor):
        result = result.data if isinstance(result, PackedSequence) else result[0]
    return result


def time_row(case: Case, cell: str, shape: tuple[int, ...], seconds: float) -> Row:
    torch.manual_seed(0)
    pair = modules(case, cell, shape)
    x, leaf = input_of(case, shape)
    calls: dict[str, Prepared] = {}
    for name, module in zip(("ours", "theirs"), pair, strict=True):
        dy = torch.ones_like(first(case.call(module, x)))
        leaves = [leaf, *module.parameters()]

        def inference(module: nn.Module = module) -> Any:
            return case.call(module, x)

        def training(
            module: nn.Module = module, leaves: list[Any] = leaves, dy: Tensor = dy
        ) -> Any:
            return torch.autograd.grad(first(case.call(module, x)), leaves, dy)

        calls[f"{name}, inference"] = Prepared(inference, lambda _: {}, torch.no_grad)
        calls[f"{name}, training"] = Prepared(training, lambda _: {}, nullcontext)
    times = measure.interleaved(calls, seconds)
    both = [
        (times[f"ours, {mode}"].median, times[f"theirs, {mode}"].median)
        for mode in ("inference", "training")
    ]
    return Row(case, cell, shape, *both)


HEAD = """\
| call | cell | T, B, I, H | inference, µs | torch.nn | ratio | training | torch.nn | ratio |
|---|---|---|---|---|---|---|---|---|"""


def page(rows: Sequence[Row], command: str) -> str:
    """The table, with the conditions of the run."""
    slower = sum(
        theirs < ours
        for row in rows
        if not row.case.ours
        for ours, theirs in (row.inference, row.training)
    )
    return (
        "# What a call costs\n\n"
        f"{store.made_by(command, 'one thread')} Medians of calls in turn, float32. *Training* is "
        "a forward and a backward pass with the gradients of the input and of all weights. In "
        "brackets: our own layer without the option, where torch.nn has no such layer. torch.nn "
        f"is faster in {slower} entries.\n\n"
        + "\n".join([HEAD, *(row.line for row in rows)])
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    names = lambda text: tuple(text.split(","))  # noqa: E731
    sizes = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser.add_argument("--only", type=names, default=("",), help="beginnings of names of rows")
    parser.add_argument("--cell", type=str.upper, choices=CELLS, help="one cell")
    parser.add_argument("--shape", type=sizes, help="T,B,I,H")
    parser.add_argument("--seconds", type=float, default=0.15, help="of calls, for each entry")
    parser.add_argument("--save", action="store_true", help="write the table to the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all machines")
    given = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    print(HEAD)
    try:
        for shape in [given.shape] if given.shape else SHAPES:
            for case in CASES:
                for cell in case.cells:
                    if case.name.startswith(given.only) and given.cell in (None, cell):
                        rows.append(time_row(case, cell, shape, given.seconds))
                        print(rows[-1].line, flush=True)
    finally:
        torch.set_num_threads(threads)
    if given.save:
        words = sys.argv[1:] if arguments is None else arguments
        text = page(rows, store.command("benchmarks.calls", words))
        store.save_page(given.results, "calls.md", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
