"""A library of CUDA kernels for calls that C++ launches, and what Python launches of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastrnn import kernels
from fastrnn.kernels import launched
from tests.support import stub


@pytest.fixture
def library() -> Iterator[Any]:
    """Calls run with a library that echoes its operands."""
    with stub.answering() as loaded, kernels.use("cuda"):
        loaded.fastrnn_stub_echo()
        yield loaded


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that Python launched."""
    passes: list[str] = []
    forward, backward = launched.forward, launched.backward

    def forward_here(inputs: tuple[Any, ...], tape: bool) -> Any:
        passes.append("forward with tape" if tape else "forward")
        return forward(inputs, tape)

    def backward_here(*arguments: Any) -> Any:
        passes.append("backward")
        return backward(*arguments)

    monkeypatch.setattr(launched, "forward", forward_here)
    monkeypatch.setattr(launched, "backward", backward_here)
    return passes
