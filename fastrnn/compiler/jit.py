"""Compiles a custom cell at run time, for the instruction set in use.

The source of the built-in cells, `csrc/cpu/kernels.cpp`, is compiled again with a header that holds
only this cell, in one format, since most programs need one of them. The code that all cells share
is not compiled: the result is linked with the library of CPU kernels, which has it. The result
stays on disk under a digest of everything that it depends on (`cache`). The environment variable
`CXX` names the compiler, `FASTRNN_CXXFLAGS` adds flags, and `FASTRNN_LOG=quiet` silences the
messages.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrnn import cache
from fastrnn.compiler import flags
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.emit_cpp import header
from fastrnn.extension import _C, CPU_KERNELS

__all__ = ["SYMBOL", "CompilationFailed", "Compiler", "compile_cell", "compiler", "sources"]

SYMBOL = "fastrnn_cells_custom"
_SOURCE = "cpu/kernels.cpp"
_PARTS = 2  # _SOURCE is compiled in parts at the same time
_SECONDS = 600  # time limit for the compiler


class CompilationFailed(RuntimeError):
    """A cell could not be compiled; the message says why."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that runs it, and the output of its `--version`."""

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
            (process,) = _run([*command, "--version"])
            if process.returncode == 0:
                return Compiler(tuple(command), process.stdout.strip())
            raise CompilationFailed(f"`{shlex.join(command)} --version` failed: {_errors(process)}")
    if named:
        raise CompilationFailed(f"the compiler that CXX names, {named!r}, is not on the path")
    raise CompilationFailed(
        "no C++ compiler on the path; install g++ or clang++, or name another one by CXX"
    )


def sources() -> Path:
    """The folder of the C++ sources, inside the installed package or beside it in a checkout.

    Raises:
        CompilationFailed: if the installation lacks them.
    """
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / _SOURCE).is_file():
            return folder
    raise CompilationFailed(f"this installation of fastrnn has no C++ sources in {here / 'csrc'}")


def compile_cell(derived: Derived, key: str, format: str = "float32", fresh: bool = False) -> Path:
    """Compile a cell into a shared library, unless the cache has it, and return the library's path.

    If several processes do this at the same time, one of them compiles and the others wait for it.
    A library appears in the cache complete or not at all.

    Args:
        key: the name under which the kernels know the cell.
        format: the format of its products, one of `plan.FORMATS`.
        fresh: compile in any case and replace the library in the cache, which may be damaged.

    Returns:
        The path of the library, which exports one function, `SYMBOL`.

    Raises:
        CompilationFailed: if there is no compiler, no source or no place for the library, or if
            the compiler fails; the message has its first errors.
    """
    chosen, folder, text = compiler(), sources(), header([derived], [key])
    options = _options(format)
    digest = hashlib.sha256()
    for part in (text, chosen.version, shlex.join([*chosen.command, *options])):
        digest.update(part.encode() + b"\0")
    for source in sorted([*folder.rglob("*.h"), folder / _SOURCE]):
        name = source.relative_to(folder).as_posix()
        digest.update(name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(_shared_code())
    name = f"{re.sub(r'[^0-9A-Za-z_-]', '_', key)}-{digest.hexdigest()[:16]}.so"
    what = f"cell {derived.name!r} in {format} for {_C.isa()}"
    try:
        target = cache.folder() / name
        before = _found(target)
        if before is not None and not fresh:
            return target
        with cache.locked(target, lambda: _say(f"waiting for another process to compile {what}")):
            now = _found(target)
            if now is None or (fresh and now == before):
                last = " until this process ends" if cache.is_private(target.parent) else ""
                with_it = f"with {shlex.join(chosen.command)}, 3 to 8 seconds"
                _say(f"compiling {what} {with_it}; kept in {target.parent}{last}")
                _build(derived, chosen, options, text, target)
    except OSError as error:
        raise CompilationFailed(f"cell {derived.name!r} was not compiled: {error}") from error
    return target


# The types of csrc/cpu/formats.h and integers.h.
_TYPES = {
    "float32": "Plain<float>",
    "float64": "Plain<double>",
    "bfloat16": "Bfloat16",
    "int8": "Int8",
    "int16": "Int16",
}


@functools.cache
def _shared_code() -> bytes:
    """The digest of the library with which cells are linked."""
    return hashlib.sha256(CPU_KERNELS.read_bytes()).digest()


def _options(format: str) -> list[str]:
    shared = flags.shared_with(_C.isa(), format)
    defines = f"-DFASTRNN_ISA={shared} -DFASTRNN_FORMAT={_TYPES[format]}"
    more = os.environ.get("FASTRNN_CXXFLAGS", "")
    return shlex.split(
        f"-std=c++17 {flags.OPTIMISED} {flags.CXX} {flags.ISA[_C.isa()]} {defines} {more}"
    )


def _found(target: Path) -> tuple[int, int] | None:
    """Inode and time, which identify the library; None if there is none that is safe to load."""
    try:
        reason, status = cache.file_refusal(target), target.lstat()
    except FileNotFoundError:
        return None
    if reason is not None:
        cache.warn_once(f"fastrnn compiles a cell again and loads nothing that was kept: {reason}")
        return None
    return status.st_ino, status.st_mtime_ns


def _build(derived: Derived, chosen: Compiler, options: list[str], text: str, target: Path) -> None:
    command = [*chosen.command, *options]
    folder = sources()
    with cache.work_folder(target) as work:
        (work / "cells.gen.h").write_text(text, encoding="utf-8")
        # -iquote, because with -I the folder csrc would hide the C library's math.h.
        where = ["-iquote", str(work), "-iquote", str(folder)]
        objects = [str(work / f"part{part}.o") for part in range(1, _PARTS + 1)]
        parts = [
            [*command, f"-DFASTRNN_PART={part}", *where, "-c", str(folder / _SOURCE), "-o", to]
            for part, to in enumerate(objects, 1)
        ]
        library = work / target.name
        link = [*command, "-shared", *objects, str(CPU_KERNELS), "-Wl,-z,defs", "-o", str(library)]
        for commands in (parts, [link]):
            for done in _run(*commands):
                if done.returncode != 0:
                    raise CompilationFailed(
                        f"{shlex.join(chosen.command)} does not compile cell {derived.name!r}: "
                        f"{_errors(done)}"
                    )
        library.chmod(0o700)  # whatever the umask
        os.replace(library, target)


def _say(text: str) -> None:
    """Write one line to standard error, if there is one; FASTRNN_LOG=quiet silences it."""
    if sys.stderr is not None and "quiet" not in os.environ.get("FASTRNN_LOG", ""):
        with contextlib.suppress(OSError, ValueError):  # it may be closed
            # One write: print writes the line end separately, so lines of threads would mix.
            sys.stderr.write(f"fastrnn: {text}\n")
            sys.stderr.flush()


def _run(*commands: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at the same time, with one time limit for all of them."""
    started: list[subprocess.Popen[str]] = []
    until = time.monotonic() + _SECONDS
    done = []
    try:
        for command in commands:
            started.append(_start(command))
        for command, process in zip(commands, started, strict=True):
            out, err = process.communicate(timeout=max(0.0, until - time.monotonic()))
            done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    except subprocess.TimeoutExpired as late:
        raise CompilationFailed(f"{late.cmd[0]} took more than {_SECONDS} s") from None
    except OSError as error:
        raise CompilationFailed(f"{commands[0][0]} does not run: {error}") from error
    finally:
        for process in started:
            with process:
                if process.poll() is None:
                    process.kill()
    return done


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
    )


def _errors(done: subprocess.CompletedProcess[str], count: int = 3) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line] or lines
    return "; ".join(telling[:count]) or f"exit status {done.returncode}, with no message"
