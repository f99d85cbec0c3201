"""The tables of the CUDA kernels, without compiling the kernels."""

from __future__ import annotations

import ctypes
import functools

import pytest

from fastrnn.kernels.gpu.cuda import read_tables
from fastrnn.plan.tables import Tables
from tests.cudasim.build import build, missing
from tests.support.paths import CSRC


@functools.cache
def tables() -> Tables:
    """The tables of the built-in cells; skips the test if they cannot be compiled."""
    if reason := missing():
        pytest.skip(reason, allow_module_level=True)
    return read_tables(ctypes.CDLL(str(build([CSRC / "cuda" / "tables.cu"]))))
