"""The simulator that runs CUDA kernels on the CPU (tests/cudasim): each primitive against plain
Python, and the mistakes that it must find."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch import Tensor

from tests.cudasim import build, kernels
from tests.cudasim.kernels import Library, Numbers, words

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]

PRIMITIVES = build.SIMULATOR / "primitives.cu"
SEEDS = range(8)
KERNELS = ["block", "cluster", "grid", "turns", "matrices"]

# Kernel, fault, and a pattern of the error with which the schedule of some seed finds the fault.
FOUND: list[tuple[str, str, str]] = [
    ("block", "NoBarrier", "results are wrong"),
    ("block", "SingleBuffer", "results are wrong"),
    ("block", "Uninitialised", "results are wrong"),
    ("cluster", "NoWait", "results are wrong|expects|still stores|arrivals"),
    ("cluster", "WrongParity", "deadlock|results are wrong|arrivals"),
    ("cluster", "ShortExpect", "results are wrong|still expects|still stores|deadlock|arrivals"),
    ("cluster", "LongExpect", r"deadlock[\s\S]*barrier_wait, parity 0 at byte 8 of shared memory"),
    ("cluster", "SingleBuffer", "results are wrong"),
    ("cluster", "NoClusterSync", "no mbarrier has been initialised at byte"),
    ("cluster", "NoLastWait", "ends while .* still stores|results are wrong|has ended|expects"),
    ("cluster", "TwiceArrived", "cluster_arrive twice"),
    ("cluster", "BadPeer", "rank 4 in a cluster of 4"),
    ("grid", "NoBarrierPublish", "results are wrong"),
    ("grid", "SingleBuffer", "results are wrong"),
    ("grid", "NoWait", "results are wrong"),
    ("grid", "NoCommit", "results are wrong"),
    ("grid", "TargetTooSmall", "results are wrong"),
    ("grid", "NotCooperative", r"deadlock[\s\S]*load_acquire"),
    ("grid", "Misaligned", "copy_async16: .* not aligned to 16"),
    ("turns", "NoBarrier", "results are wrong"),
    ("turns", "SingleBuffer", "results are wrong"),
    ("turns", "WrongThreads", "named_barrier 1 for 160 threads of a block of 128"),
    ("matrices", "NoWarpSync", "results are wrong"),
    ("matrices", "Misaligned", "ldmatrix4: .* not aligned to 16"),
]
RACES = [
    ("block", "NoBarrier"),
    ("block", "SingleBuffer"),
    ("cluster", "NoWait"),
    ("cluster", "SingleBuffer"),
    ("cluster", "NoClusterSync"),
    ("cluster", "NoWarpSync"),
    ("grid", "NoBarrierPublish"),
    ("grid", "SingleBuffer"),
    ("grid", "TargetTooSmall"),
    ("turns", "NoBarrier"),
    ("turns", "SingleBuffer"),
    ("matrices", "NoWarpSync"),
]


@pytest.fixture(scope="session")
def library() -> Library:
    return Library(build.build([PRIMITIVES]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_kernel(library: Library, kernel: str) -> None:
    for seed in SEEDS:
        library.seed(seed)
        assert kernels.run(library, kernel) is None, f"seed {seed}"


@pytest.mark.parametrize(("kernel", "fault", "words"), FOUND)
def test_fault_is_found(library: Library, kernel: str, fault: str, words: str) -> None:
    said = []
    for seed in SEEDS:
        library.seed(seed)
        said.append(kernels.run(library, kernel, fault))
    found = [text for text in said if text is not None]
    assert found, f"no seed of {len(SEEDS)} finds it"
    assert any(re.search(words, text) for text in found), found
    # A failed launch leaves no state behind.
    assert kernels.run(library, kernel) is None


def test_same_seed_same_order(library: Library) -> None:
    def said(seed: int) -> list[str | None]:
        library.seed(seed)
        return [kernels.run(library, "grid", "TargetTooSmall") for _ in range(3)]

    assert said(3) == said(3)
    assert len({str(said(seed)) for seed in range(6)}) > 1


# ---- Sanitizers ---------------------------------------------------------------------------------


def report(sanitizer: str, cases: Sequence[str]) -> str:
    """Runs cases "kernel:fault:seed" under a sanitizer, in a process of its own, up to the first
    complaint; returns its stderr."""
    library = build.build([PRIMITIVES], sanitizer)
    prefix, environment = build.sanitized(sanitizer)
    for name in environment.keys() & {"TSAN_OPTIONS", "ASAN_OPTIONS"}:
        environment[name] += ":halt_on_error=1"
    done = subprocess.run(
        [*prefix, sys.executable, kernels.__file__, str(library), *cases],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, 66), done.stderr[-2000:]
    return done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_right_kernels_have_no_report(sanitizer: str) -> None:
    cases = [f"{kernel}:None:{seed}" for kernel in KERNELS for seed in (0, 1, 2)]
    assert report(sanitizer, cases).splitlines() == [*(f"=== {case}" for case in cases), "=== end"]


@pytest.mark.parametrize(("kernel", "fault"), RACES)
def test_race_is_found(kernel: str, fault: str) -> None:
    text = report("thread", [f"{kernel}:{fault}:{seed}" for seed in (0, 1)])
    assert "WARNING: ThreadSanitizer: data race" in text, text[:2000]
    assert "primitives.cu" in text, text[:2000]


@pytest.mark.parametrize("fault", ["OutsideShared", "OutsideGlobal"])
def test_access_outside_is_found(fault: str) -> None:
    text = report("address", [f"block:{fault}:1"])
    assert "AddressSanitizer: heap-buffer-overflow" in text, text[:2000]
    assert re.search(r"block_scan.*primitives\.cu:\d+", text), text[:2000]


# ---- Warps --------------------------------------------------------------------------------------


def bits(values: Tensor) -> Numbers:
    if values.dtype == torch.float32:
        return Numbers(ctypes.c_float, values.flatten().tolist())
    return Numbers(ctypes.c_uint16, (values.view(torch.int16).flatten().int() & 0xFFFF).tolist())


@pytest.mark.parametrize("number", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["integers", "normal"])
def test_product(library: Library, number: torch.dtype, whole: bool) -> None:
    k = 8 if number == torch.float32 else 16

    def draw(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape).float() if whole else torch.randn(shape)

    a, b, c = draw(16, k).to(number), draw(8, k).to(number), draw(16, 8)
    out = bits(c)
    code = [torch.bfloat16, torch.float16, torch.float32].index(number)
    assert library.call("product", code, bits(a), bits(b), out, 0) is None
    if number == torch.float32:
        a, b = tf32(a), tf32(b)
    exact = c.double() + a.double() @ b.double().T
    error = (torch.tensor(list(out.values)).view(16, 8).double() - exact).abs().max().item()
    # Products of 11 bits are exact in float; 17 terms are added.
    assert error <= (0 if whole else 17 * 2.0**-24 * exact.abs().max().item())


def tf32(x: Tensor) -> Tensor:
    """Rounds to 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_product_needs_all_lanes(library: Library) -> None:
    a, b, c = torch.zeros(16, 16), torch.zeros(8, 16), torch.zeros(16, 8)
    diverged = kernels.FAULTS["Diverged"]
    said = library.call("product", 0, bits(a.bfloat16()), bits(b.bfloat16()), bits(c), diverged)
    assert said is not None and "deadlock" in said and "mma of bfloat16" in said


def test_shuffles(library: Library) -> None:
    n = 48
    out = words(7 * n)
    assert library.call("shuffles", out) is None
    found = torch.tensor(list(out.values)).view(7, n)
    i = torch.arange(n)
    lane, warp = i % 32, i // 32 * 32
    exists = lambda source: warp + source < n  # noqa: E731
    source = lane * 7 % 16
    assert found[0].equal(100 * (warp + source))
    source = lane ^ 5
    assert found[1][exists(source)].equal((100 * (warp + source))[exists(source)])
    down = torch.where((lane + 3) // 16 == lane // 16, lane + 3, lane)
    assert found[2].equal(100 * (warp + down))
    up = torch.where((lane >= 3) & ((lane - 3) // 16 == lane // 16), lane - 3, lane)
    assert found[3].equal(100 * (warp + up))
    ballot = [sum(1 << j for j in range(0, end, 3)) for end in (32, 16)]
    assert found[4].tolist() == [ballot[0]] * 32 + [ballot[1]] * 16
    half = torch.where(lane < 16, lane ^ 1, lane ^ 2)
    assert found[5].equal(100 * (warp + half))
    assert found[6].equal(100 * (warp + 2))


# ---- Copies, barriers, places, numbers ----------------------------------------------------------


def test_copies_land_when_waited_for(library: Library) -> None:
    threads = 32
    values = kernels.start(12 * threads)
    early = set()
    for seed in SEEDS:
        library.seed(seed)
        out = words(16 * threads)
        assert library.call("copies", words(values), out, threads) is None
        found = list(out.values)
        group = [values[4 * threads * g : 4 * threads * (g + 1)] for g in range(3)]
        group[2] = [v if j // 4 % 2 == 0 else 0 for j, v in enumerate(group[2])]
        for j, value in enumerate(found[: 4 * threads]):
            assert value in (group[2][j], 0xFFFFFFFF)
            early.add(value == group[2][j])
        assert found[4 * threads : 8 * threads] == group[0]
    # Some copies landed before the wait, others did not.
    assert early == {True, False}


def test_threads_that_end_count_as_arrived(library: Library) -> None:
    for seed in SEEDS:
        library.seed(seed)
        out = words(32)
        assert library.call("leavers", out, 64) is None
        assert list(out.values) == [2 * (31 - i) + 32 for i in range(32)]


def test_places(library: Library) -> None:
    grid, block = (4, 3, 2), (8, 2, 3)
    sizes = (ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block)
    blocks, threads = 24, 48
    out = words(3 * blocks * threads)
    assert library.call("places", out, *sizes, 2, 0) is None
    found = torch.tensor(list(out.values)).view(blocks, threads, 3)
    assert found[..., 0].equal(torch.arange(blocks)[:, None].expand(blocks, threads))
    assert found[..., 1].equal(torch.arange(threads).expand(blocks, threads))
    assert found[..., 2].equal((torch.arange(blocks) % 2 * 100 + 2)[:, None].expand(-1, threads))


@pytest.mark.parametrize(
    ("grid", "block", "cluster", "shared_bytes"),
    [((1, 1, 1), (1025, 1, 1), 1, 0), ((3, 1, 1), (32, 1, 1), 2, 0), ((1, 1, 1), (32, 1, 1), 1,
     232449), ((0, 1, 1), (32, 1, 1), 1, 0), ((32, 1, 1), (32, 1, 1), 32, 0)],
)  # fmt: skip
def test_launches_that_a_gpu_refuses(
    library: Library,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    cluster: int,
    shared_bytes: int,
) -> None:
    sizes = (ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block)
    said = library.call("places", words(4), *sizes, cluster, shared_bytes)
    assert said is not None and said.startswith("invalid")


def test_numbers_are_rounded_to_nearest(library: Library) -> None:
    x = torch.cat([torch.randn(1024), torch.randn(512) * 1e5, torch.randn(504) * 1e-6])
    special = [0.0, -0.0, float("inf"), -float("inf"), 1 + 2.0**-8, 1 + 2.0**-11, 65519.0, 65520.0]
    x = torch.cat([x, torch.tensor(special)])
    halves, back = Numbers(ctypes.c_uint16, [0] * 4096), Numbers(ctypes.c_float, [0] * 4096)
    assert library.call("numbers", bits(x), halves, back, 8) is None
    for kind, found in zip((x.bfloat16(), x.half()), torch.tensor(list(back.values)).view(-1, 2).T):  # noqa: B905
        assert found.equal(kind.float())


# ---- Faults in sources --------------------------------------------------------------------------


def test_fault_is_planted_once() -> None:
    fault = build.Fault("primitives.cu", "out[i] = shared[half - 1 - i];", "out[i] = shared[i];")
    library = Library(build.build([PRIMITIVES], mutate=[fault]))
    out = words(32)
    assert library.call("leavers", out, 64) is None
    assert list(out.values) == [2 * i + 32 for i in range(32)]
    for wrong, times in (("__syncthreads();", "[0-9]+"), ("no such text", "0")):
        with pytest.raises(ValueError, match=f"{times} times"):
            build.build([PRIMITIVES], mutate=[build.Fault("primitives.cu", wrong, "")])


def test_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with a fault in a header, although such a header is copied to a new folder."""
    header, right = "cuda/platform/launch.cuh", "size_t shared_bytes = 0;"
    fault = build.Fault(header, right, f"{right}  // the same")
    library = build.build([PRIMITIVES], mutate=[fault])

    def refuse(command: list[str]) -> None:
        raise RuntimeError(f"compiles: {command}")

    monkeypatch.setattr(build, "run", refuse)
    assert build.build([PRIMITIVES], mutate=[fault]) == library
    with pytest.raises(RuntimeError, match="compiles"):
        build.build([PRIMITIVES], mutate=[build.Fault(header, right, f"{right}  // {uuid4()}")])


def test_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cuda_headers", lambda: None)
    with pytest.raises(RuntimeError, match="nvidia-cuda-runtime"):
        build.build([Path("any.cu")])
