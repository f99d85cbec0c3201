"""What the system reports about the processor, and how many cores a process may use."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("", {}, None),
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        # The quota of any group above counts too.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "cpu.max": "300000 100000"}, 2),
        # The first version: a folder for each controller or for several together.
        ("4:memory:/m\n1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n"}, None),
        (
            "3:cpu,cpuacct:/a\n2:cpuset:/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        # A container sees its group at the root of the mount.
        (
            "3:cpu,cpuacct:/docker/0123\n",
            {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        # Another controller's name contains "cpu".
        ("2:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
    ],
)
def test_quota(membership: str, files: dict[str, str], cores: int | None) -> None:
    def read(file: str) -> str | None:
        return files.get(os.path.normpath(file))

    assert hardware.quota(membership, read) == cores


def test_cores_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert hardware.cores() == 3
    monkeypatch.setattr(hardware, "_quota", lambda: 2)
    assert hardware.cores() == 2
    monkeypatch.setattr(hardware, "_quota", lambda: 8)
    assert hardware.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware.cores() == 1
