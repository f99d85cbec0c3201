"""The driver of everything that needs a GPU, as far as a machine without one can test it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from building import cpu

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import baseline, exchange, host, prebuild, profiled, results
from benchmarks.gpu.__main__ import Step
from benchmarks.workloads import GPU
from fastrnn.tools.bench.machine import slug
from tests.cudasim.build import missing
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


def collected(*chosen: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", driver.TESTS, "--collect-only", "-q"]
    command += ["-p", "no:cacheprovider", *chosen]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {line for line in ran.stdout.splitlines() if "::" in line}
    assert found, ran.stdout + ran.stderr
    return found


def chosen_by(steps: tuple[Step, ...], option: str) -> list[str]:
    """What follows this option of pytest in the steps that run it."""
    commands = [step.command for step in steps]
    commands = [each[each.index(driver.TESTS) :] for each in commands if driver.TESTS in each]
    return [each[each.index(option) + 1] for each in commands if option in each]


def test_the_parts_leave_no_test_of_the_kernels_out(tmp_path: Path) -> None:
    steps = driver.steps(tmp_path, tmp_path)
    marks, words = chosen_by(steps, "-m"), chosen_by(steps, "-k")
    assert len(marks) == 9
    assert collected("-m", " or ".join(set(marks))) == collected()
    assert collected("-m", "cuda", "-k", " or ".join(words)) == collected("-m", "cuda")


def test_two_calls_with_prebuilt_parts_leave_no_test_out(tmp_path: Path) -> None:
    calls = [driver.steps(tmp_path, tmp_path, call, tmp_path) for call in (1, 2)]
    steps = calls[0] + calls[1]
    assert collected("-m", " or ".join(chosen_by(steps, "-m"))) == collected()
    assert not any(step.name == "build" for step in steps)
    assert len({step.name for step in steps}) == len(steps)


def test_results_are_packed_after_every_step(tmp_path: Path) -> None:
    """The last step looks into the archive of those before it."""
    archive = tmp_path / "all.tar.gz"
    look = f"import tarfile; print(sorted(tarfile.open({str(archive)!r}).getnames()))"
    steps = (Step("works", 1, python("print('said')")), Step("looks", 1, python(look)))
    outcomes = driver.run(steps, tmp_path / "device", 0.2, dict(os.environ), archive)
    assert outcomes[1].last_line == "['device', 'device/run.json', 'device/works.log']"
    with tarfile.open(archive) as packed:
        assert "device/looks.log" in packed.getnames()
        log = packed.extractfile("device/works.log")
        assert log is not None and log.read() == b"said\n"


def test_the_summary_is_short_and_shows_what_failed(tmp_path: Path) -> None:
    steps = (
        Step("times", 1, python("print('one row\\n' * 9999, 'the table')")),
        Step("broken", 1, python("print('a reason'); raise SystemExit(1)")),
        Step("fine", 1, python("print('a word')")),
    )
    outcomes = driver.run(steps, tmp_path, 0.2, dict(os.environ))
    said = driver.summary(outcomes, tmp_path)
    assert "the table" in said and "broken:\na reason" in said and "fine:" not in said
    assert "| fine | passed |" in said
    assert 5000 < len(said) < 12_000


def test_prebuilt_parts_and_calls_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--prebuilt", "."], ["--call", "1"]):
        with pytest.raises(SystemExit):
            driver.main(given)
        assert "--prebuilt and --call come together" in capsys.readouterr().err


def test_parts_for_another_machine_are_compiled_for_its_torch_and_python(tmp_path: Path) -> None:
    wheel = tmp_path / "torch.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in ("include/ATen/ATen.h", "lib/libc10.so", "lib/libtorch_cuda.so", "_C.so"):
            made.writestr(f"torch/{name}", "")
        made.writestr("torch/version.py", "__version__ = '2.11.0+cu130'\n")
    (tmp_path / "prefix" / "include" / "python3.12").mkdir(parents=True)
    torch_there = prebuild.unpacked(wheel, tmp_path / "out")
    found = {path.name for path in torch_there.rglob("*.*")}
    assert found == {"ATen.h", "libc10.so", "version.py"}
    target, name = prebuild.target_of(torch_there, tmp_path / "prefix")
    assert name == "_C.torch2.11.cpython-312-x86_64-linux-gnu.so"
    text = cpu.ninja_file(tmp_path, target)
    assert '-DFASTRNN_TORCH_VERSION="2.11.0+cu130"' in text and "-std=c++17" in text
    assert f"-isystem {tmp_path}/prefix/include/python3.12" in text
    assert f"-L{torch_there}/lib" in text and torch.__file__.rpartition("/")[0] not in text


def test_cost_on_the_host(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    with host.stub():
        rows = list(host.rows("cpu", calls=60))
    assert [(row["cell"], row["mode"]) for row in rows[:2]] == [
        ("LSTM", "inference"),
        ("LSTM", "forward and backward"),
    ]
    for row in rows:
        parts = row["layer, operator, plan"], row["memory and products"], row["launch"]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(row["by Python"], abs=0.2)
        assert row["us"] > 0
    assert "torch.nn" in host.table(rows)
    for name in ("host.md", "host.json"):
        host.save(tmp_path / name, rows, "cpu")
    assert host.table(rows) in (tmp_path / "host.md").read_text()
    assert json.loads((tmp_path / "host.json").read_text())["rows"] == rows


def test_times_try_themselves_without_a_gpu(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    path = tmp_path / "times.json"
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.times", str(path)],
        env={**os.environ, "FASTRNN_SECONDS": "60"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["part"] for row in rows} == {"layer", "kernel", "short"}
    assert not any("error" in row for row in rows)
    assert {row["residency"] for row in rows if row["part"] == "kernel"} == {
        *("step", "block", "cluster", "grid")
    }
    assert "| part | way | number |" in ran.stdout


def test_what_a_profiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["profiled", "2", "8", "3"])
    assert profiled.main("cpu") == 0


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
