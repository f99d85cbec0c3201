"""The torch that the binding is compiled against."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Torch:
    """A torch: its version, and its folders of headers and libraries; and the folder of headers of
    the Python that has it, by default this one."""

    version: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    python: str = field(default_factory=lambda: sysconfig.get_path("include"))

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def minor(self) -> str:
        """What the file of a binding is named after, such as "2.13"."""
        return ".".join(map(str, self.release))

    @property
    def folder(self) -> str:
        """For the objects of the binding, which this Python and this torch alone can use."""
        return f"cp{sys.version_info.major}{sys.version_info.minor}-torch{self.version}"


def version() -> str | None:
    """The version of the torch that `found` finds, without importing it; None without one."""
    if given := os.environ.get("FASTRNN_TORCH"):
        return _version_in(Path(given))
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def found() -> Torch:
    """The installed torch, or that of another processor whose folder FASTRNN_TORCH names."""
    if given := os.environ.get("FASTRNN_TORCH"):
        folder = Path(given).resolve()
        headers = folder / "include"
        api = headers / "torch" / "csrc" / "api" / "include"
        return Torch(_version_in(folder), (str(headers), str(api)), (str(folder / "lib"),))
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    return Torch(torch.__version__, tuple(include_paths()), tuple(library_paths()))


def _version_in(folder: Path) -> str:
    values: dict[str, str] = {}
    try:
        exec((folder / "version.py").read_text(encoding="utf-8"), values)
    except OSError as error:
        raise SystemExit(f"FASTRNN_TORCH is no folder of an installed torch: {error}") from None
    return values["__version__"]
