"""`python -m fastrnn bench --shape T,B,I,H` times fastrnn and its baselines on your shape."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from fastrnn.hardware import processor
from fastrnn.plan.dtypes import BYTES
from fastrnn.tools.bench import comparison, machine
from fastrnn.tools.bench.workload import CELLS, Workload

__all__ = ["main", "text"]


def main(argv: Sequence[str] | None = None) -> int:
    """Time one shape. Returns 0 on success, 1 if our results are wrong, 2 if arguments are
    invalid."""
    parser = _parser()
    options = parser.parse_args(argv)
    names = [baseline.name for baseline in comparison.BASELINES[options.device]]
    wanted = options.baselines.split(",") if options.baselines else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no baseline {', '.join(unknown)}; there are: {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    if options.threads:
        torch.set_num_threads(options.threads)
    mode = "step" if options.stream else "training" if options.training else "inference"
    steps, batch, inputs, hidden = options.shape
    try:
        workload = Workload(
            "your shape",
            1 if options.stream else steps,
            batch,
            inputs,
            hidden,
            layers=options.layers,
            bidirectional=options.bidirectional,
            dtype=options.dtype,
            modes=(mode,),
            baselines=tuple(wanted),
            compiled_loop="compiled loop" in wanted and options.baselines is not None,
        )
    except ValueError as error:
        parser.error(str(error))
    # The measurement takes long and prints nothing until it ends.
    print(
        "measuring the machine, then every implementation in turn ...", file=sys.stderr, flush=True
    )
    here = machine.measure(options.device)
    try:
        row, _ = comparison.run(
            workload,
            options.layer,
            mode,
            here,
            seconds=options.seconds,
            latency_calls=options.latency_calls,
            device=options.device,
        )
    except comparison.GateFailed as failure:
        print(f"fastrnn: nothing was timed: {failure}", file=sys.stderr)
        return 1
    print(json.dumps(row.as_json(), indent=2) if options.json else text(row, here))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        required=True,
        metavar="T,B,I,H",
        help="steps, batch, input size, hidden size",
    )
    parser.add_argument("--layer", choices=CELLS, default="lstm", help="default lstm")
    parser.add_argument("--layers", type=int, default=1, help="stacked, default 1")
    parser.add_argument("--bidirectional", action="store_true")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--training", action="store_true", help="forward and backward")
    mode.add_argument("--stream", action="store_true", help="one step per call; T does not matter")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--threads", type=int, help="default: as many as torch would take")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of each implementation, default 0.5"
    )
    parser.add_argument(
        "--latency-calls",
        type=int,
        default=10_000,
        metavar="N",
        help="with --stream: steps timed one by one, default 10000",
    )
    parser.add_argument(
        "--baselines",
        metavar="NAMES",
        help="only these, with commas between; default all but the compiled loop, whose "
        "compilation takes long",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) if part.isdigit() else 0 for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"four whole numbers T,B,I,H are expected, as in 100,32,64,256; got {text!r}"
        )
    return sizes


def text(row: comparison.Row, here: machine.Machine) -> str:
    """A row as text, the fastest implementation first."""
    shape = f"T={row.steps} B={row.batch} I={row.inputs} H={row.hidden}"
    stack = f", {row.layers} layers" * (row.layers > 1) + ", bidirectional" * row.bidirectional
    lines = [
        f"{row.cell.upper()}, {row.mode}, {shape}{stack}, {row.dtype}",
        f"{processor()}, {row.threads} threads; peak {here.peak:.0f} GFLOP/s; the roofline is "
        f"{_micros(row.roofline)} us, by {row.roofline_by}",
        "",
        f"{'':<24}{'median us':>11}{'p20':>10}{'p80':>10}{'us/step':>10}{'GFLOP/s':>9}"
        f"{'roofline':>10}{'MiB':>8}{'error':>10}{'ours is':>10}",
    ]
    for e in sorted(row.entries, key=lambda e: e.median):
        memory = "" if e.memory is None else f"{e.memory / 2**20:.1f}"
        ratio = "" if e is row.ours else f"{e.median / row.ours.median:.2f} x"
        times = "".join(f"{_micros(t):>{w}}" for t, w in ((e.median, 11), (e.p20, 10), (e.p80, 10)))
        lines.append(
            f"{e.name:<24}{times}{e.median / row.steps:>10.2f}{row.gflops(e):>9.1f}"
            f"{row.roofline / e.median:>10.0%}{memory:>8}{e.error:>10.0e}{ratio:>10}"
        )
    delays = [(e.name, e.latency) for e in row.entries if e.latency]
    if delays:
        lines += ["", f"{'single calls, us':<24}{'p50':>11}{'p99':>10}{'longest':>10}"]
        lines += [f"{name:<24}{d.p50:>11.1f}{d.p99:>10.1f}{d.longest:>10.1f}" for name, d in delays]
    return "\n".join([*lines, "", *(f"not {name}: {why}" for name, why in row.refused.items())])


def _micros(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
