"""Builds `fastrnn._C` with ninja.

`cpu_scan.cpp` is compiled once per instruction set, which setuptools' and torch's own builders
cannot do, and the objects lie in `build/` under the versions of Python and torch, where they
survive pip's temporary folders. Switches: CXX, MAX_JOBS, FASTRNN_CXXFLAGS, FASTRNN_LDFLAGS,
FASTRNN_DEBUG=1.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
# These alone have torch in reach: what lies below them is compiled without its headers.
BINDING = ("autograd.cpp", "cpu_ops.cpp", "ops.cpp", "stepper_binding.cpp")
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512",
}
CXX_FLAGS = (
    "-fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra"
)
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


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch

        name = f"cp{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
        folder = ROOT / "build" / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds would write the same objects
            (folder / "build.ninja").write_text(ninja_file(folder))
            run_ninja(folder, verbose=self.verbose > 1)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / "_C.so"), str(target))


def write_cells(header: Path) -> None:
    """Generate the built-in cells; an unchanged header keeps its time, so nothing is rebuilt.

    A file beside it, `*.d`, tells ninja which modules it was generated from.
    """
    # `import fastrnn` needs the extension being built: a bare package stands in for it.
    package = types.ModuleType("fastrnn")
    package.__path__ = [str(ROOT / "fastrnn")]
    sys.modules["fastrnn"] = package
    from fastrnn.codegen import write_header

    fresh = Path(f"{header}.new")
    write_header(fresh)
    if header.exists() and header.read_bytes() == fresh.read_bytes():
        fresh.unlink()
    else:
        fresh.replace(header)
    modules = [module for name, module in sys.modules.items() if name.startswith("fastrnn.")]
    sources = " ".join(str(module.__file__).replace(" ", "\\ ") for module in modules)
    Path(f"{header}.d").write_text(f"{header}: {sources}\n")


def ninja_file(folder: Path) -> str:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    release = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    debug = os.environ.get("FASTRNN_DEBUG") == "1"
    flags = [
        "-O0 -g" if debug else "-O3 -g0 -DNDEBUG",
        CXX_FLAGS,
        # Not -I: <math.h> must stay the system's.
        *(f"-iquote {quote(path)}" for path in (folder, SOURCES)),
    ]
    binding = [
        "-std=c++20" if release >= (2, 13) else "-std=c++17",
        quote(f'-DFASTRNN_TORCH_VERSION="{torch.__version__}"'),
        *(f"-isystem {quote(path)}" for path in (*include_paths(), sysconfig.get_path("include"))),
    ]
    libraries = [
        *(f"-L{quote(path)}" for path in library_paths()),
        "-lc10 -ltorch_cpu -ltorch -ltorch_python -fopenmp -ldl",
        os.environ.get("FASTRNN_LDFLAGS", ""),
    ]
    objects = {
        f"{path.stem}.o": (path, " ".join(binding) if path.name in BINDING else "-std=c++17")
        for path in sorted(SOURCES.glob("*.cpp"))
        if path.name != "cpu_scan.cpp"
    }
    for isa in ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]:
        # GCC 12 takes its own intrinsics for reads of uninitialised memory.
        extra = f"-std=c++17 -DFASTRNN_ISA={isa} {ISA_FLAGS[isa]} -Wno-maybe-uninitialized"
        objects[f"cpu_scan.{isa}.o"] = (SOURCES / "cpu_scan.cpp", extra)
    builds = ["build cells.gen.h: generate"]
    for out, (source, extra) in objects.items():
        generated = " | cells.gen.h" if source.name == "cpu_scan.cpp" else ""
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


def run_ninja(folder: Path, verbose: bool) -> None:
    command = [sys.executable, "-m", "ninja", "-C", str(folder)]
    if "MAX_JOBS" in os.environ:
        command += ["-j", os.environ["MAX_JOBS"]]
    try:
        subprocess.run([*command, "-v"] if verbose else command, check=True)
    except subprocess.CalledProcessError:
        again = shlex.join([*command, "-v"])
        raise SystemExit(f"fastrnn was not compiled, see above; to repeat: {again}") from None


def quote(path: object) -> str:
    """For a shell command within a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: Path) -> str:
    """For a path in a ninja `build` line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__" and sys.argv[1:2] == ["generate"]:
    write_cells(Path(sys.argv[2]))
elif __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("fastrnn._C", sorted(f"csrc/{path.name}" for path in SOURCES.glob("*.cpp")))
        ],
        cmdclass={"build_ext": BuildExt},
    )
