"""`python -m fastrnn demo` trains one model twice, with torch.nn and with fastrnn, side by side.

The model is the classifier of many tutorials (embedding, 2-layer recurrent net, Linear, ReLU,
Linear on the last step). It predicts the next character of the source code of Python's standard
library. Both copies start from the same weights and get the same batches. Their steps alternate,
so that other load on the machine affects both alike and the ratio of speeds is fair.

A cell that torch.nn lacks is trained beside a loop over its steps in torch operations, and beside
that loop with its step under `torch.compile`.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrnn import cells
from fastrnn.hardware import processor
from fastrnn.nn.layers import Recurrent
from fastrnn.nn.replace import replace_, restore_
from fastrnn.tools.corpus import Corpus
from fastrnn.tools.curves import COMPILED, FASTRNN, LOOP, TORCH, Comparison, largest, plot, table
from fastrnn.tools.loop import Loop
from fastrnn.tools.progress import bar

__all__ = ["NextCharacter", "main"]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
SHOWN = ("lstm", "gru", "layer_norm_lstm")
WARM_UP_STEPS = 5
# The two differ only in the order of float32 sums, but training amplifies the last bit: torch.nn
# in float32 drifts as far from torch.nn in float64. So the limits are tight for the first steps and
# for equal weights, and wide for the averaged losses of the curves.
EARLY_TOLERANCE = 1e-4
CURVE_TOLERANCE = 0.1
WEIGHTS_TOLERANCE = 1e-4


class NextCharacter(nn.Module):
    """Scores of the next character: embedding, 2-layer recurrent net, Linear, ReLU, Linear."""

    def __init__(self, cell: str, symbols: int, hidden: int) -> None:
        super().__init__()
        self.cell = cell
        self.embedding = nn.Embedding(symbols, 32)
        if cell in CELLS:
            self.rnn = CELLS[cell](32, hidden, num_layers=2, batch_first=True)
        else:
            self.rnn = Recurrent(cells.get(cell), 32, hidden, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, symbols))

    def forward(self, codes: Tensor, state: object = None) -> tuple[Tensor, object]:
        """From `codes` [B, T] to logits [B, symbols] and the state after the last step."""
        y, state = self.rnn(self.embedding(codes), state)
        return self.head(y[:, -1]), state


@dataclass(frozen=True)
class Options:
    seconds: float = 20.0
    steps: int | None = None
    hidden: int = 128
    window: int = 16
    batch: int = 64
    learning_rate: float = 5e-3
    seed: int = 0
    device: str = "cpu"


def run(
    cell: str, corpus: Corpus, options: Options, show: Callable[[float, str], None]
) -> tuple[Comparison, NextCharacter, str]:
    """Train all copies. Returns the comparison, fastrnn's model, and what differs between them."""
    torch.manual_seed(options.seed)
    models, report = _copies(NextCharacter(cell, len(corpus.symbols), options.hidden), options)
    batches = _batches(corpus, options)
    first = next(batches)
    if COMPILED in models:
        show(0.0, f"{cell}: torch.compile")
        if reason := _refusal(models[COMPILED], first, options):
            del models[COMPILED]
            report += f"\nwithout the {COMPILED}: torch.compile does not work here: {reason}"
    _warm_up([copy.deepcopy(model) for model in models.values()], first, options)

    comparison = Comparison(cell, tuple(models))
    optimizers = {n: _optimizer(m, options) for n, m in models.items()}
    start = time.perf_counter()
    while (progress := _progress(comparison.steps, start, options)) < 1:
        batch = next(batches)
        order = comparison.names if comparison.steps % 2 else comparison.names[::-1]
        for name in order:
            for group in optimizers[name].param_groups:
                group["lr"] = options.learning_rate * (1 - progress)
            before = time.perf_counter()
            loss = _train_step(models[name], optimizers[name], batch)
            comparison.times[name].append(time.perf_counter() - before)
            comparison.losses[name].append(loss)
        last = " / ".join(f"{losses[-1]:.3f}" for losses in comparison.losses.values())
        show(progress, f"{cell} step {comparison.steps}: loss {last}")
    show(1.0, f"{cell} {comparison.steps} steps")
    return comparison, models[FASTRNN], report


def _copies(model: NextCharacter, options: Options) -> tuple[dict[str, NextCharacter], str]:
    """The baselines and fastrnn's model, with the same weights, and what differs."""
    model = model.to(options.device)
    fast = copy.deepcopy(model)
    if not isinstance(model.rnn, Recurrent):
        report = str(replace_(fast))
        return {TORCH: model, FASTRNN: fast}, report
    baselines = {name: copy.deepcopy(model) for name in (LOOP, COMPILED)}
    for name, baseline in baselines.items():
        baseline.rnn = Loop(baseline.rnn, compiled=name == COMPILED)
    report = f"fastrnn.Recurrent beside a loop of torch operations, both of {model.rnn.cell.name}"
    return {**baselines, FASTRNN: fast}, report


def _refusal(model: NextCharacter, batch: Tensor, options: Options) -> str:
    """Why `torch.compile` cannot compile the model; empty if it can."""
    model = copy.deepcopy(model)
    try:
        _train_step(model, _optimizer(model, options), batch)
    except RuntimeError as error:  # of Dynamo and of inductor, which may lack a compiler
        return str(error).strip().splitlines()[0]
    return ""


def _batches(corpus: Corpus, options: Options) -> Iterator[Tensor]:
    """Endless random windows [B, T + 1], the same for the same seed."""
    random = torch.Generator("cpu").manual_seed(options.seed)
    span = torch.arange(options.window + 1, device="cpu")
    last = len(corpus.codes) - options.window
    if last < 1:
        raise ValueError(
            f"the text has {len(corpus.codes)} characters, "
            f"a window takes {options.window + 1}: give a longer text or a smaller --window"
        )
    while True:
        starts = torch.randint(last, (options.batch, 1), generator=random, device="cpu")
        yield corpus.codes[starts + span].to(options.device)


def _optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), options.learning_rate)


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[:, :-1])[0], batch[:, -1])
    loss.backward()
    optimizer.step()
    return loss.item()  # waits for the device, so that the caller measures the whole step


def _warm_up(models: list[NextCharacter], batch: Tensor, options: Options) -> None:
    for model in models:
        optimizer = _optimizer(model, options)
        for _ in range(WARM_UP_STEPS):
            _train_step(model, optimizer, batch)


def _progress(steps: int, start: float, options: Options) -> float:
    if options.steps is not None:
        return steps / options.steps
    return (time.perf_counter() - start) / options.seconds if steps else 0.0


def weights_difference(fast: NextCharacter, batch: Tensor) -> float:
    """Largest distance between fastrnn and the baseline with the weights of `fast`, over the logits
    and every gradient, each relative to its largest entry."""
    plain = copy.deepcopy(fast)
    if fast.cell in CELLS:
        restore_(plain)
    else:
        plain.rnn = Loop(plain.rnn)
    results = []
    for model in (plain, fast):
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits, batch[:, -1])
        results.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    pairs = [(a.detach(), b.detach()) for a, b in zip(*results, strict=True)]
    return largest(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


@torch.no_grad()
def generate(
    model: NextCharacter, corpus: Corpus, prompt: str, length: int, temperature: float = 0.5
) -> str:
    """Continue `prompt` by `length` characters, one step at a time, carrying the state."""
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(0)
    codes = corpus.encode(prompt)
    generated = codes[0].tolist()
    logits, state = model(codes.to(device))
    for _ in range(length):
        probabilities = F.softmax(logits / temperature, -1)
        code = torch.multinomial(probabilities, 1, generator=random)
        generated.append(int(code))
        logits, state = model(code, state)
    return corpus.decode(generated)


def conditions(options: Options) -> str:
    """The conditions of the measurement, in one line."""
    if torch.device(options.device).type == "cuda":
        where = torch.cuda.get_device_name(options.device)
    else:
        where = f"{processor()}, {torch.get_num_threads()} threads"
    return (
        f"{where} · torch {torch.__version__}, Python {platform.python_version()} · float32, "
        f"B {options.batch}, T {options.window}, H {options.hidden}, 2 layers"
    )


def _cell(name: str) -> str:
    """`name`, if it is that of a cell; else argparse prints the ValueError's message."""
    if name not in CELLS:
        try:
            cells.get(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn demo",
        description="Train one character model by torch operations and by fastrnn, side by side.",
    )
    add = parser.add_argument
    add(
        "--cell",
        nargs="+",
        type=_cell,
        default=list(SHOWN),
        help="cells to run, published ones too",
    )
    add("--seconds", type=float, default=default.seconds, help="training time per cell")
    add("--steps", type=int, help="train that many steps instead of a time")
    add("--hidden", type=int, default=default.hidden, help="hidden size")
    add("--window", type=int, default=default.window, help="characters the model sees")
    add("--batch", type=int, default=default.batch, help="windows per step")
    add("--learning-rate", type=float, default=default.learning_rate, help="at the start")
    add("--seed", type=int, default=default.seed, help="of weights and data order")
    add("--device", default=default.device, help="torch device")
    add("--text", type=Path, help="train on this file instead of the standard library")
    add("--sample", type=int, default=400, help="characters to generate")
    add("--out", type=Path, default=Path("demo.png"), help="where to save the plot")
    arguments = parser.parse_args(argv)
    if arguments.seconds <= 0 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--seconds and --steps must be positive")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0 if the trainings agree, 1 if not, 2 if there is no text to train
    on."""
    arguments = _parse(argv)
    options = Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
    try:
        return _demo(arguments, options)
    except (FileNotFoundError, ValueError) as error:
        print(f"fastrnn demo: {error}", file=sys.stderr)
        return 2


def _demo(arguments: argparse.Namespace, options: Options) -> int:
    if source := arguments.text:
        corpus = Corpus.of(source.read_text("utf-8", "replace"))
    else:
        corpus = Corpus.standard_library()
        source = f"standard library of Python {platform.python_version()}"
    print(f"text: {source}, {len(corpus.codes):,} characters, {len(corpus.symbols)} symbols")
    print(conditions(options))

    comparisons: list[Comparison] = []
    agree = True
    for cell in arguments.cell:
        with bar() as show:
            comparison, fast, report = run(cell, corpus, options, show)
        comparisons.append(comparison)
        distance = weights_difference(fast, next(_batches(corpus, options)))
        agree &= comparison.early_difference() <= EARLY_TOLERANCE
        agree &= comparison.curve_difference() <= CURVE_TOLERANCE and distance <= WEIGHTS_TOLERANCE
        print(f"\n{cell.upper()}: {report}\n\n{table(comparison)}")
        print(
            f"same trained weights in each: logits and gradients differ by {distance:.1e} at most"
        )
        sample = generate(fast, corpus, "def ", arguments.sample)
        print(f"\nwritten by the trained model:\n{sample}")

    try:
        plot(comparisons, conditions(options), arguments.out)
        print(f"\nplot: {arguments.out}")
    except ModuleNotFoundError:
        print("\nno plot: matplotlib is not installed; pip install 'fastrnn[demo]' brings it")
    if not agree:
        print("\nthe trainings do NOT agree: this is a bug", file=sys.stderr)
    return 0 if agree else 1
