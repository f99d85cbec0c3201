"""The name, the model, the caches and the usable cores of the processor, as the system reports."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = [
    "Cache",
    "cache_bytes",
    "caches",
    "cores",
    "processor",
    "processor_and_model",
    "quota",
]


class Cache(NamedTuple):
    """A cache that holds data: its level, whether it holds only data, and its size in bytes."""

    level: int
    data_only: bool
    size: int


@cache
def _cpuinfo() -> dict[str, str]:
    """The lines about the first core in /proc/cpuinfo, by their names; none if there is no such
    file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in reversed(lines)]
    return {name.strip(): value.strip() for name, _, value in pairs}


@cache
def processor() -> str:
    """The processor's name, or else its architecture."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_and_model() -> str:
    """The processor's name with its family and model, as in "AMD EPYC, family 25, model 17".

    Several generations of processors share one name, above all in virtual machines. Where the
    system reports no numbers, as on Arm and macOS, this is the name alone.
    """
    numbers = {"family": _cpuinfo().get("cpu family", ""), "model": _cpuinfo().get("model", "")}
    if not all(number.isdigit() for number in numbers.values()):
        return processor()
    return ", ".join([processor(), *(f"{name} {number}" for name, number in numbers.items())])


@cache
def caches() -> tuple[Cache, ...]:
    """The caches of the first core, nearest first; none if the system does not report them."""
    result = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
            if kind != "Instruction":
                size_in_bytes = int(size.removesuffix("K")) << 10
                result.append(Cache(int(level), kind == "Data", size_in_bytes))
        except (OSError, ValueError):
            continue
    return tuple(result)


def cache_bytes() -> dict[str, int]:
    """Bytes of each cache by its name: {"L1": 49152, ...}."""
    return {f"L{cache.level}": cache.size for cache in caches()}


def cores() -> int:
    """How many cores this process may use: those that its affinity allows, or fewer if a quota of
    its control group is less."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on Linux
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, _quota() or allowed))


@cache
def _quota() -> int | None:
    membership = _read(Path("/proc/self/cgroup"))
    return quota(membership or "", lambda file: _read(Path("/sys/fs/cgroup", file)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def quota(membership: str, read: Callable[[str], str | None]) -> int | None:
    """The cores of the smallest CPU quota, rounded up, or None if there is no quota.

    Args:
        membership: the text of /proc/self/cgroup.
        read: the text of a file in /sys/fs/cgroup, or None if there is no such file.
    """
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own group at the root, and the path as its host sees it.
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            if not controllers:
                found.append(_limit(read(f"{folder}/cpu.max")))
                continue
            for root in dict.fromkeys((controllers, "cpu")):
                limit, period = (
                    read(f"{root}/{folder}/cpu.cfs_{name}_us") for name in ("quota", "period")
                )
                found.append(_limit(f"{limit} {period}"))
    return min((cores for cores in found if cores is not None), default=None)


def _limit(text: str | None) -> int | None:
    """Cores of "microseconds period", or None: "max" or a negative number is no limit."""
    words = (text or "").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or words[1] == "0":
        return None
    return max(1, -(-int(words[0]) // int(words[1])))
