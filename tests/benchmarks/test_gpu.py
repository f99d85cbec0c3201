"""The driver of everything that needs a GPU, as far as a machine without one can test it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import baseline, exchange, results
from benchmarks.gpu.__main__ import Step
from benchmarks.workloads import GPU
from fastrnn.tools.bench.machine import slug
from tests.support.paths import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_so_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.main(["--only", "build,nonsense"])
    assert "no step nonsense; there are: build, first" in capsys.readouterr().err


def test_folders_are_named_as_those_of_the_suite() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert driver.folder_of(name) == slug(name) == "nvidia-h100-80gb-hbm3"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_steps_survive_each_other(tmp_path: Path) -> None:
    steps = (
        Step("dies", 9, python("import os; print('a last word'); os.kill(os.getpid(), 9)")),
        Step("hangs", 0.01, python("import time; time.sleep(999)")),  # its share is a second
        Step("absent", 1, ("true",), needs="no-such-program"),
        Step("works", 9, python("import os; print(int(os.environ['FASTRNN_SECONDS']) > 1)")),
    )
    outcomes = driver.run(steps, tmp_path / "device", 10, dict(os.environ))
    assert [each.status for each in outcomes] == ["failed", "out of time", "skipped", "passed"]
    assert outcomes[0].last_line == "a last word"
    assert outcomes[3].last_line == "True"
    kept = json.loads((tmp_path / "device" / "run.json").read_text())["rows"]
    assert [row["name"] for row in kept] == ["dies", "hangs", "absent", "works"]
    assert (tmp_path / "device" / "dies.log").read_text() == "a last word\n"


def test_nothing_follows_a_build_that_fails(tmp_path: Path) -> None:
    steps = (Step("build", 1, python("raise SystemExit(1)")), Step("works", 1, python("")))
    outcomes = driver.run(steps, tmp_path, 10, dict(os.environ))
    assert [each.name for each in outcomes] == ["build"]


def test_what_a_step_writes_can_be_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": 1.5, "kernels": ["x"]}, {"a": None}]
    results.save(tmp_path / "new" / "rows.json", rows, {"device": "some"})
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == {
        "conditions": {"device": "some"},
        "rows": rows,
    }
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_the_parts_leave_no_test_of_the_kernels_out(tmp_path: Path) -> None:
    def collected(*chosen: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", driver.TESTS, "--collect-only", "-q"]
        command += ["-p", "no:cacheprovider", *chosen]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = {line for line in ran.stdout.splitlines() if "::" in line}
        assert found, ran.stdout + ran.stderr
        return found

    def chosen(option: str) -> list[str]:
        commands = [step.command for step in driver.steps(tmp_path, tmp_path)]
        commands = [each[each.index(driver.TESTS) :] for each in commands if driver.TESTS in each]
        return [each[each.index(option) + 1] for each in commands if option in each]

    assert len(chosen("-m")) == 9
    assert collected("-m", " or ".join(set(chosen("-m")))) == collected()
    assert collected("-m", "cuda", "-k", " or ".join(chosen("-k"))) == collected("-m", "cuda")


def test_cases_of_the_baseline_are_possible_and_begin_with_the_targets() -> None:
    cases = list(baseline.cases())
    assert len(cases) == len({str(case) for case in cases})
    assert cases[0] == ("lstm", 16, 256, "bfloat16", {})
    for _, batch, hidden, number, rest in cases:
        baseline.workload(batch, hidden, number, rest)  # raises for an impossible one


def test_workloads_of_the_gpu() -> None:
    assert len({w.name for w in GPU}) == len(GPU)
    assert {w.dtype for w in GPU} == {"float32", "bfloat16", "float16"}
    assert any(w.lengths and w.steps == 1000 for w in GPU)
    assert any(w.bidirectional for w in GPU)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_exchange_compiles(architecture: str, tmp_path: Path) -> None:
    program = tmp_path / "exchange"
    command = exchange.compile_command(architecture, program)
    compiled = subprocess.run(
        [*command, "-Xptxas", "-warn-spills"], capture_output=True, text=True, timeout=600
    )
    assert compiled.returncode == 0, compiled.stderr
    assert "spill" not in compiled.stderr.lower(), compiled.stderr
    if not torch.cuda.is_available():
        assert subprocess.run([str(program)], capture_output=True).returncode == 2
