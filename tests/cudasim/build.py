"""Compiles the CUDA kernels for the simulator: `build()`, or `python -m tests.cudasim.build`.

The library has the C interface of csrc/cuda/contract.h, and FASTRNN_CUDA_LIBRARY names it to load
it. Objects are in build/cudasim under a hash of their sources.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

KERNELS = ROOT / "csrc"
SIMULATOR = ROOT / "tests" / "cudasim"
CACHE = ROOT / "build" / "cudasim"
CXX = os.environ.get("CXX") or next(
    (c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++"
)
FLAGS = "-std=c++17 -O1 -fPIC -fno-gnu-unique -fno-math-errno -fno-trapping-math -w"
# The simulator itself must not be instrumented: it reports to the sanitizers itself.
SANITIZERS = {
    None: ("", ""),
    "address": ("-fsanitize=address -g1 -fno-omit-frame-pointer", "-DCUDASIM_ADDRESS"),
    "thread": ("-fsanitize=thread -g1 -fno-omit-frame-pointer", "-DCUDASIM_THREAD"),
}


class Fault(NamedTuple):
    """A mistake to plant: in `file` of the sources, `wrong` replaces `right`, which occurs once.

    In `wrong`, PLANTED is true after fastrnn_cudasim_plant(n), where n is the number of this fault,
    from 1 on. So one library has many mistakes and makes one at a time.
    """

    file: str
    right: str
    wrong: str


def missing() -> str | None:
    """Why the simulator cannot run here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the simulator of CUDA kernels runs on x86-64, not {platform.machine()}"
    if not shutil.which(shlex.split(CXX)[0]):
        return "no C++ compiler (Debian, Ubuntu: apt install g++)"
    if cuda_headers() is None:
        return (
            "no headers of CUDA: install its toolkit, or name it in CUDA_HOME (or pip install "
            "nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl)"
        )
    return None


@functools.cache
def cuda_headers() -> Path | None:
    """The folder of cuda_bf16.h: in the named toolkit, in nvcc's, or in pip's packages."""
    named = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    homes = [Path(path) for path in named if path]
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc:
        # nvcc on the path may be a script, so nvcc itself is asked for its toolkit.
        command = [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        try:
            said = subprocess.run(command, capture_output=True, text=True).stderr
        except OSError:
            said = ""
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", said, re.MULTILINE)]
    homes.append(Path("/usr/local/cuda"))
    homes += [
        Path(path) / "nvidia" / name for path in sys.path for name in ("cu13", "cuda_runtime")
    ]
    for home in homes:
        if (home / "include" / "cuda_bf16.h").exists():
            return (home / "include").resolve()
    return None


def build(
    sources: Sequence[Path] | None = None,
    sanitizer: str | None = None,
    mutate: Iterable[Fault] = (),
    cells: str | None = None,
    flags: str = "",
) -> Path:
    """Builds the library of `sources` (default: all kernels of csrc) and the simulator. `cells` is
    the text of cells.gen.h, by default that of the built-in cells; `flags` are more flags for the
    sources."""
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    sources = sorted(KERNELS.rglob("*.cu")) if sources is None else list(sources)
    faults = list(mutate)
    CACHE.mkdir(parents=True, exist_ok=True)
    if cells is None:
        generate_cells()
    header = CACHE if cells is None else CACHE / f"cells-{digest([cells])}"
    if cells is not None:
        header.mkdir(exist_ok=True)
        (header / "cells.gen.h").write_text(cells, encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        kernels = KERNELS
        if faults:
            kernels = Path(scratch)
            sources = plant(faults, sources, kernels)
        folders = (header, kernels, SIMULATOR)
        quoted = " ".join(f"-iquote {shlex.quote(str(path))}" for path in folders)
        include = f"{quoted} -isystem {shlex.quote(str(cuda_headers()))}"
        kernel_flags, simulator_flags = SANITIZERS[sanitizer]
        kernel = f"{FLAGS} {kernel_flags} {flags} -DFASTRNN_CUDASIM -DFASTRNN_ISA=cudasim -x c++"
        kernel += "" if cells is None else f" -DFASTRNN_CELLS_OF={header.name.replace('-', '_')}"
        simulator = f"{FLAGS} {simulator_flags} -fno-tree-loop-distribute-patterns"
        jobs = [(source, simulator) for source in sorted(SIMULATOR.glob("*.cpp"))]
        jobs += [(source, kernel) for source in sources]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
            objects = list(pool.map(lambda job: compiled(job[0], job[1], include, kernels), jobs))
    library = CACHE / f"{digest(path.name for path in objects)}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        run([*shlex.split(CXX), "-shared", "-Wl,-Bsymbolic", *shlex.split(kernel_flags),
             *map(str, objects), "-o", str(fresh)])  # fmt: skip
        fresh.replace(library)
    return library


def plant(faults: Sequence[Fault], sources: Sequence[Path], copies: Path) -> list[Path]:
    """Copies all sources and headers, and plants the faults. Returns the copies of `sources`."""
    shutil.copytree(KERNELS, copies, dirs_exist_ok=True)
    placed = []
    for path in sources:
        inside = KERNELS in path.parents
        placed.append(copies / (path.relative_to(KERNELS) if inside else path.name))
        if not inside:
            shutil.copy(path, copies)
    for number, (file, right, wrong) in enumerate(faults, 1):
        text = (copies / file).read_text(encoding="utf-8")
        found = text.count(right)
        if found != 1:
            raise ValueError(f"{file} has {right!r} {found} times, a fault must be planted once")
        wrong = wrong.replace("PLANTED", f"(::fastrnn::sim::planted == {number})")
        (copies / file).write_text(text.replace(right, wrong), encoding="utf-8")
    return placed


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """If several processes build at the same time, one does it and the others wait for it."""
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def generate_cells() -> None:
    """Writes cells.gen.h, unless it was made from the same modules."""
    sources = [ROOT / "setup.py", *sorted((ROOT / "fastrnn").rglob("*.py"))]
    made_of, header = CACHE / "cells.gen.h.made_of", CACHE / "cells.gen.h"
    with locked("cells"):
        wanted = digest(path.read_bytes() for path in sources)
        if made_of.exists() and header.exists() and made_of.read_text() == wanted:
            return
        run([sys.executable, str(ROOT / "setup.py"), "generate", str(header)])
        made_of.write_text(wanted)


def compiled(source: Path, flags: str, include: str, kernels: Path) -> Path:
    """The object of a source; `kernels` is csrc or the copy of it that has faults. The last
    compilation of the source tells which headers it depends on."""
    identity = digest([source.name, source.read_bytes(), flags, version()])
    listing = CACHE / f"{source.stem}-{identity}.headers"
    with locked(f"{source.stem}-{identity}"):
        if listing.exists():
            depends = listing.read_text(encoding="utf-8").splitlines()
            out = object_of(source, identity, depends, kernels)
            if out is not None and out.exists():
                return out
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fresh, rule = Path(folder) / "fresh.o", Path(folder) / "rule"
            run([*shlex.split(f"{CXX} {flags} {include}"), "-MMD", "-MF", str(rule),
                 "-c", str(source), "-o", str(fresh)])  # fmt: skip
            headers = shlex.split(rule.read_text(encoding="utf-8").replace("\\\n", " "))[2:]
            # Sources with faults lie in another folder every time, and so do their headers.
            depends = [path.removeprefix(f"{kernels}/") for path in headers]
            out = object_of(source, identity, depends, kernels)
            assert out is not None
            listing.write_text("\n".join(depends), encoding="utf-8")
            fresh.replace(out)
            return out


def object_of(source: Path, identity: str, depends: Sequence[str], kernels: Path) -> Path | None:
    """The place of the object that is made of the source and of these headers, whose paths are
    absolute or start in `kernels`; None if a header is gone."""
    contents: list[str | bytes] = [identity]
    for file in (kernels / path for path in depends):
        if not file.exists():
            return None
        contents += [file.name, file.read_bytes()]
    return CACHE / f"{source.stem}-{digest(contents)}.o"


def digest(parts: Iterable[str | bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:24]


@functools.cache
def version() -> str:
    return subprocess.run([*shlex.split(CXX), "--version"], capture_output=True, text=True).stdout


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def sanitized(sanitizer: str | None) -> tuple[list[str], dict[str, str]]:
    """The prefix and the environment for a command that loads a library with this sanitizer."""
    if sanitizer is None:
        return [], {}

    def preload(*names: str) -> str:
        found = (
            subprocess.run([*shlex.split(CXX), f"-print-file-name={name}"], capture_output=True,
                           text=True).stdout.strip()
            for name in names
        )  # fmt: skip
        return " ".join(found)

    if sanitizer == "address":
        return [], {
            "LD_PRELOAD": preload("libasan.so", "libstdc++.so"),
            "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
        }
    # The shadow memory of the thread sanitizer has no room for randomized addresses.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    return prefix, {
        "LD_PRELOAD": preload("libtsan.so"),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cudasim.build", description=__doc__)
    parser.add_argument("sources", nargs="*", type=Path, help="all kernels of csrc if none")
    parser.add_argument("--sanitizer", choices=["address", "thread"])
    given = parser.parse_args()
    try:
        print(build(given.sources or None, given.sanitizer))
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
