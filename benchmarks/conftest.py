"""Options, progress and results of the suite.

    python -m pytest benchmarks                    the short form, a few minutes
    python -m pytest benchmarks --full             every workload
    python -m pytest benchmarks --full -k speech   some workloads; other rows stay as they are
    python -m pytest benchmarks --device cuda      the workloads of a GPU, the most important first

Results go to benchmarks/results/<machine>/suite.json. `python -m benchmarks.report` makes tables
and plots from them. The other options of pytest-benchmark (--benchmark-save, --benchmark-compare)
work on our own times.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.workloads import GPU, SMOKE, WORKLOADS
from fastrnn.tools.bench import machine, store
from fastrnn.tools.bench.comparison import Row

RESULTS = Path(__file__).parent / "results"
BAR = 24


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("fastrnn")
    options.addoption("--full", action="store_true", help="every workload")
    options.addoption("--smoke", action="store_true", help="a few tiny workloads, for tests")
    options.addoption("--seconds", type=float, default=0.1, help="of calls of each implementation")
    options.addoption("--latency-calls", type=int, default=100_000, help="single steps timed")
    options.addoption("--threads", type=int, help="default: as many as torch would take")
    options.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    options.addoption("--results", type=Path, default=RESULTS, help="folder of all machines")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU that torch can use")
    config.pluginmanager.register(Progress(config), "fastrnn-progress")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each workload, cell and mode of the chosen form."""
    option = metafunc.config.getoption
    chosen = SMOKE if option("smoke") else WORKLOADS
    if option("device") == "cuda" and not option("smoke"):
        chosen = GPU
    elif not (option("smoke") or option("full")):
        chosen = tuple(replace(w, compiled_loop=False) for w in WORKLOADS if w.quick)
    if {"workload", "cell", "mode"} <= set(metafunc.fixturenames):
        rows = [(w, cell, mode) for w in chosen for mode in w.modes for cell in w.cells]
        names = [f"{w.name}-{cell}-{mode}" for w, cell, mode in rows]
        metafunc.parametrize(("workload", "cell", "mode"), rows, ids=names)


@pytest.fixture(scope="session")
def here(pytestconfig: pytest.Config) -> machine.Machine:
    """This machine, measured once with the number of threads of the run."""
    if threads := pytestconfig.getoption("threads"):
        torch.set_num_threads(threads)
    return machine.measure(pytestconfig.getoption("device"))


@pytest.fixture(scope="session")
def keep(pytestconfig: pytest.Config, here: machine.Machine) -> Callable[[Row], None]:
    """Writes a row into the results at once, so that a run that is cut short loses none."""
    device = pytestconfig.getoption("device")
    command = f"python -m pytest {shlex.join(map(str, pytestconfig.invocation_params.args))}"
    run = store.conditions(here, command, device)
    results = pytestconfig.getoption("results")
    on_gpu = device == "cuda"
    folder = results / machine.slug(run.device) if on_gpu else store.folder(results, here.threads)
    path = folder / "suite.json"
    order = [w.name for w in (*WORKLOADS, *GPU)]
    return store.Kept(path, run, order, Row.from_json).keep


class Progress:
    """Prints a line for each measured row, with a bar and the remaining time."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._begin = time.monotonic()
        self._done = self._all = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._all = len(session.items)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> object:
        # The lines of pytest_runtest_logreport take the place of pytest's dots.
        return ("passed", "", "") if report.passed and report.when == "call" else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        self._done += 1
        full = BAR * self._done // self._all
        left = (time.monotonic() - self._begin) / self._done * (self._all - self._done)
        summary = dict(report.user_properties).get("summary", report.outcome)
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(
            f"{'█' * full}{'·' * (BAR - full)} {self._done}/{self._all}, "
            f"{left // 60:.0f}:{left % 60:02.0f} left  {summary}"
        )
