"""Measures time, memory and errors of calls.

Timing is interleaved: each implementation runs a block of calls in turn, so that other load on the
machine affects all alike. Before a turn the thread pools of the others must have stopped spinning,
and calls that are not counted warm up the threads and caches of this one.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastrnn.extension import _C
from fastrnn.tools import tolerance
from fastrnn.tools.bench.implementation import Prepared

__all__ = [
    "Clock",
    "Latency",
    "Times",
    "gpu_clock",
    "interleaved",
    "kernels_of",
    "latencies",
    "limit",
    "peak_memory",
    "relative_error",
]

_BLOCK = 1e-3  # seconds of calls that are timed together, far above the clock's resolution
_BLOCKS = 10  # blocks per turn
# Thread pools spin while they wait for another call, OpenMP's for 10 ms, ONNX Runtime's for 40 ms,
# and keep cores busy. Processor time is counted in ticks of 4 ms.
_GLANCE = 8e-3  # seconds in which an idle process uses no processor time
_LONGEST_SPIN = 0.2  # seconds
_WARM_UP = 2e-3  # seconds
_LONG = 0.1  # seconds of a call that needs no warm-up: it would save less than one percent
_FEWEST = 3  # turns of each implementation, however slow the calls are


@dataclass(frozen=True)
class Times:
    """Microseconds of a call: median, 20th and 80th percentile over blocks of `calls` calls."""

    median: float
    p20: float
    p80: float
    blocks: int
    calls: int


@dataclass(frozen=True)
class Latency:
    """Microseconds of single calls: median, 99th percentile and the longest of all `calls`."""

    p50: float
    p99: float
    longest: float
    calls: int


# Returns the seconds that a number of calls takes together.
Clock = Callable[[Callable[[], object], int], float]


@dataclass
class _Taken:
    calls: int
    seconds: list[float]
    spent: float = 0.0


def clock(call: Callable[[], object], calls: int) -> float:
    """Seconds of `calls` calls by the processor's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def gpu_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds of `calls` calls between two events of the current stream.

    The processor's wait for the GPU does not count; the GPU's wait for launches does.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def interleaved(
    prepared: Mapping[str, Prepared], seconds: float, clock: Clock = clock
) -> dict[str, Times]:
    """Times of each implementation. They run in turn until each has had three turns and has spent
    `seconds` in calls."""
    taken: dict[str, _Taken] = {}
    for name, implementation in prepared.items():
        with implementation.around():
            clock(implementation.call, 1)
            once = clock(implementation.call, 1)
            # Sleeping threads and cold caches make the first calls many times as slow as others.
            many = max(1, int(20 * _BLOCK / once))
            times = 3 if once < _BLOCK else 1
            once = min(clock(implementation.call, many) / many for _ in range(times))
        taken[name] = _Taken(max(1, int(_BLOCK / once)), [])
    turns = 0
    shuffled = random.Random(0)
    while turns < _FEWEST or any(t.spent < seconds for t in taken.values()):
        # The order changes each time, so that none always follows the same other.
        for name in shuffled.sample(list(prepared), len(prepared)):
            if turns < _FEWEST or taken[name].spent < seconds:
                with prepared[name].around():
                    _turn(prepared[name].call, taken[name], clock)
        turns += 1
    return {name: _times(blocks) for name, blocks in taken.items()}


def _turn(call: Callable[[], object], taken: _Taken, clock: Clock) -> None:
    _wait_for_idle_pools()
    _C.end_contention()  # the pools may have made our threads late
    if not taken.seconds or taken.seconds[-1] < _LONG:
        begin = time.perf_counter()
        while True:
            clock(call, 1)
            if time.perf_counter() - begin > _WARM_UP:
                break
    for _ in range(_BLOCKS):
        block = clock(call, taken.calls)
        taken.seconds.append(block / taken.calls)
        taken.spent += block
        if block > 10 * _BLOCK:
            break


def _wait_for_idle_pools() -> None:
    begin = time.perf_counter()
    while time.perf_counter() - begin < _LONGEST_SPIN:
        used = time.process_time()
        time.sleep(_GLANCE)
        if time.process_time() - used < _GLANCE / 4:
            return


def _times(taken: _Taken) -> Times:
    micros = sorted(1e6 * s for s in taken.seconds)
    p20, *_, p80 = statistics.quantiles(micros, n=5, method="inclusive")
    return Times(statistics.median(micros), p20, p80, len(micros), taken.calls)


def latencies(prepared: Mapping[str, Prepared], calls: int, turn: int = 5000) -> dict[str, Latency]:
    """Latency of each implementation over `calls` calls, timed one by one in turns of `turn`."""
    nanos: dict[str, list[int]] = {name: [] for name in prepared}
    while len(next(iter(nanos.values()))) < calls:
        for name, implementation in prepared.items():
            with implementation.around():
                _wait_for_idle_pools()
                _C.end_contention()
                for _ in range(20):
                    implementation.call()
                for _ in range(turn):
                    start = time.perf_counter_ns()
                    implementation.call()
                    nanos[name].append(time.perf_counter_ns() - start)
    result = {}
    for name, times in nanos.items():
        times.sort()
        median, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
        result[name] = Latency(median / 1e3, p99 / 1e3, times[-1] / 1e3, len(times))
    return result


def peak_memory(call: Callable[[], object], device: str = "cpu") -> tuple[object, int | None]:
    """The result of `call`, and by how many bytes it raised the peak memory of the process, or on a
    GPU that of torch's tensors.

    The system counts resident pages of all allocators, ours in C++ and the baselines' arenas,
    exactly to a fraction of a MiB. Memory that was allocated before the call does not count. The
    number is None if the system is not Linux.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        # Free pages that the C library keeps would hide an allocation that reuses them.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at the current size
        before = _kib(status, "VmRSS")
        result = call()
        return result, max(0, _kib(status, "VmHWM") - before) << 10
    except (OSError, AttributeError):
        return call(), None


def _kib(status: Path, name: str) -> int:
    return next(int(row.split()[1]) for row in status.read_text().splitlines() if name in row)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """`tolerance.largest_error`, or infinity if the shapes differ."""
    if result.shape != exact.shape:
        return float("inf")
    return tolerance.largest_error(result, exact)


def limit(what: str, theirs: float, dtype: str, tf32: bool = False) -> float:
    """`tolerance.limit` for the result named `what`. `tf32` means that torch.nn may multiply in
    TF32; if it does not, its error is smaller."""
    precision = "tf32" if tf32 else dtype
    return tolerance.limit(theirs, precision, gradients=what.startswith("gradient"))


def kernels_of(call: Callable[[], object]) -> tuple[str, ...]:
    """Names of the GPU kernels that a call runs, in order and without repetition."""
    if not torch.cuda.is_available():
        return ()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    # The events also include the calls of CUDA's runtime that launched the kernels.
    ran = [e for e in profiled.events() or () if e.device_type.name == "CUDA"]
    return tuple(dict.fromkeys(event.name for event in ran))
