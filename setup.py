"""Builds `fastrnn._C` with ninja and, where nvcc is, the library of CUDA kernels beside it.

`csrc/cpu/kernels.cpp` is compiled once per instruction set, which the builders of setuptools and
torch cannot do, and the objects lie in `build/` under the versions of Python and torch, where they
survive pip's temporary folders. Switches: CXX, MAX_JOBS, FASTRNN_CXXFLAGS, FASTRNN_LDFLAGS,
FASTRNN_DEBUG=1; of the CUDA kernels FASTRNN_CUDA=auto|0|1, NVCC, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import runpy
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
KERNELS = "_cuda.so"  # beside the extension
# The folder that alone has torch in reach: the others are compiled without its headers.
BINDING = SOURCES / "binding"
CPU_KERNELS = SOURCES / "cpu" / "kernels.cpp"
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
CUDA_NINJA_FILE = """\
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
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0f;12.0+PTX"
CUDA_OLDEST = 80


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch

        name = f"cp{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
        folder = ROOT / "build" / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds would write the same objects
            cuda = cuda_ninja_file(folder)
            (folder / "cuda.ninja").unlink(missing_ok=True)
            if cuda:
                (folder / "cuda.ninja").write_text(cuda)
            rest = "include cuda.ninja\n" if cuda else ""
            (folder / "build.ninja").write_text(ninja_file(folder) + rest)
            run_ninja(folder, verbose=self.verbose > 1)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Also over a newer file, which may be for another torch.
            shutil.copy(folder / "_C.so", target)
            copy_kernels(folder if cuda else None, target.parent)

    def copy_extensions_to_source(self) -> None:
        """The last part of a build with --inplace, which knows of extensions alone."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "fastrnn")
        copy_kernels(built if (built / KERNELS).exists() else None, ROOT / "fastrnn")


def copy_kernels(built: Path | None, to: Path) -> None:
    """The CUDA kernels; where none were built, those that are there were of other sources."""
    if built is None:
        (to / KERNELS).unlink(missing_ok=True)
    else:
        shutil.copy(built / KERNELS, to / KERNELS)


def write_cells(header: Path) -> None:
    """Generate the built-in cells; an unchanged header keeps its time, so nothing is rebuilt.

    A file beside it, `*.d`, tells ninja which modules it was generated from.
    """
    # `import fastrnn` needs the extension being built: a bare package stands in for it.
    package = types.ModuleType("fastrnn")
    package.__path__ = [str(ROOT / "fastrnn")]
    sys.modules["fastrnn"] = package
    from fastrnn.compiler.emit_cpp import write_header

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
        "-O0 -g" if debug else FLAGS["OPTIMISED"],
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
        object_of(path): (path, " ".join(binding) if BINDING in path.parents else "-std=c++17")
        for path in sorted(SOURCES.rglob("*.cpp"))
        if path != CPU_KERNELS
    }
    for isa in ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]:
        # GCC 12 takes its own intrinsics for reads of uninitialised memory.
        extra = f"-std=c++17 -DFASTRNN_ISA={isa} {ISA_FLAGS[isa]} -Wno-maybe-uninitialized"
        objects[object_of(CPU_KERNELS, f".{isa}.o")] = (CPU_KERNELS, extra)
    builds = ["build cells.gen.h: generate"]
    for out, (source, extra) in objects.items():
        generated = " | cells.gen.h" if source == CPU_KERNELS else ""
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


def object_of(source: Path, suffix: str = ".o") -> str:
    """In the folder of the build: files of the same name lie in several folders of the sources."""
    return source.relative_to(SOURCES).with_suffix(suffix).as_posix()


def cuda_ninja_file(folder: Path) -> str:
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
    targets = cuda_targets(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    flags = [
        *cuda_flags(folder),
        f"--threads {max(1, jobs // len(objects))}",
        *targets,
    ]
    builds = [
        f"build {out}: cuda_compile {escape(path)} | cells.gen.h" for out, path in objects.items()
    ]
    builds.append(f"build _cuda.so: cuda_link {' '.join(objects)}")
    builds.append("default _C.so _cuda.so")
    return CUDA_NINJA_FILE.format(
        nvcc=quote(found),
        flags=" ".join(flags),
        # No symbol of the static runtime may meet those of torch's.
        link="-Xlinker --exclude-libs,ALL",
        builds="\n".join(builds),
    )


def cuda_flags(folder: Path) -> list[str]:
    """How every CUDA source is compiled, whatever the GPU."""
    # Not -I: <math.h> must stay the system's.
    # As seen from the folder: nvcc cannot pass on a name with a space.
    sources = Path(os.path.relpath(SOURCES, folder)).as_posix()
    includes = [f"-Xcompiler -iquote,{path}" for path in (".", sources)]
    return ["-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden", *includes]


def cuda_targets(architectures: str) -> list[str]:
    """nvcc's arguments for a list like "8.0;9.0a+PTX"; GPUs that are too old are left out."""
    targets = []
    for name in re.split(r"[; ,]+", architectures.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; what it may have are numbers as in "
                f"{CUDA_ARCHITECTURES!r}"
            )
        number, variant = parts[1] + parts[2], parts[3]
        if int(number) < CUDA_OLDEST:
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
            Extension(
                "fastrnn._C",
                sorted(path.relative_to(ROOT).as_posix() for path in SOURCES.rglob("*.cpp")),
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
