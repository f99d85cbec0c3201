"""Launches as CUDA's runtime sees them: a stand-in of the runtime writes down what it is asked."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.cudasim.build import CXX, cuda_headers
from tests.support.paths import CSRC

pytestmark = pytest.mark.skipif(cuda_headers() is None, reason="needs the headers of CUDA")


@functools.cache
def program() -> Path:
    made = Path(tempfile.mkdtemp()) / "launch"
    source = Path(__file__).with_name("launch.cpp")
    command = [*CXX.split(), "-std=c++17", "-w", "-iquote", str(CSRC), "-isystem"]
    command += [str(cuda_headers()), str(source), "-pthread", "-o", str(made)]
    subprocess.run(command, check=True)
    return made


def said(compiled_for: int, driver_error: int = 0) -> list[str]:
    command = [str(program()), str(compiled_for), str(driver_error)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_attributes_are_set_once_for_a_kernel_and_a_device() -> None:
    """Two kernels on one device, one on a second, too; eight threads ask at the same time."""
    assert said(90) == [
        "launched 0",
        "launched overlaps 0",
        "launched cluster 0",
        "clusters 7",
        "facts 0 90, left over 0",
        "launched 0",
        "launched 0",
        "set 3, asked 3",
        "capturing 0 0, left over 0",
        "capturing 1 1, left over 0",
    ]


def test_code_of_an_older_target_has_no_clusters_and_does_not_overlap() -> None:
    """It is compiled from PTX for a newer GPU, and lacks the instructions that wait."""
    plain, overlapping, cluster, resident, facts, *_ = said(80)
    assert plain == overlapping == "launched 0"
    assert cluster == "refused 801"  # cudaErrorNotSupported
    assert resident == "clusters 0"
    assert facts == "facts 0 80, left over 0"


@pytest.mark.parametrize("error", [35, 209])
def test_an_error_of_the_driver_ends_a_launch_and_is_not_left_over(error: int) -> None:
    lines = said(0, error)
    assert lines[:3] == [f"refused {error}"] * 3
    assert lines[3] == f"clusters -{error}"
    assert lines[4] == f"facts {error} 0, left over 0"
    assert lines[-3].startswith("set 0,")
