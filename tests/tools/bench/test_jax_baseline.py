"""JAX gives the results of torch.nn."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastrnn.tools.bench.jax_baseline import Jax
from fastrnn.tools.bench.workload import CELLS
from tests.support.bench import SHAPES, STREAMED, agrees
from tests.support.paths import ROOT


def jax_agrees() -> None:
    for cell in CELLS:
        for mode in ("inference", "training"):
            for shape in ("one layer", "stack"):
                agrees(Jax(), SHAPES[shape], cell, mode)
        agrees(Jax(), STREAMED, cell, "step")


def test_jax_agrees() -> None:
    if reason := Jax().available():
        pytest.skip(reason)
    # JAX's threads outlive the test, and other tests fork, which a process with them must not.
    script = "from tests.tools.bench.test_jax_baseline import jax_agrees; jax_agrees()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
