"""Small C++ programs that the tests compile against the headers of csrc/."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Another processor, as in "aarch64", whose programs GCC's cross compiler makes and qemu runs.
EMULATED = os.environ.get("EMULATED")
CROSS = f"{EMULATED}-linux-gnu"
GXX = shutil.which(f"{CROSS}-g++" if EMULATED else "g++")  # because of what GCC makes of OpenMP
EMULATOR = (f"qemu-{EMULATED}", "-L", f"/usr/{CROSS}") if EMULATED else ()
FLAGS = ("-std=c++17", "-O1", "-g", "-fopenmp", "-DFASTRNN_ISA=baseline")


def compiled(
    source: Path,
    folder: Path,
    *others: str,
    sanitizer: str | None = None,
    flags: Sequence[str] = (),
) -> tuple[str, ...]:
    """The command that runs `source`, compiled with `others` in csrc/, with headers in the folder;
    skips the test without g++ or without the sanitizer.

    OpenMP's library is not linked: a program that uses OpenMP runs its threads itself.
    """
    if GXX is None:
        pytest.skip("needs g++")
    if EMULATED:
        sanitizer = None  # an emulator has none
    sanitized = (f"-fsanitize={sanitizer}",) if sanitizer else ()
    objects = []
    for number, file in enumerate((source, *(ROOT / "csrc" / other for other in others))):
        objects.append(str(folder / f"{number}.o"))
        quoted = ("-iquote", str(ROOT / "csrc"), "-iquote", str(folder))
        run(GXX, *FLAGS, *flags, *sanitized, *quoted, "-c", str(file), "-o", objects[-1])
    program = str(folder / source.stem)
    link = [GXX, *sanitized, *objects, "-o", program, "-pthread"]
    done = subprocess.run(link, capture_output=True, text=True)
    if done.returncode and sanitizer:
        pytest.skip(f"needs the {sanitizer} sanitizer")
    assert done.returncode == 0, done.stderr
    # The shadow memory of the thread sanitizer has no room for randomized addresses.
    setarch = shutil.which("setarch") if sanitizer == "thread" else None
    return (setarch, "-R", program) if setarch else (*EMULATOR, program)


def run(*command: str, text: str = "") -> str:
    """What the command prints; it must succeed."""
    seconds = 900 if EMULATED else 600  # emulated threads spin for long
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
