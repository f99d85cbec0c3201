"""Rows on disk: one JSON file for each machine, in which a later run replaces the rows it timed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastrnn._version import __version__
from fastrnn.extension import _C
from fastrnn.hardware import processor
from fastrnn.tools.bench.comparison import Row
from fastrnn.tools.bench.machine import Machine

__all__ = ["Conditions", "Results", "conditions", "load", "merge", "save"]

_DIGITS = 4  # of every number: more than any time is good for


@dataclass(frozen=True)
class Conditions:
    """Where, when and with what rows were timed."""

    device: str
    instruction_set: str
    versions: dict[str, str]
    commit: str
    command: str
    date: str
    machine: Machine


@dataclass(frozen=True)
class Results:
    """Rows, each with the number of the run in `runs` that timed it."""

    runs: tuple[Conditions, ...]
    rows: tuple[tuple[Row, int], ...]


def conditions(machine: Machine, command: str, device: str = "cpu") -> Conditions:
    """Those of this moment. `command`: what repeats the run."""
    versions = {
        "fastrnn": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    for name in ("onnxruntime", "openvino", "jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if device == "cuda":
        versions |= _gpu_versions()
    return Conditions(
        device=torch.cuda.get_device_name() if device == "cuda" else processor(),
        instruction_set=_C.isa(),
        versions=versions,
        commit=_commit(),
        command=command,
        date=time.strftime("%Y-%m-%d %H:%M"),
        machine=machine,
    )


def _gpu_versions() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA": torch.version.cuda or "unknown",
        "cuDNN": str(torch.backends.cudnn.version()),
        "triton": triton,
    }


def _commit() -> str:
    return _output("git", "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    """The first line that a command prints."""
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    return next(iter(said.splitlines()), "unknown")


def load(path: Path) -> Results:
    """The results in a file; none where there is no file."""
    if not path.exists():
        return Results((), ())
    values = json.loads(path.read_text())
    runs = [Conditions(**{**run, "machine": Machine(**run["machine"])}) for run in values["runs"]]
    rows = [(Row.from_json(row), number) for number, row in values["rows"]]
    return Results(tuple(runs), tuple(rows))


def merge(before: Results, run: Conditions, rows: Iterable[Row], order: Sequence[str]) -> Results:
    """`before` with rows of a new run, which replace those of the same key.

    Rows are sorted by the place of their workload in `order`; runs that no row is left of are gone.
    """
    number = len(before.runs)
    by_key = {row.key: (row, n) for row, n in before.rows}
    by_key.update((row.key, (row, number)) for row in rows)
    place = {name: n for n, name in enumerate(order)}
    found = sorted(by_key.values(), key=lambda each: place.get(each[0].workload, len(place)))
    used = sorted({n for _, n in found})
    runs = (*before.runs, run)
    return Results(tuple(runs[n] for n in used), tuple((row, used.index(n)) for row, n in found))


def save(results: Results, path: Path) -> None:
    """Write one row a line, so that a difference between two runs can be read."""
    runs = ",\n  ".join(json.dumps(_rounded(asdict(run))) for run in results.runs)
    rows = ",\n  ".join(json.dumps([n, _rounded(row.as_json())]) for row, n in results.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    # At once and whole: a run may be stopped at any time.
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(f'{{"runs": [\n  {runs}\n],\n"rows": [\n  {rows}\n]}}\n')
    fresh.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
