"""A progress bar on a terminal."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar() -> Iterator[Callable[[float, str], None]]:
    """A progress bar: rich's if it is installed, else one plain line on a terminal."""
    try:
        progress = importlib.import_module("rich.progress")
    except ModuleNotFoundError:
        yield _plain
        return
    columns = (
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as shown:
        task = shown.add_task("", total=1.0)
        yield lambda done, note: shown.update(task, completed=min(done, 1.0), description=note)


def _plain(done: float, note: str) -> None:
    if sys.stdout.isatty():
        filled = int(30 * min(done, 1.0))
        end = "\n" if done >= 1 else ""
        print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {note:<45}", end=end, flush=True)
