"""`python -m fastrnn demo` trains one model twice, with torch.nn and with fastrnn, side by side.

The model is the classifier of many tutorials (embedding, 2-layer recurrent net, Linear, ReLU,
Linear on the last step). It predicts the next character of the source code of Python's standard
library. Both copies start from the same weights and get the same batches. Their steps alternate,
so that other load on the machine affects both alike and the ratio of speeds is fair.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrnn.hardware import processor
from fastrnn.nn.replace import replace_, restore_

__all__ = ["Comparison", "Corpus", "NextCharacter", "main"]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
TORCH, FASTRNN = "torch.nn", "fastrnn"
WARM_UP_STEPS = 5
CHECKPOINTS = 10
EARLY_STEPS = 10
# The two differ only in the order of float32 sums, but training amplifies the last bit: torch.nn
# in float32 drifts as far from torch.nn in float64. So the limits are tight for the first steps and
# for equal weights, and wide for the averaged losses of the curves.
EARLY_TOLERANCE = 1e-4
CURVE_TOLERANCE = 0.1
WEIGHTS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Corpus:
    """A text as symbol numbers.

    Attributes:
        codes: int64 [characters].
        symbols: the alphabet; `symbols[code]` is the character.
    """

    codes: Tensor
    symbols: str

    @classmethod
    def of(cls, text: str) -> Corpus:
        """The printable ASCII and line ends of `text`; four spaces become one symbol."""
        text = "".join(c for c in text.replace("    ", "\t") if c in "\t\n" or " " <= c <= "~")
        symbols = "".join(sorted(set(text)))
        number = {c: k for k, c in enumerate(symbols)}
        return cls(
            torch.tensor([number[c] for c in text], dtype=torch.int64, device="cpu"), symbols
        )

    @classmethod
    def standard_library(cls) -> Corpus:
        """The source of the running Python's standard library.

        Raises:
            FileNotFoundError: if this Python was installed without its sources.
        """
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(folder.glob("*.py"))
        if len(files) < 50:
            raise FileNotFoundError(
                f"{folder} holds {len(files)} Python files, too few to train on: this Python came "
                "without the sources of its standard library; pass a text with --text FILE"
            )
        return cls.of("\n".join(f.read_text("utf-8", "replace") for f in files))

    def encode(self, text: str) -> Tensor:
        """The codes of `text`, int64 [1, characters], without those outside the alphabet."""
        codes = [self.symbols.index(c) for c in text if c in self.symbols]
        return torch.tensor([codes], device="cpu")

    def decode(self, codes: Sequence[int]) -> str:
        return "".join(self.symbols[c] for c in codes).replace("\t", "    ")


class NextCharacter(nn.Module):
    """Scores of the next character: embedding, 2-layer recurrent net, Linear, ReLU, Linear."""

    def __init__(self, cell: str, symbols: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        self.rnn = CELLS[cell](32, hidden, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, symbols))

    def forward(self, codes: Tensor, state: object = None) -> tuple[Tensor, object]:
        """From `codes` [B, T] to logits [B, symbols] and the state after the last step."""
        y, state = self.rnn(self.embedding(codes), state)
        return self.head(y[:, -1]), state


@dataclass(frozen=True)
class Options:
    seconds: float = 60.0
    steps: int | None = None
    hidden: int = 128
    window: int = 16
    batch: int = 64
    learning_rate: float = 5e-3
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Comparison:
    """The result of a side-by-side training: loss (nats) and time (s) per step of each copy."""

    cell: str
    losses: dict[str, list[float]] = field(default_factory=lambda: {TORCH: [], FASTRNN: []})
    times: dict[str, list[float]] = field(default_factory=lambda: {TORCH: [], FASTRNN: []})

    @property
    def steps(self) -> int:
        return len(self.losses[TORCH])

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, mean loss since the previous checkpoint) at about ten checkpoints."""
        n, parts = self.steps, min(CHECKPOINTS, self.steps)
        edges = [n * k // parts for k in range(parts + 1)]
        return [(b, statistics.fmean(self.losses[name][a:b])) for a, b in pairwise(edges)]

    def early_difference(self) -> float:
        """Largest distance between the losses of the first steps."""
        pairs = zip(self.losses[TORCH], self.losses[FASTRNN], strict=True)
        return _largest(a - b for a, b in islice(pairs, EARLY_STEPS))

    def curve_difference(self) -> float:
        """Largest distance between the two curves."""
        pairs = zip(self.curve(TORCH), self.curve(FASTRNN), strict=True)
        return _largest(a - b for (_, a), (_, b) in pairs)

    def speed(self, name: str) -> float:
        """Steps per second, from the median step."""
        return 1 / statistics.median(self.times[name])

    def ratio(self) -> float:
        return self.speed(FASTRNN) / self.speed(TORCH)


def run(
    cell: str, corpus: Corpus, options: Options, show: Callable[[float, str], None]
) -> tuple[Comparison, NextCharacter, str]:
    """Train both copies. Returns the comparison, fastrnn's model and the report of `replace_`."""
    torch.manual_seed(options.seed)
    plain = NextCharacter(cell, len(corpus.symbols), options.hidden).to(options.device)
    fast = copy.deepcopy(plain)
    report = str(replace_(fast))
    batches = _batches(corpus, options)
    _warm_up([copy.deepcopy(plain), copy.deepcopy(fast)], next(batches), options)

    comparison = Comparison(cell)
    models = {TORCH: plain, FASTRNN: fast}
    optimizers = {n: _optimizer(m, options) for n, m in models.items()}
    start = time.perf_counter()
    while (progress := _progress(comparison.steps, start, options)) < 1:
        batch = next(batches)
        order = [TORCH, FASTRNN] if comparison.steps % 2 else [FASTRNN, TORCH]
        for name in order:
            for group in optimizers[name].param_groups:
                group["lr"] = options.learning_rate * (1 - progress)
            before = time.perf_counter()
            loss = _train_step(models[name], optimizers[name], batch)
            comparison.times[name].append(time.perf_counter() - before)
            comparison.losses[name].append(loss)
        a, b = comparison.losses[TORCH][-1], comparison.losses[FASTRNN][-1]
        show(progress, f"{cell} step {comparison.steps}: loss {a:.3f} / {b:.3f}")
    show(1.0, f"{cell} {comparison.steps} steps")
    return comparison, fast, report


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
    """Largest distance between fastrnn and torch.nn with the weights of `fast`, over the logits and
    every gradient, each relative to its largest entry."""
    plain = copy.deepcopy(fast)
    restore_(plain)
    results = []
    for model in (plain, fast):
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits, batch[:, -1])
        results.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    pairs = [(a.detach(), b.detach()) for a, b in zip(*results, strict=True)]
    return _largest(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def _largest(values: Iterable[float]) -> float:
    """Largest magnitude, or NaN if there is one; the built-in max may miss it."""
    return float(torch.tensor(list(values), dtype=torch.float64, device="cpu").abs().max())


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


def table(comparison: Comparison) -> str:
    """Both loss curves and both speeds, as text."""
    lines = [f"{'step':>7} {TORCH:>10} {FASTRNN:>10} {'difference':>11}   (loss in nats)"]
    for (step, a), (_, b) in zip(comparison.curve(TORCH), comparison.curve(FASTRNN), strict=True):
        lines.append(f"{step:>7} {a:>10.4f} {b:>10.4f} {abs(a - b):>11.1e}")
    lines.append(
        f"largest difference of losses: {comparison.early_difference():.1e} in the first "
        f"{min(EARLY_STEPS, comparison.steps)} steps, {comparison.curve_difference():.1e} between "
        "the curves"
    )
    lines.append(
        f"training steps per second: {TORCH} {comparison.speed(TORCH):.1f}, "
        f"{FASTRNN} {comparison.speed(FASTRNN):.1f}: {comparison.ratio():.2f} times as fast "
        f"(medians of {comparison.steps} interleaved steps)"
    )
    return "\n".join(lines)


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


def plot(comparisons: Sequence[Comparison], options: Options, path: Path) -> None:
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
    styles = {TORCH: ("#888888", "-", 3.0), FASTRNN: ("#d1495b", "--", 1.6)}
    for comparison, (by_step, by_time) in zip(comparisons, axes, strict=True):
        for name, (color, line, width) in styles.items():
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
    figure.text(0.5, 0.01, conditions(options), ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    figures.close(figure)


@contextmanager
def _bar() -> Iterator[Callable[[float, str], None]]:
    """A progress bar: rich's if it is installed, else one plain line on a terminal."""
    try:
        progress = importlib.import_module("rich.progress")
    except ModuleNotFoundError:
        yield _plain_bar
        return
    columns = (
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, note: bar.update(task, completed=min(done, 1.0), description=note)


def _plain_bar(done: float, note: str) -> None:
    if sys.stdout.isatty():
        filled = int(30 * min(done, 1.0))
        end = "\n" if done >= 1 else ""
        print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {note:<45}", end=end, flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn demo",
        description="Train one character model twice, by torch.nn and by fastrnn, side by side.",
    )
    add = parser.add_argument
    add("--cell", nargs="+", choices=list(CELLS), default=["lstm", "gru"], help="cells to run")
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
    """Run the demo. Returns 0 if both trainings agree, 1 if not, 2 if there is no text to train
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
        with _bar() as show:
            comparison, fast, report = run(cell, corpus, options, show)
        comparisons.append(comparison)
        distance = weights_difference(fast, next(_batches(corpus, options)))
        agree &= comparison.early_difference() <= EARLY_TOLERANCE
        agree &= comparison.curve_difference() <= CURVE_TOLERANCE and distance <= WEIGHTS_TOLERANCE
        print(f"\n{cell.upper()}: {report}\n\n{table(comparison)}")
        print(
            f"same trained weights in both: logits and gradients differ by {distance:.1e} at most"
        )
        sample = generate(fast, corpus, "def ", arguments.sample)
        print(f"\nwritten by the trained model:\n{sample}")

    try:
        plot(comparisons, options, arguments.out)
        print(f"\nplot: {arguments.out}")
    except ModuleNotFoundError:
        print("\nno plot: matplotlib is not installed; pip install 'fastrnn[demo]' brings it")
    if not agree:
        print("\nthe two trainings do NOT agree: this is a bug", file=sys.stderr)
    return 0 if agree else 1
