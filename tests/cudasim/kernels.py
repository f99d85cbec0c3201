"""The kernels of primitives.cu by ctypes, and the same computations in plain Python.

It is also a program, for a process with a sanitizer: `python kernels.py LIBRARY CASE...` runs each
case, KERNEL:FAULT:SEED, and prints a line on stderr before each. It imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAULTS = {
    name: index
    for index, name in enumerate(
        re.findall(
            r"^  k(\w+)(?: = 0)?,",
            (Path(__file__).parent / "primitives.cu").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
}


class Numbers:
    """An array of C in an allocation of its own, so that a sanitizer sees its end."""

    def __init__(self, kind: type[ctypes._SimpleCData[Any]], values: Sequence[float]) -> None:
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        self._free = libc.free
        self.address = libc.malloc(ctypes.c_size_t(max(1, len(values)) * ctypes.sizeof(kind)))
        self.values = (kind * len(values)).from_address(self.address)
        self.values[:] = list(values)

    def __del__(self) -> None:
        self._free(ctypes.c_void_p(self.address))

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.address)


def words(count_or_values: int | Sequence[int], fill: int = 0xFFFFFFFF) -> Numbers:
    values = [fill] * count_or_values if isinstance(count_or_values, int) else count_or_values
    return Numbers(ctypes.c_uint32, values)


class Library:
    def __init__(self, path: str | Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.run_error.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        self._library.fastrnn_cudasim_seed(ctypes.c_uint64(seed))

    def call(self, name: str, *arguments: object) -> str | None:
        """Calls a kernel; returns the error, or None."""
        error = getattr(self._library, f"run_{name}")(*arguments)
        return self._library.run_error(error).decode() if error else None


def scan(x: Sequence[int], steps: int) -> list[int]:
    """The state of the kernels *_scan after `steps` steps."""
    n, now = len(x), list(x)
    for t in range(steps):
        now = [(3 * now[(i + 1) % n] + 5 * now[(i - 7) % n] + i + t) & 0xFFFFFFFF for i in range(n)]
    return now


def start(n: int) -> list[int]:
    return [(i * 2654435761 + 12345) & 0xFFFFFFFF for i in range(n)]


def run(library: Library, kernel: str, fault: str = "None") -> str | None:
    """Runs a kernel; returns the error of the launch, a count of wrong results, or None."""
    code = FAULTS[fault]
    if kernel == "block":
        blocks, threads, steps = 2, 96, 5
        x = words(start(blocks * threads))
        error = library.call("block_scan", x, blocks, threads, steps, code)
        each = [start(blocks * threads)[i * threads : (i + 1) * threads] for i in range(blocks)]
        wanted = [value for part in each for value in scan(part, steps)]
        found = list(x.values)
    elif kernel == "cluster":
        blocks, threads, steps = 4, 64, 6
        x = words(start(blocks * threads))
        error = library.call("cluster_scan", x, blocks, threads, steps, code)
        wanted, found = scan(start(blocks * threads), steps), list(x.values)
    elif kernel == "grid":
        blocks, threads, steps = 3, 64, 6
        n = blocks * threads
        x, exchange, flags = words(start(n)), words(2 * n + 4), words(32 * blocks)
        error = library.call("grid_scan", x, exchange, flags, blocks, threads, steps, code)
        wanted, found = scan(start(n), steps), list(x.values)
    elif kernel == "turns":
        threads, steps = 128, 5
        half = threads // 2
        out = words(half)
        error = library.call("turns", out, threads, steps, code)
        wanted = []
        for i in range(half):
            total = 0
            for t in range(steps):
                total = (31 * total + (half - 1 - i) * steps + t) & 0xFFFFFFFF
            wanted.append(total)
        found = list(out.values)
    elif kernel == "matrices":
        values = start(128)
        out = words(256)
        error = library.call("matrices", words(values), out, code)
        plain, transposed = matrices(values)
        wanted, found = plain + transposed, list(out.values)
    else:
        raise ValueError(f"no kernel {kernel!r}")
    if error:
        return error
    wrong = sum(a != b for a, b in zip(found, wanted, strict=True))
    return f"{wrong} of {len(wanted)} results are wrong" if wrong else None


def matrices(values: Sequence[int]) -> tuple[list[int], list[int]]:
    """The words that ldmatrix4 gives each lane, plain and transposed; lane l names row 31 - l."""
    rows = [values[4 * (31 - i) : 4 * (31 - i) + 4] for i in range(32)]
    halves = [[word >> (16 * (j % 2)) & 0xFFFF for j in range(8) for word in [row[j // 2]]]
              for row in rows]  # fmt: skip
    plain = [rows[8 * m + lane // 4][lane % 4] for lane in range(32) for m in range(4)]
    transposed = [
        halves[8 * m + 2 * (lane % 4)][lane // 4]
        | halves[8 * m + 2 * (lane % 4) + 1][lane // 4] << 16
        for lane in range(32)
        for m in range(4)
    ]
    return plain, transposed


def main() -> None:
    library = Library(sys.argv[1])
    for case in sys.argv[2:]:
        kernel, fault, seed = case.split(":")
        print(f"=== {case}", file=sys.stderr, flush=True)
        library.seed(int(seed))
        wrong = run(library, kernel, fault)
        if wrong:
            print(f"WRONG: {wrong}", file=sys.stderr, flush=True)
    print("=== end", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
