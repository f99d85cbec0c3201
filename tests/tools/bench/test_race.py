"""The benchmark: what it counts, that its gate can fail, that rivals compute the same, and that the
suite and its report work from end to end. No test asserts a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn
from benchmarks import report, workloads
from fastrnn import __main__
from fastrnn.tools.bench import measure, race, store
from fastrnn.tools.bench.contender import Case, CompiledLoop, Contender, Prepared, TorchLayer
from fastrnn.tools.bench.jax_rival import Jax
from fastrnn.tools.bench.machine import Machine, slug
from fastrnn.tools.bench.onnx_rivals import OnnxRuntime, OpenVino
from fastrnn.tools.bench.race import Entry, Row, Verdict
from fastrnn.tools.bench.workload import BEST_RIVAL, CELLS, MICROSECONDS, PEAK, Target, Workload
from tests.support.paths import ROOT

MACHINE = Machine(
    threads=2,
    gflops={"torch.mm": 50.0, "oneDNN": 100.0},
    bandwidth={"L1": 400.0, "L2": 200.0, "memory": 20.0},
    cache_bytes={"L1": 1 << 15, "L2": 1 << 20},
)
SMALL = Workload("small", 5, 2, 3, 8, rivals=("torch.nn",))


def here() -> Machine:
    """`MACHINE` with the threads the tests run with, so that none are started."""
    return replace(MACHINE, threads=torch.get_num_threads())


def run(workload: Workload, mode: str, rivals: Sequence[Contender], cell: str = "lstm") -> Row:
    return race.run(workload, cell, mode, here(), seconds=1e-4, rivals=rivals)[0]


# What is counted


def test_flops_and_weight_reads_by_hand() -> None:
    work = Workload("w", steps=10, batch=3, inputs=5, hidden=7, layers=2, bidirectional=True)
    first, second = 2 * (4 * 7) * (5 + 7) * 2, 2 * (4 * 7) * (14 + 7) * 2
    assert work.flops("lstm", "inference") == 30 * (first + second)
    assert work.flops("lstm", "training") == 3 * 30 * (first + second)
    assert work.weight_reads("gru", "inference") == (20, 2 * 3 * 7 * 7 * 4)
    assert work.weight_reads("gru", "training") == (40, 2 * 3 * 7 * 7 * 4)
    step = replace(work, steps=1, layers=1, bidirectional=False, dtype="bfloat16")
    assert step.weight_reads("rnn", "step") == (1, 7 * (5 + 7) * 2)


def test_packed_rows_count_without_padding() -> None:
    work = Workload("w", 5, 3, 4, 8, lengths=(5, 2, 1))
    assert work.rows == 8
    assert work.flops("rnn", "inference") == 8 * 2 * 8 * 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"layers": 0},
        {"dtype": "int8"},
        {"modes": ("train",)},
        {"lengths": (5, 5)},
        {"lengths": (2, 5, 1)},
        {"lengths": (4, 2, 1)},
    ],
)
def test_impossible_workloads_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Workload("w", 5, 3, 4, 8).changed(wrong)


def test_the_floor_is_the_slower_of_arithmetic_and_reading() -> None:
    assert MACHINE.floor(10**8, 1, 1000).microseconds == pytest.approx(1000)
    assert MACHINE.floor(10**8, 1, 1000).by == "sgemm peak"
    # 2^17 bytes, half of them a core: in L2 at 200 GB/s.
    assert MACHINE.floor(1, 100, 1 << 17).microseconds == pytest.approx(65.536)
    assert MACHINE.floor(1, 100, 1 << 17).by == "L2 bandwidth"


@pytest.mark.parametrize(
    ("size", "level"),
    [(1 << 16, "L1"), ((1 << 16) + 2, "L2"), (1 << 21, "L2"), (1 << 22, "memory")],
)
def test_weights_are_shared_out_over_the_cores(size: int, level: str) -> None:
    assert MACHINE.level(size) == level


def test_a_shared_cache_is_not() -> None:
    shared = replace(MACHINE, cache_bytes={"L3": 1 << 20})
    assert shared.level(1 << 20) == "L3"
    assert shared.level((1 << 20) + 1) == "memory"


def test_folder_names() -> None:
    assert slug("AMD EPYC (TM) 9654", 2) == "amd-epyc-tm-9654-2-threads"
    assert slug("X", 1) == "x-1-thread"
    assert slug("NVIDIA H100") == "nvidia-h100"


# Targets


def entry(name: str, kind: str, median: float) -> Entry:
    return Entry(name, kind, median, median / 2, median * 2, blocks=9, calls=3, error=1e-7)


def row(*entries: Entry, **changes: object) -> Row:
    values: dict[str, object] = {
        "workload": "w",
        "group": "layers",
        "about": "",
        "cell": "lstm",
        "mode": "inference",
        "threads": 2,
        "device": "cpu",
        "dtype": "float32",
        "steps": 10,
        "batch": 1,
        "inputs": 8,
        "hidden": 8,
        "layers": 1,
        "bidirectional": False,
        "rows": 10,
        "flops": 10**6,
        "floor": 10.0,
        "floor_by": "sgemm peak",
        "entries": entries,
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


ROW = row(
    entry("fastrnn", "ours", 100.0),
    entry("fastrnn, 1 thread", "variant", 60.0),
    entry("torch.nn", "rival", 300.0),
    entry("JAX", "rival", 200.0),
)


@pytest.mark.parametrize(
    ("against", "bound", "value", "status"),
    [
        (BEST_RIVAL, 2, 2, "reached"),
        (BEST_RIVAL, 2.04, 2, "within noise"),
        (BEST_RIVAL, 2.1, 2, "missed"),
        ("torch.nn", 3, 3, "reached"),
        ("fastrnn, 1 thread", 1.7, 0.6, "missed"),
        ("ONNX Runtime", 2, None, "not measured"),
        (PEAK, 0.1, 0.1, "reached"),
        (PEAK, 0.2, 0.1, "missed"),
        (MICROSECONDS, 100, 100, "reached"),
        (MICROSECONDS, 98, 100, "within noise"),
        (MICROSECONDS, 90, 100, "missed"),
    ],
)
def test_verdicts(against: str, bound: float, value: float | None, status: str) -> None:
    (verdict,) = race.judge(ROW, Target.all("inference", against, bound), peak=100)
    assert verdict == Verdict(against, bound, pytest.approx(value) if value else None, status)


def test_no_bound_no_verdict() -> None:
    assert race.judge(ROW, Target("inference", BEST_RIVAL, None, 1, 1), peak=100) == []


def test_variants_are_no_rivals() -> None:
    assert [e.name for e in ROW.rivals] == ["JAX", "torch.nn"]
    assert ROW.speedup() == 2
    assert ROW.speedup("torch.nn") == 3
    assert row(entry("fastrnn", "ours", 1.0)).speedup() is None


# The gate


class Scaled(nn.Module):
    """A layer whose output is off by a factor."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, *args: object) -> object:
        output, states = self.layer(*args)
        return output * self.factor, states


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize("mode", ["inference", "step"])
def test_wrong_results_of_ours_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, factor: float, mode: str
) -> None:
    wrong = TorchLayer("fastrnn", lambda layer: Scaled(fastrnn.from_torch(layer), factor))
    monkeypatch.setattr(race, "OURS", (wrong,))
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("timed"))
    work = replace(SMALL, steps=1, modes=("step",)) if mode == "step" else SMALL
    with pytest.raises(race.GateFailed, match="output of fastrnn is off from float64"):
        run(work, mode, ())


def test_wrong_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_of_the_gradient(layer: nn.Module) -> nn.Module:
        ours = fastrnn.from_torch(layer)
        ours.register_forward_hook(
            lambda *call: ((call[2][0] + call[2][0].detach()) / 2, call[2][1])
        )
        return ours

    monkeypatch.setattr(race, "OURS", (TorchLayer("fastrnn", half_of_the_gradient),))
    with pytest.raises(race.GateFailed, match="gradient of x"):
        run(SMALL, "training", ())


class Crashing:
    name = "torch.nn"

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case) -> Prepared:
        raise RuntimeError("out of luck\nat length")


class Absent(Crashing):
    def available(self) -> str | None:
        return "not installed: pip install it"


@pytest.mark.parametrize(
    ("rival", "reason"),
    [
        (TorchLayer("torch.nn", lambda m: Scaled(m, 1.5)), "results are off: small"),
        (Crashing(), "failed: RuntimeError: out of luck"),
        (Absent(), "not installed: pip install it"),
    ],
)
def test_rivals_that_cannot_be_timed_are_named_with_the_reason(
    rival: Contender, reason: str
) -> None:
    found = run(SMALL, "inference", (rival,))
    assert reason in found.refused["torch.nn"]
    assert "length" not in found.refused["torch.nn"]
    assert found.entry("torch.nn") is None and found.ours.name == "fastrnn"


# Rivals compute what torch.nn computes

SHAPES = {
    "one layer": Workload("w", 6, 3, 5, 8),
    "stack": Workload("w", 6, 3, 5, 8, layers=2, bidirectional=True),
    "packed": Workload("w", 6, 3, 5, 8, layers=2, bidirectional=True, lengths=(6, 4, 1)),
}


def agrees(rival: Contender, work: Workload, cell: str, mode: str) -> None:
    """The gate takes it, and it looked at everything the rival returns."""
    case = Case.build(work, cell, mode, torch.get_num_threads())
    assert rival.supports(case) is None
    prepared = rival.prepare(case)
    error, _ = race._Gate(case).check(rival.name, prepared)
    assert error < 1e-5
    with prepared.around():
        results = prepared.read(prepared.call())
    wanted = {"output"} if mode == "step" else {"output", "h_n"}
    wanted |= {"c_n"} if cell == "lstm" and mode != "step" else set()
    if mode == "training":
        parameters = [name for name, _ in case.module.named_parameters()]
        wanted |= {f"gradient of {name}" for name in ("x", *parameters)}
    assert set(results) == wanted


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rival", [OnnxRuntime(), OpenVino()], ids=lambda r: r.name)
def test_onnx_rivals_agree(rival: Contender, shape: str, cell: str) -> None:
    if reason := rival.available():
        pytest.skip(reason)
    agrees(rival, SHAPES[shape], cell, "inference")


STREAMED = Workload("w", 1, 2, 5, 8, modes=("step",))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rival", [OnnxRuntime(), OpenVino()], ids=lambda r: r.name)
def test_streaming_rivals_carry_the_state(rival: Contender, cell: str) -> None:
    if reason := rival.available():
        pytest.skip(reason)
    agrees(rival, STREAMED, cell, "step")


def jax_agrees() -> None:
    for cell in CELLS:
        for mode in ("inference", "training"):
            for shape in ("one layer", "stack"):
                agrees(Jax(), SHAPES[shape], cell, mode)
        agrees(Jax(), STREAMED, cell, "step")


def test_jax_agrees() -> None:
    if reason := Jax().available():
        pytest.skip(reason)
    # Its threads outlive a test, and a process that has them must not fork, as other tests do.
    script = "from tests.tools.bench.test_race import jax_agrees; jax_agrees()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("shape", ["one layer", "stack"])
def test_the_loop_agrees_compiled_or_not(
    monkeypatch: pytest.MonkeyPatch, shape: str, mode: str, cell: str
) -> None:
    # The compiler is torch's own affair and takes long.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    agrees(CompiledLoop(), replace(SHAPES[shape], compiled_loop=True), cell, mode)


def test_rivals_say_what_they_cannot_do() -> None:
    training = Case.build(SHAPES["one layer"], "gru", "training", 1)
    half = Case.build(replace(SMALL, dtype="bfloat16"), "gru", "inference", 1)
    for rival in (OnnxRuntime(), OpenVino()):
        assert rival.supports(training) == "inference only"
        assert "bfloat16" in str(rival.supports(half))
    assert "dense float32" in str(Jax().supports(half))
    assert "compiler" in str(CompiledLoop().supports(training))


def test_cases_are_the_same_every_time_and_leave_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, second = (Case.build(SMALL, "lstm", "training", 1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.x, second.x) and torch.equal(first.gradient, second.gradient)
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_switches_of_a_gpu_leave_cudnn_on() -> None:
    case = replace(Case.build(SMALL, "lstm", "inference", 1), device="cuda")
    for tf32 in (False, True):
        with TorchLayer("torch.nn", tf32=tf32).prepare(case).around():
            assert torch.backends.cudnn.enabled
            assert torch.backends.cudnn.allow_tf32 == tf32


def test_denormal_states() -> None:
    (work,) = (w for w in workloads.WORKLOADS if w.name == "denormal")
    case = Case.build(replace(work, steps=3), "lstm", "inference", 1)
    output, _ = case.module(case.x)
    tiny = torch.finfo(torch.float32).tiny
    assert 0 < output.abs().max() < tiny


# Measuring


def test_percentiles() -> None:
    times = measure._times(measure._Taken(calls=7, seconds=[n * 1e-6 for n in range(10, 0, -1)]))
    assert (times.median, times.blocks, times.calls) == (pytest.approx(5.5), 10, 7)
    assert (times.p20, times.p80) == (pytest.approx(2.8), pytest.approx(8.2))


def test_blocks_of_all_in_turn_each_in_its_surroundings() -> None:
    inside: list[str] = []
    called: list[str] = []

    def prepared(name: str) -> Prepared:
        class Around:
            def __enter__(self) -> None:
                inside.append(name)

            def __exit__(self, *_: object) -> None:
                assert inside.pop() == name

        def call() -> None:
            assert inside == [name]
            called.append(name)

        return Prepared(call, dict, Around)  # type: ignore[arg-type]

    times = measure.interleaved({n: prepared(n) for n in "abc"}, seconds=1e-3)
    assert set(times) == set("abc") and not inside
    turns = [name for n, name in enumerate(called) if n == 0 or called[n - 1] != name]
    assert len(turns) >= 3 * 3
    for t in times.values():
        assert 0 < t.p20 <= t.median <= t.p80 and t.blocks >= 3 and t.calls >= 1


def test_latencies_of_single_calls() -> None:
    calls = [0]

    def call() -> None:
        calls[0] += 1

    found = measure.latencies({"a": Prepared(call, dict, torch.no_grad)}, calls=50, turn=10)
    assert found["a"].calls == 50
    assert 0 < found["a"].p50 <= found["a"].p99 <= found["a"].longest
    assert calls[0] == 50 + 5 * 20


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_peak_memory_sees_what_is_freed_before_the_call_ends() -> None:
    def call() -> int:
        return int(torch.ones(16 << 20).sum()) >> 20  # 64 MiB

    result, peak = measure.peak_memory(call)
    if peak is None:
        pytest.skip("the system does not let its peak be reset")
    assert result == 16
    assert 60 << 20 < peak < 100 << 20
    _, nothing = measure.peak_memory(lambda: None)
    assert nothing is not None and nothing < 4 << 20


@pytest.mark.parametrize(
    ("result", "exact", "error"), [([1.0, 2.0], [1.0, 4.0], 0.5), ([0.1], [0.2], 0.1)]
)
def test_relative_error(result: list[float], exact: list[float], error: float) -> None:
    found = measure.relative_error(torch.tensor(result), torch.tensor(exact).double())
    assert found == pytest.approx(error)


def test_another_shape_is_infinitely_wrong() -> None:
    assert measure.relative_error(torch.zeros(2), torch.zeros(3)) == float("inf")


# The workloads


def test_workloads_are_named_once_and_their_targets_can_be_measured() -> None:
    names = [w.name for w in workloads.WORKLOADS]
    assert len(names) == len(set(names))
    rivals = {r.name for r in race.RIVALS["cpu"]}
    for work in (*workloads.WORKLOADS, *workloads.SMOKE):
        assert set(work.rivals) <= rivals
        ours = {v.name for v in work.variants} | {race.ONE_THREAD.name}
        for target in work.targets:
            assert target.mode in work.modes
            assert target.against in {BEST_RIVAL, PEAK, MICROSECONDS} | rivals | ours
        for variant in work.variants:
            work.changed(variant.changes)


def test_the_dense_twin_of_the_packed_batch_has_as_many_rows() -> None:
    (packed,) = workloads.PACKED
    (variant,) = packed.variants
    assert packed.changed(variant.changes).rows == packed.rows


# Results on disk


def test_results_survive_being_stored(tmp_path: Path) -> None:
    delayed = replace(ROW.ours, latency=measure.Latency(1.0, 2.0, 3.0, 4), kernels=("gemm",))
    kept = replace(
        ROW,
        entries=(delayed, *ROW.entries[1:]),
        refused={"JAX": "not installed"},
        verdicts=(Verdict(PEAK, 0.95, None, "not measured"),),
    )
    conditions = store.conditions(MACHINE, "python -m pytest benchmarks")
    results = store.Results((conditions,), ((kept, 0),))
    store.save(results, tmp_path / "machine" / "suite.json")
    assert store.load(tmp_path / "machine" / "suite.json") == results
    assert store.load(tmp_path / "none.json").rows == ()


def test_a_later_run_replaces_its_rows_only() -> None:
    first, second = (store.conditions(MACHINE, command) for command in ("first", "second"))
    other = replace(ROW, workload="v")
    results = store.merge(store.Results((), ()), first, [ROW, other], ["v", "w"])
    assert [(r.workload, n) for r, n in results.rows] == [("v", 0), ("w", 0)]
    later = replace(ROW, floor=11.0)
    results = store.merge(results, second, [later], ["v", "w"])
    assert results.rows == ((other, 0), (later, 1))
    results = store.merge(results, second, [other], ["v", "w"])
    assert [run.command for run in results.runs] == ["second", "second"]


# The report


def results_of(*rows: Row) -> store.Results:
    return store.Results((store.conditions(MACHINE, "the command"),), tuple((r, 0) for r in rows))


def test_the_table_shows_losses_with_the_winner() -> None:
    lost = row(entry("fastrnn", "ours", 100.0), entry("JAX", "rival", 50.0), cell="gru")
    training = replace(ROW, mode="training")
    table = report.table(results_of(ROW, lost, training)).splitlines()
    assert table[2] == (
        "| w (10, 1, 8, 8) | 100 µs, 2× | *100 µs, 0.5× JAX* | – | 100 µs, 3× | – | – |"
    )
    assert "the command" in table[-1] and "2 threads" in table[-1]


def test_the_short_table_has_the_named_rows() -> None:
    results = results_of(ROW, replace(ROW, workload="speech"))
    assert [line.split()[1] for line in report.table(results).splitlines()[2:4]] == ["w", "speech"]
    (row,) = report.table(results, report.SHORT).splitlines()[2:-2]
    assert row.startswith("| speech ")


def test_every_loss_is_listed_the_worst_first() -> None:
    lost = row(entry("fastrnn", "ours", 100.0), entry("JAX", "rival", 50.0), cell="gru")
    worse = row(entry("fastrnn", "ours", 100.0), entry("torch.nn", "rival", 10.0), mode="training")
    assert report.losses(results_of(ROW, lost, worse)).splitlines()[2:] == [
        "| (10, 1, 8, 8) | LSTM | training | 100 µs | 10 µs, torch.nn | 0.10× |",
        "| (10, 1, 8, 8) | GRU | inference | 100 µs | 50 µs, JAX | 0.50× |",
    ]


def test_the_short_table_names_workloads_that_exist() -> None:
    assert set(report.SHORT) <= {workload.name for workload in workloads.WORKLOADS}
    assert len(report.SHORT) == 5


def test_the_table_goes_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n{report.END}\n"
    new = report.rewrite(text, "| new \\1 |")
    assert new == f"before\n{report.BEGIN}\n| new \\1 |\n{report.END}\nafter\n{report.END}\n"
    with pytest.raises(ValueError, match="to put the table into"):
        report.rewrite("nothing", "table")


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5 µs"), (43.21, "43.2 µs"), (4766, "4.77 ms"), (2e6, "2 s")]
)
def test_times_in_the_unit_that_reads_best(value: float, text: str) -> None:
    assert report.micros(value) == text


def test_the_suite_and_its_report(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    arguments = ["--smoke", "--seconds", "0.001", "--latency-calls", "100", "--threads", "1"]
    arguments += ["--benchmark-quiet", "-p", "no:cacheprovider", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
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
        assert found.ours.kind == "ours" and found.floor > 0
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


def test_plots_of_the_sweeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        replace(ROW, workload=f"{size}-{n}", group=group, mode=mode, **{size: n})
        for group, size in report.SWEEPS.items()
        for n in (16, 64)
        for mode in ("inference", "training")
    ]
    assert report.plot(results_of(*rows), tmp_path / "a.svg")
    assert report.plot(results_of(*rows), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert not report.plot(results_of(ROW), tmp_path / "c.svg")


@pytest.mark.parametrize(
    ("page", "rewritten"), [("README.md", report.readme), ("docs/benchmarks.md", report.docs)]
)
def test_pages_have_the_tables_of_the_results(
    page: str, rewritten: Callable[[str, store.Results], str]
) -> None:
    text = (ROOT / page).read_text()
    results = store.load(report.RESULTS / "amd-epyc-2-threads" / "suite.json")
    assert rewritten(text, results) == text


# python -m fastrnn bench


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrnn.tools.bench.machine.measure", lambda device: here())


def test_a_shape_of_your_own(quick_machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "5,2,3,8", "--seconds", "0.001", "--rivals", "torch.nn"]
    arguments += ["--latency-calls", "100"]
    assert __main__.main(["bench", *arguments, "--layer", "gru", "--training"]) == 0
    out = capsys.readouterr().out
    assert "GRU, training, T=5 B=2 I=3 H=8, float32" in out
    assert re.search(r"^fastrnn +\d", out, re.MULTILINE)
    assert re.search(r"^torch.nn +\d.* x$", out, re.MULTILINE)
    assert "not ONNX Runtime: " in out
    assert __main__.main(["bench", *arguments, "--stream", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["mode"], values["steps"], values["batch"]) == ("step", 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "5,2,3"], "four whole numbers"),
        (["--shape", "5,2,-3,8"], "four whole numbers"),
        (["--shape", "5,2,3,8", "--rivals", "haste"], "no rival haste; there are: torch.nn"),
        (["--shape", "5,2,3,8", "--layers", "0"], "at least 1"),
        (["--shape", "5,2,3,8", "--training", "--stream"], "not allowed with"),
    ],
)
def test_impossible_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["bench", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_results_are_told(
    quick_machine: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = TorchLayer("fastrnn", lambda layer: Scaled(fastrnn.from_torch(layer), 1.01))
    monkeypatch.setattr(race, "OURS", (wrong,))
    assert __main__.main(["bench", "--shape", "5,2,3,8", "--rivals", "torch.nn"]) == 1
    assert "nothing was timed: your shape, lstm, inference: output" in capsys.readouterr().err
