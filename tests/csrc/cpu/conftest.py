"""Custom cells of these tests are compiled as users compile them: they run for longer than the
compiler does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def optimised() -> Iterator[None]:
    before = os.environ.get("FASTRNN_CXXFLAGS", "")
    os.environ["FASTRNN_CXXFLAGS"] = ""
    yield
    os.environ["FASTRNN_CXXFLAGS"] = before
