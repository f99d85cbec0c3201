"""`python -m fastrnn info | cell | plan | demo | bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from fastrnn._version import __version__
from fastrnn.plan.dtypes import BYTES

_DTYPES = (*BYTES, "complex64", "complex128")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 1 if a check failed, 2 if arguments are invalid."""
    parser = _parser()
    options, others = parser.parse_known_args(argv)
    if options.command == "demo":
        from fastrnn.tools import demo

        return demo.main(others)
    if options.command == "bench":
        from fastrnn.tools.bench import command

        return command.main(others)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return {"info": _info, "cell": _cell, "plan": _plan}[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastrnn", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser(
        "info", help="versions, devices, instruction sets, usable kernels and a self-check"
    )
    form = info.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="only what each kernel supports")

    cell = commands.add_parser("cell", help="what is derived from a cell")
    cell.add_argument("name", help="for instance lstm")

    plan = commands.add_parser("plan", help="how a layer of a given shape runs here, and why")
    plan.add_argument(
        "--shape",
        type=_shape,
        required=True,
        metavar="T,B,I,H",
        help="steps, batch, input size, hidden size",
    )
    plan.add_argument("--cell", default="lstm", help="default lstm")
    plan.add_argument("--dtype", choices=_DTYPES, default="float32", help="default float32")
    plan.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    plan.add_argument("--directions", type=int, choices=(1, 2), default=1)
    plan.add_argument("--train", action="store_true", help="forward that keeps what BPTT needs")
    plan.add_argument("--backward", action="store_true", help="back-propagation through time")
    plan.add_argument("--json", action="store_true", help="as JSON")

    commands.add_parser("demo", add_help=False, help="train a model of torch.nn and ours")
    commands.add_parser(
        "bench", add_help=False, help="time a layer of a given shape and its baselines"
    )
    return parser


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        steps, batch, inputs, hidden = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"four whole numbers T,B,I,H are expected, as in 100,32,64,256; got {text!r}"
        ) from None
    if min(steps, batch, inputs, hidden) < 0:
        raise argparse.ArgumentTypeError(f"sizes cannot be negative; got {text!r}")
    return steps, batch, inputs, hidden


def _info(options: argparse.Namespace) -> int:
    from fastrnn.tools import info

    if options.markdown:
        print(info.support_markdown())
        return 0
    facts = info.collect()
    print(json.dumps(asdict(facts), indent=2) if options.json else info.text(facts))
    return 0 if facts.self_check.passed else 1


def _cell(options: argparse.Namespace) -> int:
    from fastrnn import cells
    from fastrnn.compiler.derive import derive
    from fastrnn.compiler.describe import describe

    try:
        print(describe(derive(cells.get(options.name))))
    except ValueError as error:
        return _refused(error)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from fastrnn import plan
    from fastrnn.tools import info

    try:
        problem, device, chosen = info.plan_for(
            options.cell,
            options.shape,
            dtype=options.dtype,
            directions=options.directions,
            tape=options.train,
            backward=options.backward,
            kind=options.device,
        )
    except (ValueError, plan.KernelRefused) as error:
        return _refused(error)
    if options.json:
        parts = {"problem": asdict(problem), "device": asdict(device), "plan": asdict(chosen)}
        print(json.dumps(parts, indent=2))
    else:
        print(info.plan_text(problem, device, chosen))
    return 0


def _refused(error: Exception) -> int:
    print(f"fastrnn: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
