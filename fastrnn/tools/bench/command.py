"""`python -m fastrnn bench --shape T,B,I,H`: your own shape, ours against its baselines, here."""

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
    """Time one shape; 0 on success, 1 where our results are wrong, 2 for impossible arguments."""
    parser = _parser()
    given = parser.parse_args(argv)
    names = [each.name for each in comparison.BASELINES[given.device]]
    wanted = given.baselines.split(",") if given.baselines else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no baseline {', '.join(unknown)}; there are: {', '.join(names)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    if given.threads:
        torch.set_num_threads(given.threads)
    mode = "step" if given.stream else "training" if given.training else "inference"
    steps, batch, inputs, hidden = given.shape
    try:
        workload = Workload(
            "your shape",
            1 if given.stream else steps,
            batch,
            inputs,
            hidden,
            layers=given.layers,
            bidirectional=given.bidirectional,
            dtype=given.dtype,
            modes=(mode,),
            baselines=tuple(wanted),
            compiled_loop="compiled loop" in wanted and given.baselines is not None,
        )
    except ValueError as error:
        parser.error(str(error))
    # Measuring is the long part and shows nothing until it ends.
    print(
        "measuring the machine, then every implementation in turn ...", file=sys.stderr, flush=True
    )
    here = machine.measure(given.device)
    try:
        row, _ = comparison.run(
            workload,
            given.layer,
            mode,
            here,
            seconds=given.seconds,
            latency_calls=given.latency_calls,
            device=given.device,
        )
    except comparison.GateFailed as failure:
        print(f"fastrnn: nothing was timed: {failure}", file=sys.stderr)
        return 1
    print(json.dumps(row.as_json(), indent=2) if given.json else text(row, here))
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
    """A row as a person reads it, fastest first."""
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
