"""The compiled extension `_C`, or an explanation of why it cannot be loaded.

torch's C++ interface changes between minor versions, so a build works only with the version that
it was built with. Other modules import the extension from here: `from fastrnn.extension import _C`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

__all__ = ["CUDA_KERNELS", "_C", "load"]

# The library of CUDA kernels, which exists if it was built.
CUDA_KERNELS = Path(__file__).with_name("_cuda.so")

_REMEDY = (
    "Build it again for this torch, in the source folder: pip install --no-build-isolation "
    "--no-deps --force-reinstall . (or, to use it there: python setup.py build_ext --inplace)"
)


def load() -> ModuleType:
    """Import `fastrnn._C`.

    Raises:
        ImportError: if it was not built, cannot be loaded, or was built with another minor version
            of torch.
    """
    try:
        compiled = importlib.import_module("fastrnn._C")
    except ModuleNotFoundError as error:
        raise ImportError(f"fastrnn's compiled part was not built. {_REMEDY}") from error
    except ImportError as error:
        raise ImportError(
            f"fastrnn's compiled part cannot be loaded with torch {torch.__version__}, probably "
            f"because it was built with another version ({error}). {_REMEDY}"
        ) from error
    built_for = str(compiled.built_for)
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(
            f"fastrnn was built with torch {built_for}, but torch {torch.__version__} is "
            f"installed. {_REMEDY}"
        )
    return compiled


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


if TYPE_CHECKING:
    from fastrnn import _C
else:
    _C = load()
