"""Ninja: names and paths as it reads them, and running it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"


def object_of(source: Path, suffix: str = ".o") -> str:
    """In the folder of the build: files of the same name lie in several folders of the sources."""
    return source.relative_to(SOURCES).with_suffix(suffix).as_posix()


def quote(path: object) -> str:
    """For a shell command within a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: Path) -> str:
    """For a path in a ninja `build` line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run(folder: Path, verbose: bool) -> None:
    command = [sys.executable, "-m", "ninja", "-C", str(folder)]
    if "MAX_JOBS" in os.environ:
        command += ["-j", os.environ["MAX_JOBS"]]
    try:
        subprocess.run([*command, "-v"] if verbose else command, check=True)
    except subprocess.CalledProcessError:
        again = shlex.join([*command, "-v"])
        raise SystemExit(f"fastrnn was not compiled, see above; to repeat: {again}") from None
