"""The roofline of a machine, and its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastrnn.tools.bench.machine import slug
from tests.support.bench import MACHINE


def test_the_roofline_is_the_slower_of_arithmetic_and_reading() -> None:
    assert MACHINE.roofline(10**8, 1, 1000).microseconds == pytest.approx(1000)
    assert MACHINE.roofline(10**8, 1, 1000).by == "sgemm peak"
    # 2^17 bytes, half of them on each core: they are in L2, at 200 GB/s.
    assert MACHINE.roofline(1, 100, 1 << 17).microseconds == pytest.approx(65.536)
    assert MACHINE.roofline(1, 100, 1 << 17).by == "L2 bandwidth"


@pytest.mark.parametrize(
    ("size", "level"),
    [(1 << 16, "L1"), ((1 << 16) + 2, "L2"), (1 << 21, "L2"), (1 << 22, "memory")],
)
def test_weights_are_shared_out_over_the_cores(size: int, level: str) -> None:
    assert MACHINE.level(size) == level


def test_a_shared_cache_is_not() -> None:
    shared = replace(MACHINE, cache_bytes={"L3": 1 << 20})
    assert shared.level(1 << 20) == "L3"
    assert shared.level((1 << 20) + 1) == "memory"


def test_folder_names() -> None:
    assert slug("AMD EPYC (TM) 9654", threads=2) == "amd-epyc-tm-9654-2-threads"
    epyc = "AMD EPYC, family 25, model 17"
    assert slug(epyc, "avx512_vnni", 2) == "amd-epyc-family25-model17-avx512_vnni-2-threads"
    assert slug(epyc, "avx2", 2) == "amd-epyc-family25-model17-avx2-2-threads"
    assert slug("X", "neon", 1) == "x-neon-1-thread"
    assert slug("NVIDIA H100") == "nvidia-h100"
