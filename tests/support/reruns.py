"""Running a file of tests again, in a process with the code for another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fastrnn import _C
from tests.support.selection import ALL_TESTS

__all__ = ["for_other_instruction_sets", "others", "run_again"]


def others(known: Sequence[str], used: str, floats: bool = True) -> list[str]:
    """The known instruction sets whose code is not that of the one in use.

    For floats, avx512_vnni has the code of avx512.
    """
    same = {used}
    if floats and used == "avx512_vnni" and not ALL_TESTS:
        same.add("avx512")
    return [isa for isa in known if isa not in same]


def for_other_instruction_sets(seconds: int, floats: bool = True) -> Callable[[Any], Any]:
    """Marks a test with the argument `isa`; it takes so many seconds, and is of the code for
    floats, or of that for other formats."""
    marks = (
        pytest.mark.reruns,
        pytest.mark.takes(seconds),
        pytest.mark.skipif("FASTRNN_ISA" in os.environ, reason="this is such a run"),
        pytest.mark.parametrize("isa", others(_C.isas(), _C.isa(), floats)),
    )

    def marked(test: Any) -> Any:
        for mark in marks:
            test = mark(test)
        return test

    return marked


def run_again(isa: str, *arguments: str) -> None:
    """Runs pytest with these arguments; its tests must pass."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "FASTRNN_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
