"""Settings of the clients' tests, and the tables of their times and of what quantising changes.

`ratio` compares results, then times calls, and keeps a row; `quantised` keeps a row of changes.
`--table FILE` writes all rows into that file, between its markers, once every test has passed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.extension import _C
from fastrnn.hardware import processor
from fastrnn.tools.bench.implementation import Prepared
from fastrnn.tools.bench.measure import interleaved
from tests.clients.support import Client, Quantised, Ratio, Run, change, difference

BEGIN, END = "<!-- make clients -->", "<!-- end -->"
BEGIN_QUANTISED = "<!-- make clients, quantised -->"
SECONDS = 0.6  # of calls of each implementation
# Arguments of `quantize_`, by the column of the table, and how much of a result may change.
FORMATS: dict[str, dict[str, str]] = {
    "int8": {},
    "int16": {"activations": "int16"},
    "bfloat16": {"weights": "bfloat16"},
}
MOST = 0.01
TORCH_AO = "int8 of torch.ao"


@dataclass(frozen=True)
class Row:
    client: Client
    call: str
    error: float
    before: float  # microseconds
    after: float
    baseline: str

    @property
    def ratio(self) -> float:
        return self.before / self.after


@dataclass(frozen=True)
class QuantisedRow:
    client: Client
    what: str
    changes: dict[str, float]  # by column


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)
    quantised: list[QuantisedRow] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [
            "| client | recurrent part | call | largest difference | theirs | fastrnn "
            "| times as fast |",
            "|---|---|---|---|---|---|---|",
        ]
        before = None
        for row in sorted(self.rows, key=lambda row: row.client.distribution.lower()):
            again = row.client == before
            before = row.client
            name = f"{row.client.distribution}{' **W**' if row.client.trained else ''}"
            theirs = micros(row.before) + (f", {row.baseline}" if row.baseline else "")
            ratio = f"{row.ratio:.3g}×"
            cells = [
                "" if again else name,
                "" if again else row.client.part,
                row.call,
                f"{row.error:.1g}",
                theirs,
                micros(row.after),
                ratio if row.ratio >= 1 else f"*{ratio}*",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", f"*{self.conditions()}*"])

    def of_quantised(self) -> str:
        columns = [*FORMATS, TORCH_AO]
        lines = [
            f"| client | result | {' | '.join(columns)} |",
            "|---|---|" + "---|" * len(columns),
        ]
        before = None
        for row in sorted(self.quantised, key=lambda row: row.client.distribution.lower()):
            name = "" if row.client == before else row.client.distribution
            before = row.client
            changes = [f"{100 * row.changes[column]:.2g} %" for column in columns]
            lines.append(f"| {' | '.join([name, row.what, *changes])} |")
        return "\n".join([*lines, "", f"*{self.conditions()}*"])

    def conditions(self) -> str:
        """The device, versions, commit and date of the measurement."""
        clients = [row.client for row in self.rows] + [row.client for row in self.quantised]
        names = sorted({client.distribution for client in clients}, key=str.lower)
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        return (
            f"{processor()} ({_C.isa()}), 1 thread, float32, load average "
            f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores; fastrnn {fastrnn.__version__}, "
            f"torch {torch.__version__}, Python {platform.python_version()}, {versions}; "
            f"commit {told.stdout.strip() or 'unknown'}, {time.strftime('%Y-%m-%d')}"
        )


TABLE = pytest.StashKey[Table]()


def micros(value: float) -> str:
    """A time in the unit that reads best."""
    if value < 1000:
        return f"{value:.3g} µs"
    return f"{value / 1e3:.3g} ms" if value < 1e6 else f"{value / 1e6:.3g} s"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="the page that the table of times is written to")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = Table()


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if table.quantised:
        terminalreporter.write_sep("-", "quantised")
        terminalreporter.write_line(table.of_quantised())
    if table.rows:
        terminalreporter.write_sep("-", "times")
        terminalreporter.write_line(table.markdown())
    if not (table.quantised or table.rows):
        return
    page: Path | None = config.getoption("--table")
    if page is None:
        return
    # A table of some rows would look like the table of all rows.
    left_out = terminalreporter.stats.get("deselected") or terminalreporter.stats.get("skipped")
    if exitstatus != 0 or left_out:
        terminalreporter.write_line(f"{page} stays as it is: not every test was run and passed")
        return
    text = page.read_text()
    text = put(text, BEGIN, table.markdown())
    text = put(text, BEGIN_QUANTISED, table.of_quantised())
    page.write_text(text)
    terminalreporter.write_line(f"{page}: tables rewritten")


def put(text: str, begin: str, table: str) -> str:
    """The text with this table behind the marker."""
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(text), f"the page has no {begin} … {END} to put the table into"
    return pattern.sub(lambda _: f"{begin}\n{table}\n{END}", text, count=1)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialised memory with NaN, as in the other tests. Clients may call functions for
    which torch has no deterministic kernel."""
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    with _poisoned(True):
        yield


@contextlib.contextmanager
def _poisoned(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sets one thread for all clients, because some set it when they are imported."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ratio(request: pytest.FixtureRequest) -> Ratio:
    """`ratio(client, call, torchs, ours, within)`: the speed-up of `ours` over `torchs`.

    Both are functions without arguments. First their results must agree `within` a limit. Then
    blocks of their calls are timed in turn, in inference mode unless `grad=True`. `call` describes
    the call in the table; `baseline` names the baseline if it is not torch.nn.
    """
    table = request.config.stash[TABLE]

    def measure(
        client: Client,
        call: str,
        torchs: Callable[[], Any],
        ours: Callable[[], Any],
        *,
        within: float,
        grad: bool = False,
        baseline: str = "",
    ) -> float:
        mode = torch.enable_grad if grad else torch.no_grad
        with mode():
            error = difference(ours(), torchs(), gradients=grad)
        assert error <= within, f"{call}: {error:.3g} exceeds {within:.3g}"
        with _poisoned(False):
            times = interleaved(
                {
                    name: Prepared(each, lambda result: {}, mode)
                    for name, each in (("torchs", torchs), ("ours", ours))
                },
                SECONDS,
            )
        row = Row(client, call, error, times["torchs"].median, times["ours"].median, baseline)
        table.rows.append(row)
        return row.ratio

    return measure


@pytest.fixture
def quantised(request: pytest.FixtureRequest) -> Quantised:
    """`quantised(client, what, ours, torchs, run)`: how much of the result of `run(model)`, which
    `what` describes, changes when the layers of `ours` are quantised.

    Results are decisions, or numbers with a unit of their own. The change is at most MOST, or
    `most`, by format. The table also has that of `torchs`, quantised by torch.ao. Returns the
    result of `torchs` in float32.
    """
    table = request.config.stash[TABLE]

    def measure(
        client: Client,
        what: str,
        ours: nn.Module,
        torchs: nn.Module,
        run: Run,
        *,
        most: Mapping[str, float] = MappingProxyType({}),
    ) -> Tensor:
        before: Tensor = run(torchs)
        changes = {}
        for format, how in FORMATS.items():
            model = copy.deepcopy(ours)
            report = fastrnn.quantize_(model, **how)
            assert report.quantised
            assert not report.left_alone
            changes[format] = change(run(model), before)
        changes[TORCH_AO] = change(run(_by_torch_ao(torchs)), before)
        row = QuantisedRow(client, what, changes)
        table.quantised.append(row)
        for format in FORMATS:
            assert changes[format] <= most.get(format, MOST), row
        return before

    return measure


def _by_torch_ao(model: nn.Module) -> nn.Module:
    """A copy whose recurrent layers are in int8 by torch.ao."""
    kinds = {nn.LSTM, nn.GRU, nn.LSTMCell}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        made: nn.Module = torch.ao.quantization.quantize_dynamic(model, kinds)
    return made
