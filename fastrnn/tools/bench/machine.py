"""Measures the roofline of a machine: the peak of matrix products, the bandwidth of each cache."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fastrnn import hardware

__all__ = ["Machine", "Roofline", "measure", "slug"]

_SQUARES = (512, 1024, 2048)
_SECONDS = 0.06  # time to measure each number


@dataclass(frozen=True)
class Roofline:
    """The least time that a row can take, in microseconds, and the limit that sets it."""

    microseconds: float
    by: str


@dataclass(frozen=True)
class Machine:
    """The limits of one processor with `threads` threads.

    Attributes:
        gflops: GFLOP/s of float32 matrix products with each library; the largest is the peak.
        bandwidth: GB/s at which all threads together read from their own caches, from the shared
            one, or from memory. The loop also adds the numbers, so L1 may be faster.
        cache_bytes: bytes of a core's caches, and of the shared L3.
    """

    threads: int
    gflops: dict[str, float]
    bandwidth: dict[str, float]
    cache_bytes: dict[str, int]

    @property
    def peak(self) -> float:
        """GFLOP/s of float32 matrix products."""
        return max(self.gflops.values())

    def level(self, weight_bytes: int) -> str:
        """The nearest cache that holds the weights, if each core has an equal part of them."""
        per_core = weight_bytes / self.threads
        for name, size in self.cache_bytes.items():
            if (weight_bytes if name == "L3" else per_core) <= size:
                return name
        return "memory"

    def roofline(self, flops: int, reads: int, weight_bytes: int) -> Roofline:
        """The larger of the times of the arithmetic and of `reads` reads of the weights."""
        level = self.level(weight_bytes)
        arithmetic = Roofline(flops / self.peak / 1e3, "sgemm peak")
        reading = Roofline(reads * weight_bytes / self.bandwidth[level] / 1e3, f"{level} bandwidth")
        return max(arithmetic, reading, key=lambda roofline: roofline.microseconds)


def measure(device: str = "cpu") -> Machine:
    """Measure this machine with the current number of threads, or its GPU, in about two seconds."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    sizes = hardware.cache_bytes()
    if device == "cuda":
        sizes = {"L2": torch.cuda.get_device_properties(0).L2_cache_size}
    buffers = {name: [size // 2, size * 2 // 3] for name, size in sizes.items()}
    buffers["memory"] = [4 * max(sizes.values(), default=32 << 20)]
    return Machine(
        threads=threads,
        gflops=_peaks(device),
        bandwidth={
            name: max(_read_speed(size, device) for size in tried)
            for name, tried in buffers.items()
        },
        cache_bytes=sizes,
    )


def slug(device: str, instruction_set: str = "", threads: int | None = None) -> str:
    """A folder name for results: the device and, for a processor, which kernels ran on it and the
    number of threads.

    "AMD EPYC, family 25, model 17" with "avx2" and 2 threads is
    `amd-epyc-family25-model17-avx2-2-threads`. A virtual machine may hide instructions of its
    processor, and `FASTRNN_ISA` chooses others.
    """
    numbered = re.sub(r", (family|model) (?=\d)", r" \1", device.lower())
    names = [re.sub(r"\W+", "-", numbered).strip("-")]
    if instruction_set:
        names.append(instruction_set)
    if threads is not None:
        names.append(f"{threads}-thread{'s' if threads > 1 else ''}")
    return "-".join(names)


def _peaks(device: str) -> dict[str, float]:
    """GFLOP/s of the best square float32 product with each library of torch.

    torch.mm may be far from the peak on processors that its library was not written for; oneDNN
    chooses by instruction set.
    """
    peaks = {"torch.mm": 0.0}
    for size in _SQUARES if device == "cpu" else (8192,):
        a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
        products = {"torch.mm": partial(torch.mm, a, b, out=out)}
        if device == "cpu" and torch.backends.mkldnn.is_available():
            blocked = [t.to_mkldnn() for t in (a, b, torch.zeros(size, device="cpu"))]
            products["oneDNN"] = partial(torch._C._nn.mkldnn_linear, *blocked)
        for name, product in products.items():
            speed = 2e-9 * size**3 / _best(product, device)
            peaks[name] = max(peaks.get(name, 0.0), speed)
    return peaks


def _read_speed(size: int, device: str) -> float:
    """GB/s at which all threads sum a buffer of `size` bytes repeatedly.

    One call reads the same buffer once per row, so that the cost of the call is negligible. The
    threads share the rows, and each finds the buffer in its own cache if it fits.
    """
    buffer = torch.ones(size // 4, device=device)
    repeats = max(2 * torch.get_num_threads(), (64 << 20) // size)
    rows = buffer.expand(repeats, -1)
    return 1e-9 * size * repeats / _best(partial(torch.sum, rows, 1), device)


def _best(call: Callable[[], object], device: str) -> float:
    """Least seconds of a call: a roofline is what the machine can do, not what it usually does."""
    call()
    begin = time.perf_counter()
    times: list[float] = []
    while len(times) < 3 or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
