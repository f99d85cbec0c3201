"""The ninja file of `fastrnn._C`: the binding, and the CPU kernel once per instruction set."""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from building.ninja import ROOT, SOURCES, escape, object_of, quote

# The folder that alone has torch in reach: the others are compiled without its headers.
BINDING = SOURCES / "binding"
KERNELS = SOURCES / "cpu" / "kernels.cpp"
FLAGS = runpy.run_path(str(ROOT / "fastrnn" / "compiler" / "flags.py"))
ISA_FLAGS: dict[str, str] = FLAGS["ISA"]
CXX_FLAGS = f"{FLAGS['CXX']} -Wall -Wextra"
NINJA_FILE = """\
rule generate
  command = {python} {setup} generate $out
  depfile = $out.d
  restat = 1
  description = generate $out
rule compile
  command = {cxx} -MMD -MF $out.d {flags} $extra -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = {cxx} -shared $in -o $out {libraries}
  description = link $out
{builds}
"""


@dataclass(frozen=True)
class Target:
    """The torch and the Python to compile for: version, folders of headers and of libraries."""

    torch: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]


def this_process() -> Target:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = (*include_paths(), sysconfig.get_path("include"))
    return Target(torch.__version__, includes, tuple(library_paths()))


def ninja_file(folder: Path, target: Target | None = None) -> str:
    target = target or this_process()
    release = tuple(int(n) for n in target.torch.split("+")[0].split(".")[:2])
    debug = os.environ.get("FASTRNN_DEBUG") == "1"
    flags = [
        "-O0 -g" if debug else FLAGS["OPTIMISED"],
        CXX_FLAGS,
        # Not -I: <math.h> must stay the system's.
        *(f"-iquote {quote(path)}" for path in (folder, SOURCES)),
    ]
    binding = [
        "-std=c++20" if release >= (2, 13) else "-std=c++17",
        quote(f'-DFASTRNN_TORCH_VERSION="{target.torch}"'),
        *(f"-isystem {quote(path)}" for path in target.includes),
    ]
    libraries = [
        *(f"-L{quote(path)}" for path in target.libraries),
        "-lc10 -ltorch_cpu -ltorch -ltorch_python -fopenmp -ldl",
        os.environ.get("FASTRNN_LDFLAGS", ""),
    ]
    objects = {
        object_of(path): (path, " ".join(binding) if BINDING in path.parents else "-std=c++17")
        for path in sorted(SOURCES.rglob("*.cpp"))
        if path != KERNELS
    }
    for isa in ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]:
        # GCC 12 takes its own intrinsics for reads of uninitialised memory.
        extra = f"-std=c++17 -DFASTRNN_ISA={isa} {ISA_FLAGS[isa]} -Wno-maybe-uninitialized"
        if isa == "avx512_vnni":  # float and double are those of avx512
            extra += " -DFASTRNN_FORMATS"
        objects[object_of(KERNELS, f".{isa}.o")] = (KERNELS, extra)
    builds = ["build cells.gen.h: generate"]
    # Of equal edges ninja begins with the first, and the kernels take longest.
    for out, (source, extra) in reversed(objects.items()):
        generated = " | cells.gen.h" if source == KERNELS else ""
        builds.append(f"build {out}: compile {escape(source)}{generated}\n  extra = {extra}")
    # Of an inline function that several objects define the linker takes the first, so those that
    # every processor can run come before those that not all can.
    builds.append(f"build _C.so: link {' '.join(objects)}")
    return NINJA_FILE.format(
        python=quote(sys.executable),
        setup=quote(ROOT / "setup.py"),
        cxx=compiler(),
        flags=" ".join([*flags, os.environ.get("FASTRNN_CXXFLAGS", "")]),
        libraries=" ".join(libraries),
        builds="\n".join(builds),
    )


def compiler() -> str:
    given = os.environ.get("CXX")
    for candidate in [given] if given else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    raise SystemExit(
        f"fastrnn needs a C++17 compiler, but found no {given or 'c++, g++ or clang++'}: "
        "install one (Debian, Ubuntu: apt install g++) or name it in CXX"
    )
