"""Compares cells by what they remember, and by what they cost.

    python -m benchmarks.memory_tasks                      all networks, about 15 minutes
    python -m benchmarks.memory_tasks --only lstm,janet    some, or any other cell
    python -m benchmarks.memory_tasks --updates 2000 --hidden 64 --seeds 5
    python -m benchmarks.memory_tasks --save               writes results/<machine>/memory_tasks.md
                                                           and, with matplotlib, .svg;
                                                           with --only, it adds to the saved rows
    python -m benchmarks.memory_tasks --save --docs docs/cells.md    rewrites this page as well

Each task has a lag: so many steps lie between what is shown and when it is asked for. A cell with
a linear readout is trained anew for each lag of a ladder, with the same number of updates, and
climbs until a lag is not solved. The table has the longest lag that is solved:

- copy: a few symbols are shown one by one, and have to be named in the same order; solved if 95 %
  of the symbols of unseen sequences are right.
- adding: each step shows a number from 0 to 1, and two numbers are marked, one in the first tenth
  of the lag and one at the end. Their sum is asked for; solved if the mean squared error is below a
  tenth of that of the best constant.
- one bit: the first step shows 1 or -1, all others noise, and the last step has to name the sign;
  solved if 95 % of unseen sequences are right.

Weights begin with the default values of the cell, unless the name of a network says otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

import fastrnn
from benchmarks import report
from fastrnn import cells, hardware, init
from fastrnn.extension import _C
from fastrnn.tools.bench import measure, store
from fastrnn.tools.bench.implementation import Prepared


class Network(NamedTuple):
    name: str
    cell: str  # a name that fastrnn.cells.get finds
    start: Callable[[Any], Any] = lambda layer: layer  # writes other initial values


# Others can be added. --only also takes the name of any cell.
NETWORKS = (
    Network("rnn_tanh", "rnn_tanh"),
    Network("lstm", "lstm"),
    Network("lstm chrono", "lstm", lambda layer: init.chrono_(layer, 100)),
    Network("gru", "gru"),
    Network("mgu", "mgu"),
    Network("ligru", "ligru"),
    Network("peephole_lstm", "peephole_lstm"),
    Network("slstm", "slstm"),
    Network("layer_norm_lstm", "layer_norm_lstm"),
)
LAGS = (5, 10, 20, 40, 80, 160, 320)
SHAPE = (100, 32, 32)  # T, B, I of the calls that are timed; H is that of the tasks
SYMBOLS, SHOWN = 4, 3  # of the copy task: how many there are, how many are shown
NOISE = 0.3  # standard deviation of what the task of one bit shows after the bit
RIGHT = 0.95  # share of answers
CONSTANT = 1 / 6  # mean squared error of the constant 1 as the sum of two numbers from 0 to 1
LOOK = 50  # updates between looks whether a task is solved, which ends the training
UNSEEN = 512  # sequences of a look
BEGIN = "<!-- benchmarks/memory_tasks.py -->"
IMAGE = "memory_tasks.svg"


class Batch(NamedTuple):
    x: Tensor  # [T, B, I]
    target: Tensor  # [R, B], the answers at the last R steps


@dataclass(frozen=True)
class Task:
    """`batch(lag, B)` makes sequences; `scores(output, target)` are the loss and whether the
    outputs [R, B, O] solve the task."""

    name: str
    inputs: int
    outputs: int
    batch: Callable[[int, int], Batch]
    scores: Callable[[Tensor, Tensor], tuple[Tensor, bool]]


def copy(lag: int, count: int) -> Batch:
    """Step t shows symbol t, step t + lag asks for it. A marker comes before the first answer."""
    shown = min(SHOWN, lag - 1)
    symbols = torch.randint(SYMBOLS, (shown, count))
    x = torch.zeros(lag + shown, count, SYMBOLS + 1)
    x[:shown, :, :SYMBOLS] = one_hot(symbols, SYMBOLS).float()
    x[lag - 1, :, SYMBOLS] = 1
    return Batch(x, symbols)


def adding(lag: int, count: int) -> Batch:
    """Two of lag + 1 numbers are marked: one in the first tenth, and the last."""
    numbers, marks = torch.rand(lag + 1, count), torch.zeros(lag + 1, count)
    rows = torch.arange(count)
    first = torch.randint(max(1, lag // 10), (count,))
    marks[first, rows] = marks[-1] = 1
    return Batch(torch.stack([numbers, marks], -1), numbers[first, rows] + numbers[-1:])


def one_bit(lag: int, count: int) -> Batch:
    bits = torch.randint(2, (1, count))
    x = NOISE * torch.randn(lag + 1, count, 1)
    x[0, :, 0] = 2.0 * bits[0] - 1
    return Batch(x, bits)


def named(output: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    right = (output.argmax(-1) == target).float().mean().item()
    return cross_entropy(output.flatten(0, 1), target.flatten()), right >= RIGHT


def added(output: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    error = mse_loss(output.squeeze(-1), target)
    return error, error.item() < CONSTANT / 10


TASKS = (
    Task("copy", SYMBOLS + 1, SYMBOLS, copy, named),
    Task("adding", 2, 1, adding, added),
    Task("one bit", 1, 2, one_bit, named),
)


def layer_of(network: Network, inputs: int, hidden: int) -> Any:
    return network.start(fastrnn.Recurrent(cells.get(network.cell), inputs, hidden))


class Model(nn.Module):
    """A layer and a linear readout of its last steps."""

    def __init__(self, network: Network, task: Task, hidden: int) -> None:
        super().__init__()
        self.layer = layer_of(network, task.inputs, hidden)
        self.readout = nn.Linear(hidden, task.outputs)

    def forward(self, batch: Batch) -> Tensor:
        return self.readout(self.layer(batch.x)[0][-len(batch.target) :])


@dataclass(frozen=True)
class Budget:
    updates: int
    hidden: int
    batch: int
    seeds: int
    rate: float
    lags: tuple[int, ...]


def solves(network: Network, task: Task, lag: int, seed: int, budget: Budget) -> bool:
    """Whether the network learns the task with this lag within the budget."""
    torch.manual_seed(seed)
    model = Model(network, task, budget.hidden)
    optimizer = torch.optim.Adam(model.parameters(), budget.rate)
    for update in range(1, budget.updates + 1):
        batch = task.batch(lag, budget.batch)
        optimizer.zero_grad()
        task.scores(model(batch), batch.target)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update % LOOK == 0 or update == budget.updates:
            with torch.no_grad():
                batch = task.batch(lag, UNSEEN)
                if task.scores(model(batch), batch.target)[1]:
                    return True
    return False


def longest(network: Network, task: Task, seed: int, budget: Budget) -> int:
    """The longest lag of the ladder that is solved, with all before it; 0 if the first is not."""
    reached = 0
    for lag in budget.lags:
        if not solves(network, task, lag, seed, budget):
            break
        reached = lag
    return reached


@dataclass(frozen=True)
class Cost:
    """What a layer of one direction costs at SHAPE; times are medians in microseconds."""

    parameters: int
    training: float  # a forward and a backward pass
    step: float  # a step of a stepper, of one sequence
    saved: int  # bytes of the tensors that the backward pass needs, besides weights and input


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of all memory that autograd holds between the passes, weights and input apart."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    del result
    return sum(size for place, size in held.items() if place not in own)


def costs(
    networks: Sequence[Network], hidden: int, shape: Sequence[int], seconds: float
) -> list[Cost]:
    """What each network costs. The calls of all take turns, so that other load slows all alike."""
    steps, batch, inputs = shape
    torch.manual_seed(0)
    layers = [layer_of(network, inputs, hidden) for network in networks]
    x = torch.randn(steps, batch, inputs)

    def training(layer: Any) -> Callable[[], Any]:
        leaves = list(layer.parameters())
        return lambda: torch.autograd.grad(
            layer(x)[0].sum(), leaves, allow_unused=True, materialize_grads=True
        )

    def step(layer: Any) -> Callable[[], Any]:
        stepper, row, y = layer.stream(), x[0, :1].numpy().copy(), torch.empty(1, hidden).numpy()
        return lambda: stepper.step(row, y)

    def medians(make: Callable[[Any], Callable[[], Any]]) -> list[float]:
        calls = {
            network.name: Prepared(make(layer), lambda result: {}, nullcontext)
            for network, layer in zip(networks, layers, strict=True)
        }
        times = measure.interleaved(calls, seconds)
        return [times[network.name].median for network in networks]

    return [
        Cost(sum(p.numel() for p in layer.parameters()), both, one, saved_bytes(layer, x))
        for layer, both, one in zip(layers, medians(training), medians(step), strict=True)
    ]


@dataclass(frozen=True)
class Row:
    network: str
    lags: Mapping[str, tuple[int, ...]]  # of each task, the longest lag of every seed
    cost: Cost


def lag_of(lags: Sequence[int], last: int) -> str:
    """The median over seeds, and the range if they differ; ≥ if the ladder ends there."""
    low, high = min(lags), max(lags)
    median = f"{statistics.median_low(lags)}" if high else "–"
    more = "≥ " if statistics.median_low(lags) == last else ""
    return f"{more}{median}" + (f" ({low} to {high})" if low != high else "")


def line(row: Row, last: int) -> str:
    cost = row.cost
    entries = [row.network, *(lag_of(row.lags[task.name], last) for task in TASKS)]
    entries += [f"{cost.training / 1e3:.2f}", f"{cost.step:.2f}"]
    entries += [f"{cost.saved / 2**20:.2f}", f"{cost.parameters}"]
    return f"| {' | '.join(entries)} |"


HEAD = (
    "| network | copy, lag | adding, lag | one bit, lag | training step, ms | inference step, µs "
    "| saved for backward, MiB | parameters |\n|---|---|---|---|---|---|---|---|"
)


def table(rows: Sequence[Row], budget: Budget) -> str:
    return "\n".join([HEAD, *(line(row, budget.lags[-1]) for row in rows)])


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def conditions(budget: Budget, shape: Sequence[int], command: str) -> str:
    """How the table was made, in one paragraph."""
    threads = counted(torch.get_num_threads(), "thread")
    return (
        f"*{hardware.processor_and_model()} ({_C.isa()}), {threads}, float32, load average "
        f"{os.getloadavg()[1]:.1f} on {hardware.cores()} cores; fastrnn {fastrnn.__version__}, "
        f"torch {torch.__version__}; commit {store.commit()}, {time.strftime('%Y-%m-%d')}; "
        f"`{command}`. {terms(budget, shape)}*"
    )


def terms(budget: Budget, shape: Sequence[int]) -> str:
    """What rows of one table have in common."""
    seeds = counted(budget.seeds, "seed")
    return (
        f"Lags {', '.join(map(str, budget.lags))}; for each, at most "
        f"{budget.updates} updates of Adam ({budget.rate:g}) on {budget.batch} sequences, "
        f"H = {budget.hidden}; median over {seeds}, and the range if they differ. Times and bytes "
        f"are of one layer at (T, B, I, H) = {(*shape, budget.hidden)}; an inference step is of "
        "one sequence."
    )


def parsed(text: str) -> Row:
    """The row of a line of the table. Of the seeds' lags it has the least, the median and the
    greatest."""
    name, *entries = (entry.strip() for entry in text.strip(" |").split("|"))
    lags = {}
    for task, entry in zip(TASKS, entries, strict=False):
        middle, *ends = (int(n) for n in re.findall(r"\d+", entry.replace("–", "0")))
        lags[task.name] = (ends[0], middle, ends[1]) if ends else (middle,)
    training, step, saved, parameters = entries[len(TASKS) :]
    cost = Cost(int(parameters), 1e3 * float(training), float(step), round(float(saved) * 2**20))
    return Row(name, lags, cost)


def merged(text: str, rows: Sequence[Row], about: str) -> tuple[list[Row], str]:
    """The rows of a saved page, with these in the place of older ones or behind all, and the
    conditions of both."""
    new = {row.network: row for row in rows}
    lines = text.splitlines()
    start = lines.index(HEAD.splitlines()[0]) + 2
    saved = [parsed(each) for each in lines[start:] if each.startswith("|")]
    all_rows = [new.pop(row.network, row) for row in saved]
    names = f"*{', '.join(row.network for row in rows)}: "
    told = [each for each in lines if each.startswith("*") and not each.startswith(names)]
    return [*all_rows, *new.values()], "\n\n".join([*told, names + about.removeprefix("*")])


def page(rows: Sequence[Row], budget: Budget, about: str) -> str:
    return f"# What cells remember, and what they cost\n\n{table(rows, budget)}\n\n{about}\n"


def draw(rows: Sequence[Row], file: Path) -> bool:
    """Draw the lags and the costs of every cell; False if matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    # Text stays text. With fixed ids and no date, an unchanged drawing is an unchanged file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastrnn"})
    figure, (left, *others) = pyplot.subplots(
        1, 3, figsize=(11, 4), width_ratios=(2, 1, 1), layout="constrained"
    )
    left.set_yscale("log", base=2)
    width = 0.8 / len(TASKS)
    for k, task in enumerate(TASKS):
        found = [row.lags[task.name] for row in rows]
        medians = [statistics.median_low(lags) for lags in found]
        ranges = [
            [middle - min(lags) for middle, lags in zip(medians, found, strict=True)],
            [max(lags) - middle for middle, lags in zip(medians, found, strict=True)],
        ]
        places = [n + (k - 1) * width for n in range(len(rows))]
        left.bar(places, medians, width, yerr=ranges, label=task.name, error_kw={"lw": 0.8})
    left.set_yticks(LAGS, [str(lag) for lag in LAGS])
    left.set(ylabel="longest lag solved, and its range", ylim=(2.5, 1.3 * LAGS[-1]))
    left.legend(fontsize="small")
    others[0].bar(range(len(rows)), [row.cost.training / 1e3 for row in rows])
    others[0].set(ylabel="training step, ms")
    others[1].bar(range(len(rows)), [row.cost.saved / 2**20 for row in rows])
    others[1].set(ylabel="saved for the backward pass, MiB")
    for axes in (left, *others):
        axes.set_xticks(range(len(rows)), [row.network for row in rows], rotation=90)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True


def write(rows: Sequence[Row], budget: Budget, about: str, folder: Path, docs: Path | None) -> None:
    """Write page and drawing of this machine, and the part of a page of docs/ about them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory_tasks.md").write_text(page(rows, budget, about))
    print(f"wrote {folder / 'memory_tasks.md'}")
    drawn = draw(rows, folder / IMAGE)
    print(f"wrote {folder / IMAGE}" if drawn else "no drawing: matplotlib is not installed")
    if docs is None:
        return
    text = f"{table(rows, budget)}\n\n{about}"
    if drawn:
        link = docs.parent / "img" / IMAGE
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(folder / IMAGE, link.parent))
        text = f"![longest lag, time and memory of each cell](img/{IMAGE})\n\n{text}"
    docs.write_text(report.rewrite(docs.read_text(), text, BEGIN))
    print(f"rewrote {docs}")


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_tasks", description=about)
    numbers = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser.add_argument("--only", type=networks, default=NETWORKS, help="names, commas between")
    parser.add_argument("--updates", type=int, default=1200, help="most updates for each lag")
    parser.add_argument("--lags", type=numbers, default=LAGS, help="the ladder, ascending")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each task")
    parser.add_argument("--hidden", type=int, default=32, help="hidden size")
    parser.add_argument("--batch", type=int, default=32, help="sequences of an update")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of Adam")
    parser.add_argument("--shape", type=numbers, default=SHAPE, help="T,B,I of the timed calls")
    parser.add_argument("--seconds", type=float, default=4.0, help="of calls, for each time")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of fastrnn")
    parser.add_argument("--quick", action="store_true", help="one seed, few updates, short lags")
    parser.add_argument("--save", action="store_true", help="write table and drawing")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="of all machines")
    parser.add_argument("--docs", type=Path, help="rewrite this page and its image")
    options = parser.parse_args(arguments)
    if options.docs and not options.save:
        parser.error("--docs needs --save")
    updates, seeds, lags = options.updates, options.seeds, options.lags
    if options.quick:
        updates, seeds, lags = min(updates, 100), 1, lags[:2]
        options.seconds = min(options.seconds, 0.1)
    if min(updates, seeds) < 1 or min(lags) < 2 or sorted(lags) != list(lags):
        parser.error("updates and seeds begin with 1, lags with 2, and lags ascend")
    budget = Budget(updates, options.hidden, options.batch, seeds, options.rate, tuple(lags))
    folder = store.folder(options.results)
    saved = folder / "memory_tasks.md"
    before = ""
    if options.save and options.only is not NETWORKS and saved.exists():
        before, same = saved.read_text(), counted(options.threads, "thread") + ", float32"
        if same not in before or terms(budget, options.shape) not in before:
            parser.error(
                f"the rows of {saved} were made on other terms: leave out --only, or --save"
            )
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows = run(options.only, budget, options.shape, options.seconds)
        words = sys.argv[1:] if arguments is None else arguments
        command = store.command("benchmarks.memory_tasks", words)
        told = conditions(budget, options.shape, command)
    finally:
        torch.set_num_threads(threads)
    print(told)
    if options.save:
        if before:
            rows, told = merged(before, rows, told)
        write(rows, budget, told, folder, options.docs)
    return 0


def networks(text: str) -> tuple[Network, ...]:
    """Networks of these names, with commas between; a cell's name stands for the cell as it is."""
    known = {network.name: network for network in NETWORKS}
    return tuple(known.get(name) or Network(name, name) for name in text.split(","))


def run(
    chosen: Sequence[Network], budget: Budget, shape: Sequence[int], seconds: float
) -> list[Row]:
    """Rows of all networks, each printed when it is there."""
    print(HEAD, flush=True)
    rows = []
    for network, cost in zip(chosen, costs(chosen, budget.hidden, shape, seconds), strict=True):
        found = {
            task.name: tuple(longest(network, task, seed, budget) for seed in range(budget.seeds))
            for task in TASKS
        }
        rows.append(Row(network.name, found, cost))
        print(line(rows[-1], budget.lags[-1]), flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
