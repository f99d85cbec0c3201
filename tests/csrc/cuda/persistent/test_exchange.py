"""The waits of the exchange, as nvcc translates them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from building import cuda as building

from tests.support.paths import CSRC

SOURCE = """
#include "cuda/persistent/exchange.cuh"
using namespace fastrnn;
using One = tile::Exchange<kCluster, false>;
using Two = tile::Exchange<kGrid, true>;
__global__ void waits(One one, Two two, const char** to) {
  to[0] = one.wait(1, true);
  to[1] = two.wait(1, true);
}
"""


@pytest.mark.skipif(building.nvcc() is None, reason="needs nvcc")
@pytest.mark.takes(15)
def test_a_watchdog_looks_at_every_wait(tmp_path: Path) -> None:
    """At flags in global memory, and at barriers in shared memory; a plain build has none."""
    source = tmp_path / "waits.cu"
    source.write_text(SOURCE)
    nvcc = building.nvcc()
    assert nvcc is not None

    def translated(*flags: str) -> str:
        out = tmp_path / "waits.ptx"
        includes = ["-Xcompiler", f"-iquote,{CSRC}"]
        command = [nvcc, "-std=c++17", "-O3", "-ptx", "-arch=compute_90a", *includes, *flags]
        subprocess.run([*command, str(source), "-o", str(out)], check=True)
        return out.read_text()

    plain, watched = translated(), translated("-DFASTRNN_WATCHDOG")
    assert "mbarrier.try_wait" in plain and "ld.acquire.gpu" in plain
    assert "%globaltimer" not in plain and "trap;" not in plain
    assert watched.count("trap;") == 2
    assert watched.count("%globaltimer") == 2 * watched.count("trap;")
