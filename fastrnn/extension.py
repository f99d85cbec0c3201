"""The compiled extension `_C`, or an explanation of why it cannot be loaded.

The kernels are a library without torch, `libfastrnn_cpu.so`. The extension binds them to torch,
whose C++ interface changes between minor versions. So there is a file for each, and the name says
which: `_C.torch2.13.cpython-311-x86_64-linux-gnu.so`. A build makes the one for the torch that it
finds, and a wheel has several. Other modules import the extension from here:
`from fastrnn.extension import _C`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

__all__ = ["CPU_KERNELS", "CUDA_KERNELS", "_C", "bindings", "choose", "load"]

_HERE = Path(__file__).parent
_NAME = "fastrnn._C"
CPU_KERNELS = _HERE / "libfastrnn_cpu.so"
# The library of CUDA kernels, which exists if it was built.
CUDA_KERNELS = _HERE / "_cuda.so"

_REMEDY = (
    "build it for this torch in the source folder, which needs a C++ compiler, ninja and "
    "setuptools>=77: pip install --no-build-isolation --no-deps --force-reinstall . (or, to use it "
    "there: python setup.py build_ext --inplace)"
)


def bindings(folder: Path = _HERE) -> dict[str, Path]:
    """The extension's files for this Python, by the minor version of torch, oldest first."""
    found: dict[str, Path] = {}
    for path in folder.glob("_C.torch*"):
        name = re.fullmatch(r"_C\.torch(\d+\.\d+)(\..+)", path.name)
        if name and name[2] == EXTENSION_SUFFIXES[0]:
            found[name[1]] = path
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split(".")]))


def choose(version: str, folder: Path = _HERE) -> Path:
    """The extension's file for a version of torch.

    Raises:
        ImportError: if there is none; the message says for which versions there is one.
    """
    there = bindings(folder)
    if not there:
        raise ImportError(f"fastrnn's compiled part was not built for this Python: {_REMEDY}")
    minor = ".".join(version.split(".")[:2])
    if minor not in there:
        *others, last = there
        versions = f"{', '.join(others)} and {last}" if others else last
        raise ImportError(
            f"fastrnn was built for torch {versions}, but torch {version} is installed. Install "
            f"torch {last}, or {_REMEDY}"
        )
    return there[minor]


def load(folder: Path = _HERE) -> ModuleType:
    """Import `fastrnn._C` from the file for the installed torch.

    Raises:
        ImportError: if there is none for it, or it cannot be loaded.
    """
    path = choose(torch.__version__, folder)
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec and spec.loader
    try:
        compiled = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiled)
    except ImportError as error:
        raise ImportError(
            f"fastrnn's compiled part cannot be loaded with torch {torch.__version__} ({error}): "
            f"{_REMEDY}"
        ) from error
    sys.modules[_NAME] = compiled
    return compiled


if TYPE_CHECKING:
    from fastrnn import _C
else:
    _C = load()
