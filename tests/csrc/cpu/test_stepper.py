"""A step of a stepper allocates nothing, and its threads meet without races."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.paths import ROOT

COUNTER = """
#include <atomic>
#include <cstddef>
extern "C" {
void* __libc_malloc(size_t); void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t); void* __libc_memalign(size_t, size_t);
static std::atomic<long> count;
long allocations() { return count; }
void* malloc(size_t n) { ++count; return __libc_malloc(n); }
void* calloc(size_t n, size_t m) { ++count; return __libc_calloc(n, m); }
void* realloc(void* p, size_t n) { ++count; return __libc_realloc(p, n); }
void* memalign(size_t a, size_t n) { ++count; return __libc_memalign(a, n); }
void* aligned_alloc(size_t a, size_t n) { ++count; return __libc_memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) {
  ++count; *p = __libc_memalign(a, n); return *p ? 0 : 12;
}
}
"""


def run_counting(folder: Path, program: str) -> None:
    """Runs a program whose function `allocations` counts the allocations of the process."""
    compiler = shutil.which("g++")
    if compiler is None or not hasattr(ctypes.CDLL(None), "__libc_malloc"):
        pytest.skip("needs g++ and glibc")
    library = folder / "counter.so"
    (folder / "counter.cpp").write_text(COUNTER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", str(folder / "counter.cpp"), "-o", str(library)],
        check=True,
    )
    begin = f"""
        import ctypes, sys
        import numpy as np, torch, fastrnn
        from fastrnn import kernels
        from fastrnn.extension import _C
        from fastrnn.kernels.prepare import prepare
        from fastrnn.nn import stream
        count = ctypes.CDLL({str(library)!r}).allocations
        count.restype = ctypes.c_long
        def check(call):
            for _ in range(100):
                call()
            before = count(), sys.getallocatedblocks()
            for _ in range(1000):
                call()
            after = count(), sys.getallocatedblocks()
            # A few are the test's own.
            assert max(a - b for a, b in zip(after, before)) < 10, (before, after)
    """
    end = "assert count() > 1000  # it does count"
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(map(textwrap.dedent, (begin, program, end)))],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_a_step_allocates_nothing(tmp_path: Path) -> None:
    program = """
        for dtype, proj in ((torch.float32, 0), (torch.bfloat16, 5)):
            layer = fastrnn.LSTM(7, 33, num_layers=2, proj_size=proj, dtype=dtype)
            key = prepare(layer._cell(), dtype=dtype)
            for threads in (1, 2):
                weights, like = layer._weights(), torch.empty(0, dtype=dtype)
                given = [own.flat() for own in weights], _C.format_of(like), [()] * 2
                step = stream.Stepper(key, like, *given, 1, threads, True).step
                x, out = torch.zeros(1, 7, dtype=dtype), torch.zeros(1, proj or 33, dtype=dtype)
                pairs = [(x, out), (x[0], out[0])]
                if not proj:
                    pairs.append((x.numpy(), out.numpy()))
                for x, out in pairs:
                    check(lambda: step(x, out))
    """
    run_counting(tmp_path, program)


def test_a_step_of_slots_allocates_nothing(tmp_path: Path) -> None:
    program = """
        for dtype, proj in ((torch.float32, 0), (torch.bfloat16, 5)):
            layer = fastrnn.LSTM(7, 33, num_layers=2, proj_size=proj, dtype=dtype)
            slots = layer.stream_slots(200)
            taken = [slots.add() for _ in range(200)]
            for n in (1, 150):
                x = torch.zeros(n, 3, 7, dtype=dtype)
                out = torch.zeros(n, 3, proj or 33, dtype=dtype)
                tensor = torch.tensor(taken[:n])
                for chosen in (taken[:n], tensor):
                    check(lambda: slots.run(x, chosen, out))
                frame, result = x[:, 0], out[:, 0]
                check(lambda: slots.step(frame, tensor, result))
                check(lambda: (slots.remove(taken[0]), slots.add()))
                if not proj:
                    arrays = frame.numpy(), result.numpy()
                    check(lambda: slots.step(arrays[0], tensor, arrays[1]))
    """
    run_counting(tmp_path, program)


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_contention_changes_no_number(tmp_path: Path, sanitizer: str | None) -> None:
    source = Path(__file__).with_name("stepper.cpp")
    others = ("cpu/stepper.cpp", "cpu/contention.cpp", "cpu/memory.cpp")
    program = programs.compiled(source, tmp_path, *others, sanitizer=sanitizer)
    assert programs.run(*program).split() == ["1", "1", "0"]
