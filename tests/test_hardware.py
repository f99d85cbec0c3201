"""What the system reports about the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrnn import hardware

X86 = """\
processor	: 0
cpu family	: 25
model		: 17
model name	: AMD EPYC

processor	: 1
cpu family	: 6
model		: 1
model name	: another
"""
ARM = """\
processor	: 0
CPU implementer	: 0x41
CPU part	: 0xd40
"""
POWER = """\
processor	: 0
cpu		: POWER9
model		: 8335-GTW
"""


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Nothing is remembered from before the test, and nothing is kept after it."""
    hardware._cpuinfo.cache_clear()
    hardware.processor.cache_clear()
    yield
    hardware._cpuinfo.cache_clear()
    hardware.processor.cache_clear()


def reports(monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None) -> None:
    """The system reports `cpuinfo`; it has no such file if that is None."""

    def read(path: Path) -> str:
        assert str(path) == "/proc/cpuinfo"
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")


def test_the_name_and_the_model_of_the_first_core(monkeypatch: pytest.MonkeyPatch) -> None:
    reports(monkeypatch, X86)
    assert hardware.processor() == "AMD EPYC"
    assert hardware.processor_and_model() == "AMD EPYC, family 25, model 17"


@pytest.mark.parametrize("cpuinfo", [None, "", ARM, POWER])
def test_the_architecture_alone_where_there_are_no_numbers(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None
) -> None:
    reports(monkeypatch, cpuinfo)
    assert hardware.processor() == hardware.processor_and_model() == "arm64"
