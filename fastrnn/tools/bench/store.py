"""Stores rows on disk in one JSON file per machine. A later run replaces the rows that it timed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastrnn._version import __version__
from fastrnn.extension import _C
from fastrnn.hardware import cores, processor_and_model
from fastrnn.tools.bench.comparison import Row
from fastrnn.tools.bench.machine import Machine, slug

__all__ = [
    "Conditions",
    "Kept",
    "Results",
    "Stored",
    "command",
    "commit",
    "conditions",
    "folder",
    "load",
    "load_as",
    "made_by",
    "merge",
    "save",
    "save_page",
]

_DIGITS = 4  # digits of every number, more than any time is exact to


class Stored(Protocol):
    """A row, as far as storing needs it. Rows of the same key are of the same case."""

    @property
    def key(self) -> Hashable: ...

    @property
    def workload(self) -> str: ...

    def as_json(self) -> dict[str, Any]: ...


_Row = TypeVar("_Row", bound=Stored)


@dataclass(frozen=True)
class Conditions:
    """The machine, versions and date of a run."""

    device: str
    instruction_set: str
    versions: dict[str, str]
    commit: str
    command: str
    date: str
    machine: Machine


@dataclass(frozen=True)
class Results(Generic[_Row]):
    """Rows, each with the index in `runs` of the run that timed it."""

    runs: tuple[Conditions, ...]
    rows: tuple[tuple[_Row, int], ...]


def command(module: str, words: Sequence[str]) -> str:
    """The command that runs a module with these arguments. `make` gives `--save`, so it may be
    there twice."""
    own = [word for at, word in enumerate(words) if word != "--save" or "--save" not in words[:at]]
    return shlex.join(["python", "-m", module, *own])


def conditions(machine: Machine, command: str, device: str = "cpu") -> Conditions:
    """The current conditions. `command` is the command that repeats the run."""
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
        device=torch.cuda.get_device_name() if device == "cuda" else processor_and_model(),
        instruction_set=_C.isa(),
        versions=versions,
        commit=commit(),
        command=command,
        date=time.strftime("%Y-%m-%d %H:%M"),
        machine=machine,
    )


def _threads() -> int:
    """As many as torch uses, on no more cores than this process has."""
    return min(cores(), torch.get_num_threads())


def folder(results: Path, threads: int | None = None) -> Path:
    """The folder in `results` for this processor and the kernels that run on it.

    `threads` are those of the run, or those that torch uses.
    """
    return results / slug(processor_and_model(), _C.isa(), threads or _threads())


def made_by(command: str, threads: str = "") -> str:
    """How a table was made, in one sentence. `threads` says how many, if not those of torch."""
    used = threads or f"{_threads()} thread{'s' * (_threads() > 1)}"
    return (
        f"`{command}` on {processor_and_model()} ({_C.isa()}), {used}; "
        f"fastrnn {__version__}, torch {torch.__version__}; commit {commit()}, "
        f"{time.strftime('%Y-%m-%d')}."
    )


def save_page(results: Path, name: str, text: str) -> None:
    """Write a page into the folder of this machine, and say where."""
    file = folder(results) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"wrote {file}")


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


def commit() -> str:
    """The commit of the working tree, or "unknown"."""
    return _output("git", "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    """The first line that a command prints."""
    try:
        output = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    return next(iter(output.splitlines()), "unknown")


def load(path: Path) -> Results[Row]:
    """The results of the suite in a file; no rows if there is no file."""
    return load_as(Row.from_json, path)


def load_as(from_json: Callable[[dict[str, Any]], _Row], path: Path) -> Results[_Row]:
    """The results in a file, whose rows `from_json` makes; no rows if there is no file."""
    if not path.exists():
        return Results((), ())
    values = json.loads(path.read_text())
    runs = [Conditions(**{**run, "machine": Machine(**run["machine"])}) for run in values["runs"]]
    rows = [(from_json(row), number) for number, row in values["rows"]]
    return Results(tuple(runs), tuple(rows))


def merge(
    before: Results[_Row], run: Conditions, rows: Iterable[_Row], order: Sequence[str]
) -> Results[_Row]:
    """`before` with the rows of a new run, which replace rows of the same key.

    Rows are sorted by the place of their workload in `order`. Runs that own no row any more are
    dropped.
    """
    number = len(before.runs)
    by_key = {row.key: (row, n) for row, n in before.rows}
    by_key.update((row.key, (row, number)) for row in rows)
    place = {name: n for n, name in enumerate(order)}
    merged = sorted(by_key.values(), key=lambda item: place.get(item[0].workload, len(place)))
    used = sorted({n for _, n in merged})
    runs = (*before.runs, run)
    return Results(tuple(runs[n] for n in used), tuple((row, used.index(n)) for row, n in merged))


class Kept(Generic[_Row]):
    """Results on disk. Each row is written at once, so that a run that is cut short loses none.

    Args:
        path: of the file.
        run: the conditions of the rows that will be kept.
        order: see `merge`.
        from_json: makes the rows that are in the file.
    """

    def __init__(
        self,
        path: Path,
        run: Conditions,
        order: Sequence[str],
        from_json: Callable[[dict[str, Any]], _Row],
    ) -> None:
        self.path = path
        self._run, self._order = run, order
        self._before = load_as(from_json, path)
        self._rows: list[_Row] = []

    def keep(self, row: _Row) -> None:
        self._rows.append(row)
        save(merge(self._before, self._run, self._rows, self._order), self.path)


def save(results: Results[_Row], path: Path) -> None:
    """Write one row per line, so that a diff between two runs is readable."""
    runs = ",\n  ".join(json.dumps(_rounded(asdict(run))) for run in results.runs)
    rows = ",\n  ".join(json.dumps([n, _rounded(row.as_json())]) for row, n in results.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file is replaced atomically, because a run may be stopped at any time.
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(f'{{"runs": [\n  {runs}\n],\n"rows": [\n  {rows}\n]}}\n')
    temporary.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
