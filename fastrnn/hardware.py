"""The name, the model and the caches of the processor, as the system reports them."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["Cache", "cache_bytes", "caches", "processor", "processor_and_model"]


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
