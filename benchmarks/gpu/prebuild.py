"""Compile all parts for a machine with a GPU on one without.

    python -m benchmarks.gpu.prebuild OUT --torch WHEEL --python PREFIX [--arch 9.0]

WHEEL is a wheel of the other machine's torch, or a folder with an installed one; only its headers
and four of its libraries are read. PREFIX is the folder of a Python of the other machine's version,
with headers. OUT receives the extension, the CPU and the CUDA kernels, these with a watchdog, and
the program `exchange`. Copy the first three into fastrnn/ there;
`python -m benchmarks.gpu --prebuilt OUT` then runs without a compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import exchange

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

from building import cpu, cuda, ninja  # noqa: E402
from building.torches import Torch  # noqa: E402

sys.path.pop(0)

LINKED = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")


def unpacked(torch: Path, into: Path) -> Path:
    """The folder `torch` of an installation, or of a wheel that is unpacked as far as needed."""
    if torch.is_dir():
        return torch / "torch" if (torch / "torch").is_dir() else torch
    wanted = re.compile(rf"torch/(include/.*|version\.py|lib/({'|'.join(map(re.escape, LINKED))}))")
    with zipfile.ZipFile(torch) as wheel:
        names = [name for name in wheel.namelist() if wanted.fullmatch(name)]
        wheel.extractall(into, names)
    return into / "torch"


def target_of(torch: Path, python: Path) -> tuple[Torch, str]:
    """What the extension is compiled for, and the name that Python there loads it by."""
    said = (torch / "version.py").read_text()
    version = re.search(r"^__version__ = '(.+)'$", said, re.MULTILINE)
    headers = sorted((python / "include").glob("python3.*"))
    if version is None or not headers:
        raise SystemExit(f"{torch} is no torch, or {python} has no headers of Python")
    includes = (torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include")
    libraries = (str(torch / "lib"),)
    target = Torch(version[1], tuple(map(str, includes)), libraries, str(headers[-1]))
    tag = headers[-1].name.removeprefix("python").replace(".", "")
    return target, f"_C.torch{target.minor}.cpython-{tag}-x86_64-linux-gnu.so"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.prebuild", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--torch", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--arch", default="9.0", help="compute capability of the GPU")
    given = parser.parse_args(argv)
    out = given.out.resolve()
    folder = out / "build"
    folder.mkdir(parents=True, exist_ok=True)
    target, name = target_of(unpacked(given.torch.resolve(), folder), given.python.resolve())
    os.environ |= {
        "FASTRNN_CUDA": "1",
        "FASTRNN_WATCHDOG": "1",
        "TORCH_CUDA_ARCH_LIST": given.arch,
    }
    text = cpu.ninja_file(folder, target) + cuda.ninja_file(folder)
    (folder / "build.ninja").write_text(text)
    ninja.run(folder, verbose=False)
    shutil.copy(folder / target.folder / "_C.so", out / name)
    for library in (cpu.LIBRARY, "_cuda.so"):
        shutil.copy(folder / library, out / library)
    number = given.arch.replace(".", "")
    command = exchange.compile_command(number + "a" * (number == "90"), out / "exchange")
    command[0] = cuda.nvcc() or command[0]
    subprocess.run(command, check=True)
    for file in (name, cpu.LIBRARY, "_cuda.so", "exchange"):
        print(f"{out / file}: {(out / file).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
