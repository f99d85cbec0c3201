"""The name and the caches of the processor, as the system reports them."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["Cache", "cache_bytes", "caches", "processor"]


class Cache(NamedTuple):
    """A cache that holds data: its level, whether it holds only data, and its size in bytes."""

    level: int
    data_only: bool
    size: int


@cache
def processor() -> str:
    """The processor's name, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


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
