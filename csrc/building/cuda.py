"""The ninja file of `_cuda.so`, the library of CUDA kernels."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from building.ninja import SOURCES, escape, object_of, quote

NINJA_FILE = """\
rule cuda_compile
  command = {nvcc} --generate-dependencies-with-compile --dependency-output $out.d {flags} -c $in $
    -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $out
rule cuda_link
  command = {nvcc} -shared -cudart static {link} $in -o $out
  description = link $out
{builds}
"""
# What the kernels are compiled for: 9.0 stands for 9.0a, as those of Hopper need.
ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0f;12.0+PTX"
OLDEST = 80


def ninja_file(folder: Path) -> str:
    """What builds the CUDA kernels; nothing where they are not to be built."""
    wanted = os.environ.get("FASTRNN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTRNN_CUDA is auto, 0 or 1, not {wanted!r}")
    if wanted == "0":
        return ""
    import torch

    found = nvcc()
    if found is None or (wanted == "auto" and torch.version.cuda is None):
        if wanted == "1":
            raise SystemExit(
                "FASTRNN_CUDA=1, but there is no nvcc: install the CUDA toolkit, or name it in "
                "NVCC or CUDA_HOME (of pip's packages: nvidia-cuda-nvcc nvidia-cuda-crt "
                "nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime)"
            )
        return ""
    objects = {object_of(path, ".cu.o"): path for path in sorted(SOURCES.rglob("*.cu"))}
    targets = targets_of(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    watchdog = os.environ.get("FASTRNN_WATCHDOG") or "0"
    if watchdog not in ("0", "1"):
        raise SystemExit(f"FASTRNN_WATCHDOG is 0 or 1, not {watchdog!r}")
    flags = [
        *flags_of(folder),
        *(["-DFASTRNN_WATCHDOG"] if watchdog == "1" else []),
        f"--threads {max(1, jobs // len(objects))}",
        *targets,
    ]
    builds = [
        f"build {out}: cuda_compile {escape(path)} | cells.gen.h" for out, path in objects.items()
    ]
    builds.append(f"build _cuda.so: cuda_link {' '.join(objects)}")
    return NINJA_FILE.format(
        nvcc=quote(found),
        flags=" ".join(flags),
        # No symbol of the static runtime may meet those of torch's.
        link="-Xlinker --exclude-libs,ALL",
        builds="\n".join(builds),
    )


def flags_of(folder: Path) -> list[str]:
    """How every CUDA source is compiled, whatever the GPU."""
    # Not -I: <math.h> must stay the system's.
    # As seen from the folder: nvcc cannot pass on a name with a space.
    sources = Path(os.path.relpath(SOURCES, folder)).as_posix()
    includes = [f"-Xcompiler -iquote,{path}" for path in (".", sources)]
    return ["-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden", *includes]


def targets_of(architectures: str) -> list[str]:
    """nvcc's arguments for a list like "8.0;9.0a+PTX"; GPUs that are too old are left out."""
    targets = []
    for name in re.split(r"[; ,]+", architectures.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; what it may have are numbers as in "
                f"{ARCHITECTURES!r}"
            )
        number, variant = parts[1] + parts[2], parts[3]
        if int(number) < OLDEST:
            continue
        real = number + (variant or ("a" if number == "90" else ""))
        targets.append(f"-gencode=arch=compute_{real},code=sm_{real}")
        if parts[4]:
            targets.append(f"-gencode=arch=compute_{real},code=compute_{real}")
    if not targets:
        raise SystemExit(
            f"the CUDA kernels need compute capability 8.0, and TORCH_CUDA_ARCH_LIST has only "
            f"{architectures!r}: add a newer one, or build without them, FASTRNN_CUDA=0"
        )
    return targets


def nvcc() -> str | None:
    """The compiler of CUDA sources: the one named, or that of the toolkit, or one on the path."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    given = [os.environ.get("NVCC"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in [*given, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if candidate and (path := shutil.which(candidate)):
            return path
    return None
