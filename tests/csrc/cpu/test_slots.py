"""Slots stay within their memory, and their threads meet without races."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import programs


@pytest.mark.parametrize(("sanitizer", "threads"), [("address", 1), ("thread", 2)])
def test_every_stream_has_its_own_states(tmp_path: Path, sanitizer: str, threads: int) -> None:
    source = Path(__file__).with_name("slots.cpp")
    others = ("cpu/slots.cpp", "cpu/stepper.cpp", "cpu/contention.cpp", "cpu/memory.cpp")
    program = programs.compiled(source, tmp_path, *others, sanitizer=sanitizer)
    assert programs.run(*program, str(threads)).split() == ["0", "1"]
