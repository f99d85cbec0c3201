"""Compiles a user's cell for this machine's processor, at run time.

The sweep's own source, `cpu_scan.cpp`, is compiled once more with a header that holds just that
cell. The library is cached on disk under a digest of all it depends on. Environment: `CXX` names
the compiler, `FASTRNN_CACHE` the folder of the cache (`~/.cache/fastrnn` by default).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastrnn.codegen import Derived, header

__all__ = [
    "SYMBOL",
    "CompilationFailed",
    "Compiler",
    "cache_folder",
    "compile_cell",
    "compiler",
    "sources",
]

SYMBOL = "fastrnn_cells_native"
_FLAGS = shlex.split(
    "-std=c++17 -O3 -DNDEBUG -DFASTRNN_ISA=native -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -fPIC -shared -fvisibility=hidden -fopenmp"
)
_SECONDS = 600


class CompilationFailed(RuntimeError):
    """No compiled code for a cell; the message says why."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that runs it, and what it says of its version."""

    command: tuple[str, ...]
    version: str


def compiler() -> Compiler:
    """The compiler named by `CXX`, or else the first of g++, clang++ and c++ on the path.

    Raises:
        CompilationFailed: if there is none, or it does not run.
    """
    return _compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.cache
def _compiler(named: str, path: str) -> Compiler:
    commands = [shlex.split(named)] if named else [["g++"], ["clang++"], ["c++"]]
    for command in commands:
        if shutil.which(command[0], path=path):
            said = _run([*command, "--version"])
            if said.returncode == 0:
                return Compiler(tuple(command), said.stdout.strip())
            raise CompilationFailed(f"`{shlex.join(command)} --version` failed: {_errors(said)}")
    if named:
        raise CompilationFailed(f"the compiler that CXX names, {named!r}, is not on the path")
    raise CompilationFailed(
        "no C++ compiler on the path; install g++ or clang++, or name another one by CXX"
    )


def sources() -> Path:
    """The folder of the C++ sources: inside the installed package, or beside it in a checkout.

    Raises:
        CompilationFailed: if the installation lacks them.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "cpu_scan.cpp").is_file():
            return folder
    raise CompilationFailed(f"this installation of fastrnn has no C++ sources in {here / 'csrc'}")


def compile_cell(derived: Derived, key: str, fresh: bool = False) -> Path:
    """The shared library of a cell, known to the kernels as `key`; its one function is `SYMBOL`.

    Processes may do this at once: a library appears in the cache complete or not at all. `fresh`
    compiles it even so and puts it in the place of the one in the cache, which may be damaged.

    Raises:
        CompilationFailed: without a compiler or sources, or with the compiler's first errors.
    """
    chosen, folder, text = compiler(), sources(), header([derived], [key])
    flags = [*_FLAGS, *_native_flags(chosen)]
    digest = hashlib.sha256()
    for part in (text, chosen.version, shlex.join([*chosen.command, *flags]), _processor()):
        digest.update(part.encode() + b"\0")
    for source in sorted([*folder.glob("*.h"), folder / "cpu_scan.cpp"]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    name = f"{re.sub(r'[^0-9A-Za-z_-]', '_', key)}-{digest.hexdigest()[:16]}.so"
    target = cache_folder() / name
    if fresh or not target.is_file():
        try:
            _build(derived, chosen, flags, text, target)
        except OSError as error:
            raise CompilationFailed(f"cell {derived.name!r} was not compiled: {error}") from error
    return target


def _build(derived: Derived, chosen: Compiler, flags: list[str], text: str, target: Path) -> None:
    source = sources() / "cpu_scan.cpp"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as work:
        (Path(work) / "cells.gen.h").write_text(text, encoding="utf-8")
        made = Path(work) / target.name
        # Quoted includes only: as a system folder, csrc would hide the C library's math.h.
        where = ["-iquote", work, "-iquote", str(source.parent)]
        done = _run([*chosen.command, *flags, *where, str(source), "-o", str(made)])
        if done.returncode != 0:
            raise CompilationFailed(
                f"{shlex.join(chosen.command)} does not compile cell {derived.name!r}: "
                f"{_errors(done)}"
            )
        os.replace(made, target)


@functools.cache
def _native_flags(chosen: Compiler) -> tuple[str, ...]:
    flag = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    probe = _run([*chosen.command, flag, "-x", "c++", "-E", os.devnull])
    return (flag,) if probe.returncode == 0 else ()


@functools.cache
def _processor() -> str:
    """What `native` stands for on this machine: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = (
        "model",
        "flags",
        "Features",
        "CPU implementer",
        "CPU part",
        "vendor_id",
        "cpu family",
    )
    return "\n".join(line for line in lines if line.startswith(wanted))


def cache_folder() -> Path:
    """Where libraries are kept; where that cannot be written, a folder for this process alone."""
    return _writable(os.environ.get("FASTRNN_CACHE", ""))


@functools.cache
def _writable(named: str) -> Path:
    folder = Path(named).expanduser() if named else Path("~/.cache/fastrnn").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_for_this_process().name)


@functools.cache
def _for_this_process() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends, by when the libraries in it are loaded."""
    return tempfile.TemporaryDirectory(prefix="fastrnn-")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise CompilationFailed(f"{command[0]} took more than {_SECONDS} s") from None
    except OSError as error:
        raise CompilationFailed(f"{command[0]} does not run: {error}") from error


def _errors(done: subprocess.CompletedProcess[str], count: int = 3) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line] or lines
    return "; ".join(telling[:count]) or f"exit status {done.returncode}, with no message"
