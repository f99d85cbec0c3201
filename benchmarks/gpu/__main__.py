"""Build, test and measure on the GPU of this machine.

    python -m benchmarks.gpu [--out FOLDER] [--minutes 20] [--only tests-cuda-block,suite]
    python -m benchmarks.gpu --prebuilt FOLDER --call 1 --archive FILE.tar.gz

The steps run in order, each in a process of its own that is stopped when its time is up, so none
takes another down. If the build fails, no step follows. Results go to one folder, FOLDER/<device>,
at once: run.json says how each step ended, the other JSON files hold measurements, and NAME.log
holds what the step NAME printed.

The second form is for a machine that is lent for minutes, without a compiler: it runs what
benchmarks/gpu/prebuild.py compiled elsewhere. Its steps make two calls of this command, the more
important ones first. After each step it writes all results so far to one archive, and at the end
it prints them as tables.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu import results

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("ninja", "numpy", "pytest", "pytest_benchmark", "setuptools", "triton")
TESTS = "tests/kernels/gpu/test_on_a_gpu.py"
RESIDENCIES = ("step", "block", "cluster", "grid")  # of the CUDA kernels
PATIENCE = 20  # seconds to wait for a killed process to be gone: the GPU may hold it


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        share: the part of the remaining time that it may take, in proportion to later shares.
        needs: a program; without it the step is skipped.
    """

    name: str
    share: float
    command: tuple[str, ...]
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "out of time" or "skipped"."""

    name: str
    status: str
    seconds: float
    command: str
    last_line: str  # of its output


def steps(
    folder: Path, out: Path, call: int | None = None, prebuilt: Path | None = None
) -> tuple[Step, ...]:
    """All steps, in order, or those of a call with prebuilt parts."""
    python = sys.executable

    def tests(
        name: str, share: float, chosen: Sequence[str], before: Sequence[str] = (), needs: str = ""
    ) -> Step:
        pytest = [python, "-m", "pytest", TESTS, "-v", "-p", "no:cacheprovider", *patience()]
        pytest += [f"--junitxml={folder / name}.xml", *chosen]
        return Step(name, share, (*before, *pytest), needs or None)

    def sanitizer(tool: str) -> tuple[str, ...]:
        # Each tensor gets an allocation of its own, so that an access past its end hits no other
        # tensor unnoticed. Some calls of CUDA's API fail in every process of torch, which probes.
        command = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool)
        return (*command, "--report-api-errors", "no", "--error-exitcode", "9")

    def module(name: str, *more: str) -> tuple[str, ...]:
        return (python, "-m", f"benchmarks.gpu.{name}", str(folder / f"{name}.json"), *more)

    suite = [python, "-m", "pytest", "benchmarks", "--device", "cuda", "-q", "--benchmark-quiet"]
    if call is not None:
        return _calls(folder, prebuilt, tests, sanitizer, module)[call]
    return (
        # One source of the kernels compiles for minutes, on any number of processors.
        Step("build", 30, (python, "setup.py", "--quiet", "build_ext", "--inplace")),
        tests("first", 4, ("-m", "first")),
        *(
            tests(f"tests-cuda-{each}", 2, ("-m", "cuda", "-k", each, *workers(8)))
            for each in RESIDENCIES
        ),
        tests("tests-triton", 4, ("-m", "triton", *workers(8))),
        tests("tests-whole", 4, ("-m", "whole", *workers(4))),
        Step("host", 1, module("host")),
        Step("exchange", 1, module("exchange"), "nvcc"),
        tests("memcheck", 2, ("-m", "small"), sanitizer("memcheck"), "compute-sanitizer"),
        tests("racecheck", 2, ("-m", "small"), sanitizer("racecheck"), "compute-sanitizer"),
        Step("times", 4, module("times")),
        Step("baseline", 3, module("baseline")),
        Step("suite", 6, (*suite, "-p", "no:cacheprovider", "--results", str(out))),
    )


def patience() -> list[str]:
    """Options of pytest by which a test that hangs takes its own minute alone."""
    if importlib.util.find_spec("pytest_timeout") is None:
        return []
    return ["--timeout", "60", "--timeout-method", "thread"]


def workers(count: int) -> list[str]:
    """Options of pytest for several processes, which share the GPU: most time goes into compiling
    Triton's kernels and into references on the CPU."""
    count = min(count, os.cpu_count() or 1)
    return ["-n", str(count)] if count > 1 and importlib.util.find_spec("xdist") else []


def _calls(
    folder: Path,
    prebuilt: Path | None,
    tests: Callable[..., Step],
    sanitizer: Callable[[str], tuple[str, ...]],
    module: Callable[..., tuple[str, ...]],
) -> dict[int, tuple[Step, ...]]:
    """The steps of the two calls."""
    program = str((prebuilt or Path()) / "exchange")
    info = (sys.executable, "-m", "fastrnn", "info")
    sections = ("SpeedOfLight", "WarpStateStats", "SchedulerStats", "SourceCounters")
    ncu = (
        *("ncu", "--clock-control", "none", "-k", "regex:persistent_", "-s", "2", "-c", "2"),
        *(part for name in sections for part in ("--section", name)),
        *(sys.executable, "-m", "benchmarks.gpu.profiled"),
    )
    return {
        1: (
            Step("info", 2, info),
            tests("first", 6, ("-m", "first", *workers(3))),
            Step("host", 2, module("host")),
            Step("exchange", 2, module("exchange", program)),
            tests("tests-cuda", 9, ("-m", "cuda", "--maxfail", "40", *workers(8))),
            Step("times", 13, module("times")),
        ),
        2: (
            Step("ncu-16x256", 4, (*ncu, "16", "256", "256"), "ncu"),
            Step("ncu-64x1024", 4, (*ncu, "64", "1024", "128"), "ncu"),
            tests("tests-whole", 7, ("-m", "whole", *workers(4))),
            tests("tests-triton", 9, ("-m", "triton", *workers(8))),
            tests("memcheck", 6, ("-m", "small"), sanitizer("memcheck"), "compute-sanitizer"),
        ),
    }


def run(
    chosen: Sequence[Step],
    folder: Path,
    minutes: float,
    environment: dict[str, str],
    archive: Path | None = None,
) -> list[Outcome]:
    """Run the steps one after the other, and save all outcomes after each, also to the archive."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for k, step in enumerate(chosen):
        later = sum(each.share for each in chosen[k:])
        allowed = max(1.0, (end - time.monotonic()) * step.share / later)
        print(f"{step.name}: {allowed:.0f} s at most ...", flush=True)
        outcomes.append(_run(step, folder, allowed, environment))
        print(f"{step.name}: {outcomes[-1].status}; {outcomes[-1].last_line}", flush=True)
        results.save(folder / "run.json", [asdict(each) for each in outcomes])
        if archive is not None:
            results.pack(folder, archive)
        if step.name == "build" and outcomes[-1].status != "passed":
            print(f"nothing can run without it: see {folder / 'build.log'}", file=sys.stderr)
            break
    return outcomes


def _run(step: Step, folder: Path, allowed: float, environment: dict[str, str]) -> Outcome:
    command, log = shlex.join(step.command), folder / f"{step.name}.log"
    if step.needs and not shutil.which(step.needs, path=environment.get("PATH")):
        return Outcome(step.name, "skipped", 0, command, f"{step.needs} is not installed")
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**environment, "FASTRNN_SECONDS": f"{allowed:.0f}"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(allowed) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            # This ends all processes of the step, also one whose kernel hangs.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(
        step.name,
        status,
        round(time.monotonic() - begin, 1),
        command,
        lines[-1][:300] if lines else "it printed nothing",
    )


_MOST = 11_000  # characters: more may not come back from a machine that is lent


def summary(outcomes: Sequence[Outcome], folder: Path) -> str:
    """How the steps ended, and the last lines of those that measure or failed."""
    lines = ["| step | status | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds} | {o.last_line[:100]} |" for o in outcomes]
    text = "\n".join(lines)
    shown = [o for o in outcomes if o.name in ("times", "host") or o.status != "passed"]
    for outcome in shown:
        log = folder / f"{outcome.name}.log"
        if log.exists():
            share = (_MOST - len(text)) // len(shown)
            text += f"\n\n{outcome.name}:\n{log.read_text(errors='replace')[-share:].strip()}"
    return text


def folder_of(device: str) -> str:
    """As `fastrnn.tools.bench.machine.slug`, which cannot be imported before the build."""
    return re.sub(r"\W+", "-", device.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if no step failed, 1 if one did, 2 if there is no GPU or a package is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").split("\n\n")[0],
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=20, help="for all steps together")
    parser.add_argument("--only", metavar="NAMES", help="these steps, with commas between")
    parser.add_argument("--prebuilt", type=Path, help="the folder of benchmarks/gpu/prebuild.py")
    parser.add_argument("--call", type=int, choices=(1, 2), help="with prebuilt parts: which steps")
    parser.add_argument("--archive", type=Path, help="write all results to this .tar.gz, too")
    parser.add_argument("--without-gpu", action="store_true", help="try the steps without a GPU")
    given = parser.parse_args(argv)
    if (given.call is None) != (given.prebuilt is None):
        parser.error("--prebuilt and --call come together")
    known = [step.name for step in steps(Path(), Path(), given.call, given.prebuilt)]
    wanted = given.only.split(",") if given.only else known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"no step {', '.join(unknown)}; there are: {', '.join(known)}")

    import torch

    there = torch.cuda.is_available()
    if not there and not given.without_gpu:
        print("benchmarks.gpu: there is no GPU that torch can use", file=sys.stderr)
        return 2
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"benchmarks.gpu: these packages are missing: {', '.join(missing)}", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability() if there else (9, 0)
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    paths = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in toolkits if home)]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",  # the log of a stopped step should be complete
        "FASTRNN_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        # torch asks for this if results must not differ from run to run.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    out = given.out.resolve()
    folder = out / folder_of(torch.cuda.get_device_name() if there else "no gpu")
    chosen = steps(folder, out, given.call, given.prebuilt and given.prebuilt.resolve())
    chosen = tuple(step for step in chosen if step.name in wanted)
    outcomes = run(chosen, folder, given.minutes, environment, given.archive)
    print(summary(outcomes, folder))
    print(f"results are in {folder}")
    built = not any(each.name == "build" and each.status != "passed" for each in outcomes)
    return int(not built or any(each.status == "failed" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
