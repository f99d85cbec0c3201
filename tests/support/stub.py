"""A library of CUDA kernels without kernels, for CPU tensors: see stub.cu."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastrnn import _C
from tests.cudasim.build import build, missing
from tests.support.paths import CSRC

__all__ = ["answering", "library"]


def library() -> Path:
    """The path of the library; built if it is not there.

    Raises:
        RuntimeError: if it cannot be built here.
    """
    return build([CSRC / "cuda" / "tables.cu", Path(__file__).with_name("stub.cu")])


@contextmanager
def answering(
    usable: int = 0, architecture: int = 90, cooperative: int = 0
) -> Iterator[ctypes.CDLL]:
    """Calls inside the block run with this library, which answers with these errors, 0 for none.
    Skips the test if it cannot be built."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # A copy of its own: what a library answers about the device is asked once.
        path = shutil.copy(library(), folder)
        loaded = ctypes.CDLL(path)
        loaded.fastrnn_stub_answer(usable, architecture, cooperative)
        patch.setenv("FASTRNN_CUDA_LIBRARY", path)
        _C.forget_plans()
        yield loaded
    _C.forget_plans()
