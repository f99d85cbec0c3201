"""Builds `fastrnn._C` with ninja and, where nvcc is, the library of CUDA kernels beside it.

The builders of setuptools and torch cannot compile `csrc/cpu/kernels.cpp` once per instruction set,
so `csrc/building/` writes the files for ninja. The objects lie in `build/` under the versions of
Python and torch, where they survive pip's temporary folders.

Switches: CXX, MAX_JOBS, FASTRNN_CXXFLAGS, FASTRNN_LDFLAGS, FASTRNN_DEBUG=1; for the CUDA kernels
FASTRNN_CUDA=auto|0|1, FASTRNN_WATCHDOG=0|1, NVCC, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from building import cpu, cuda, ninja  # noqa: E402

sys.path.pop(0)

KERNELS = "_cuda.so"  # beside the extension


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch

        name = f"cp{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
        folder = ROOT / "build" / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds would write the same objects
            kernels = cuda.ninja_file(folder)
            (folder / "cuda.ninja").unlink(missing_ok=True)
            if kernels:
                (folder / "cuda.ninja").write_text(kernels)
            rest = "include cuda.ninja\n" if kernels else ""
            (folder / "build.ninja").write_text(cpu.ninja_file(folder) + rest)
            ninja.run(folder, verbose=self.verbose > 1)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Also over a newer file, which may be for another torch.
            shutil.copy(folder / "_C.so", target)
            copy_kernels(folder if kernels else None, target.parent)

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


if __name__ == "__main__" and sys.argv[1:2] == ["generate"]:
    write_cells(Path(sys.argv[2]))
elif __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "fastrnn._C",
                sorted(path.relative_to(ROOT).as_posix() for path in ninja.SOURCES.rglob("*.cpp")),
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
