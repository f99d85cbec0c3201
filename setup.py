"""Builds the library of CPU kernels, its binding to torch `fastrnn._C` and, where nvcc is, the
library of CUDA kernels.

The builders of setuptools and torch cannot compile `csrc/cpu/kernels.cpp` once per instruction set,
so `csrc/building/` writes the files for ninja. The objects lie in `build/`, where they survive
pip's temporary folders; those of the binding under the versions of Python and torch.

Switches: CXX, MAX_JOBS, FASTRNN_CXXFLAGS, FASTRNN_LDFLAGS, FASTRNN_DEBUG=1, FASTRNN_TORCH; for the
CUDA kernels FASTRNN_CUDA=auto|0|1, FASTRNN_WATCHDOG=0|1, NVCC, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import sysconfig
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from building import cpu, cuda, ninja, torches  # noqa: E402

sys.path.pop(0)

CUDA_LIBRARY = "_cuda.so"
LIBRARIES = (cpu.LIBRARY, CUDA_LIBRARY)  # beside the binding


class BuildExt(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        """With torch's minor version in it, such as fastrnn/_C.torch2.13.cpython-311-….so."""
        path, version = Path(super().get_ext_filename(fullname)), torches.version()
        if version is None:  # there is a use for the name where nothing is built
            return str(path)
        stem, suffix = path.name.split(".", 1)
        return str(path.with_name(f"{stem}.torch{'.'.join(version.split('.')[:2])}.{suffix}"))

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / f"objects-{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
        torch = torches.found()
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds would write the same objects
            kernels = cuda.ninja_file(folder)
            if not kernels:
                (folder / CUDA_LIBRARY).unlink(missing_ok=True)
            (folder / "cuda.ninja").write_text(kernels)
            rest = cpu.ninja_file(folder, torch)
            (folder / "build.ninja").write_text(f"{rest}include cuda.ninja\n")
            ninja.run(folder, verbose=self.verbose > 1)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            replace(folder / torch.folder / "_C.so", target)
            copy_libraries(folder, target.parent)

    def copy_extensions_to_source(self) -> None:
        """The last part of a build with --inplace, which knows of extensions alone."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "fastrnn")
        for path in sorted(built.glob("_C.*.so")):
            replace(path, ROOT / "fastrnn" / path.name)
        copy_libraries(built, ROOT / "fastrnn")


def replace(built: Path, target: Path) -> None:
    """Copies a binding. Others in the folder are of other sources than the library will be."""
    for other in target.parent.glob("_C.*.so"):
        other.unlink()
    shutil.copy(built, target)


def copy_libraries(built: Path, to: Path) -> None:
    """Copies the libraries of kernels; one that was not built is there of other sources."""
    for name in LIBRARIES:
        (to / name).unlink(missing_ok=True)
        if (built / name).exists():
            shutil.copy(built / name, to / name)


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
