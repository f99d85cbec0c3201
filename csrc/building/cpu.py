"""The ninja file of the CPU kernels, once per instruction set, and of the binding to torch.

The kernels are a library without torch, which the bindings to several torches share. All objects
lie in one folder, those of a binding in one within it, so each is compiled once.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from building.ninja import ROOT, SOURCES, escape, object_of, quote
from building.torches import Torch

LIBRARY = "libfastrnn_cpu.so"  # beside the binding
# The folder that alone has torch in reach: the others are compiled without its headers.
BINDING = SOURCES / "binding"
KERNELS = SOURCES / "cpu" / "kernels.cpp"
# What alone differs in a wheel, so that all other objects serve it too.
MANYLINUX = SOURCES / "building" / "manylinux.cpp"
MANYLINUX_OBJECT = "building/manylinux.o"
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
  command = {cxx} -shared $in -o $out $extra -fopenmp -ldl {more}
  description = link $out
{builds}
"""


def ninja_file(folder: Path, torch: Torch) -> str:
    """What builds the library and, in a folder of its own within `folder`, the binding to torch."""
    debug = os.environ.get("FASTRNN_DEBUG") == "1"
    flags = [
        "-O0 -g" if debug else FLAGS["OPTIMISED"],
        CXX_FLAGS,
        # Not -I: <math.h> must stay the system's.
        *(f"-iquote {quote(path)}" for path in (folder, SOURCES)),
    ]
    kernels, binding = kernel_objects(), binding_objects(torch)
    old = {MANYLINUX_OBJECT: (MANYLINUX, "-std=c++17")} if manylinux() else {}
    builds = ["build cells.gen.h: generate"]
    # Of equal edges ninja begins with the first, and the kernels take longest.
    for out, (source, extra) in reversed({**old, **binding, **kernels}.items()):
        generated = " | cells.gen.h" if source == KERNELS else ""
        builds.append(f"build {out}: compile {escape(source)}{generated}\n  extra = {extra}")
    # Of an inline function that several objects define the linker takes the first, so those that
    # every processor can run come before those that not all can. The library calls its own
    # functions, whatever else exports their names.
    builds.append(
        f"build {LIBRARY}: link {' '.join([*kernels, *old])}\n"
        f"  extra = -Wl,-soname,{LIBRARY} -Wl,-Bsymbolic -Wl,-z,defs"
    )
    libraries = [f"-L{quote(path)}" for path in torch.libraries]
    builds.append(
        f"build {torch.folder}/_C.so: link {' '.join([*binding, *old])} {LIBRARY}\n"
        f"  extra = -Wl,-rpath,'$$ORIGIN' {' '.join(libraries)} "
        "-lc10 -ltorch_cpu -ltorch -ltorch_python"
    )
    return NINJA_FILE.format(
        python=quote(sys.executable),
        setup=quote(ROOT / "setup.py"),
        cxx=compiler(),
        flags=" ".join([*flags, os.environ.get("FASTRNN_CXXFLAGS", "")]),
        more=os.environ.get("FASTRNN_LDFLAGS", ""),
        builds="\n".join(builds),
    )


def kernel_objects() -> dict[str, tuple[Path, str]]:
    """The objects of the library: the source of each and its flags, in the order of linking."""
    objects = {
        object_of(path): (path, "-std=c++17")
        for path in sorted(SOURCES.rglob("*.cpp"))
        if path not in (KERNELS, MANYLINUX) and BINDING not in path.parents
    }
    for isa in ISA_FLAGS if sysconfig.get_platform().endswith("x86_64") else ["baseline"]:
        # GCC 12 takes its own intrinsics for reads of uninitialised memory.
        extra = f"-std=c++17 -DFASTRNN_ISA={isa} {ISA_FLAGS[isa]} -Wno-maybe-uninitialized"
        if FLAGS["shared_with"](isa, "float32") == isa:
            objects[object_of(KERNELS, f".{isa}.o")] = (KERNELS, extra)
        if isa != "baseline":
            formats = f"{extra} -DFASTRNN_FORMATS"
            objects[object_of(KERNELS, f".{isa}.formats.o")] = (KERNELS, formats)
    return objects


def binding_objects(torch: Torch) -> dict[str, tuple[Path, str]]:
    """The objects of the binding to a torch."""
    includes = (*torch.includes, torch.python)
    extra = [
        # Calls of the library are made without a jump in between.
        "-fno-plt",
        "-std=c++20" if torch.release >= (2, 13) else "-std=c++17",
        quote(f'-DFASTRNN_TORCH_VERSION="{torch.version}"'),
        *(f"-isystem {quote(path)}" for path in includes),
    ]
    return {
        f"{torch.folder}/{object_of(path)}": (path, " ".join(extra))
        for path in sorted(BINDING.rglob("*.cpp"))
    }


def manylinux() -> bool:
    return os.environ.get("FASTRNN_MANYLINUX") == "1"


def compiler() -> str:
    given = os.environ.get("CXX")
    for candidate in [given] if given else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    raise SystemExit(
        f"fastrnn needs a C++17 compiler, but found no {given or 'c++, g++ or clang++'}: "
        "install one (Debian, Ubuntu: apt install g++) or name it in CXX"
    )
