"""The cost of `import fastrnn` beyond torch's own import."""

from __future__ import annotations

import json
import subprocess
import sys

import fastrnn
from tests.support.paths import ROOT

MEASURE = """
import json, resource, sys, time
start = time.process_time()
import torch
torchs = time.process_time() - start
before, modules = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, set(sys.modules)
start = time.process_time()
import fastrnn
seconds = time.process_time() - start
mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps([seconds, torchs, mib, sorted(set(sys.modules) - modules)]))
"""


def test_import_is_light() -> None:
    """At most 0.15 s, or on a slow machine an eighth of torch's own import, and 20 MiB; and no
    compiler, which takes ten times as much."""
    runs = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))
    seconds, torchs, mib, modules = (min(values) for values in zip(*runs, strict=True))
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch._aot", "sympy", "triton")
    assert [m for m in modules if m.startswith(heavy)] == []
    late = ("fastrnn.cells.published.", "fastrnn.compiler.", "fastrnn.kernels.gpu.")
    assert [m for m in modules if m.startswith(late)] == []
    others = [m for m in modules if not m.startswith("fastrnn")]
    assert len(others) < 30, others
    assert seconds < max(0.15, torchs / 8)
    assert mib < 20


def test_the_package_shows_its_public_names() -> None:
    shown = dir(fastrnn)
    assert set(shown) == {*fastrnn.__all__, "cells", "kernels", "plan"}
    assert all(hasattr(fastrnn, name) for name in shown)
