"""Turns all switches of a build off."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CXX", "MAX_JOBS", "FASTRNN_CXXFLAGS", "FASTRNN_LDFLAGS", "FASTRNN_DEBUG")
    more = ("FASTRNN_MANYLINUX", "FASTRNN_TORCH")
    cuda = ("FASTRNN_CUDA", "NVCC", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    for name in (*names, *more, *cuda):
        monkeypatch.delenv(name, raising=False)
