"""The suite and its report from end to end. No test asserts a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report, workloads
from fastrnn.tools.bench import store
from tests.support.paths import ROOT


def test_the_suite_and_its_report(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    arguments = ["--smoke", "--seconds", "0.001", "--latency-calls", "100", "--threads", "1"]
    arguments += ["--benchmark-quiet", "-p", "no:cacheprovider", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*/suite.json")
    values = json.loads(file.read_text())
    wanted = sum(len(w.modes) * len(w.cells) for w in workloads.SMOKE)
    assert len(values["rows"]) == wanted
    assert f"{wanted}/{wanted}" in done.stdout
    (run,) = values["runs"]
    assert run["machine"]["threads"] == 1 and "--smoke" in run["command"]
    assert set(run["machine"]["bandwidth"]) >= {"memory"}
    results = store.load(file)
    for found, _ in results.rows:
        assert found.ours.kind == "ours" and found.roofline > 0
        assert {"torch.nn"} <= {e.name for e in found.entries} | set(found.refused)
        for e in found.entries:
            assert 0 < e.p20 <= e.median <= e.p80
            assert e.error < 1e-3
    streamed = next(r for r, _ in results.rows if r.mode == "step")
    assert streamed.ours.latency and streamed.ours.latency.calls >= 100
    assert [v.status for v in streamed.verdicts] == ["not measured"]

    readme, docs = tmp_path / "README.md", tmp_path / "benchmarks.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    docs.write_text(f"{report.BEGIN}\n{report.END}\n{report.BEGIN_LOSSES}\n{report.END}\n")
    html = tmp_path / "page.html"
    written = ["--readme", str(readme), "--docs", str(docs), "--html", str(html)]
    report.main([str(file.parent), *written])
    assert "| smoke-layer (5, 2, 3, 8) |" in docs.read_text()
    assert "smoke-layer" not in readme.read_text() and "| T, B, I, H |" in readme.read_text()
    text = html.read_text()
    assert text.count("<details ") == wanted
    assert not re.search(r"(?:src|href)=\"(?!#)", text), "the page needs something else"
    for found, _ in results.rows:
        for name, reason in found.refused.items():
            assert f"Not {name}" in text and reason.split("'")[0] in text
