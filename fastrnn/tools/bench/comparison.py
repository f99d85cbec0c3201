"""Makes one row of the benchmark: checks and times every implementation of a workload."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch.nn.utils.rnn import PackedSequence

from fastrnn.plan import KernelRefused
from fastrnn.tools import tolerance
from fastrnn.tools.bench import measure
from fastrnn.tools.bench.implementation import (
    OURS,
    OURS_ON_GPU,
    Case,
    CompiledLoop,
    Implementation,
    Prepared,
    Results,
    TorchLayer,
)
from fastrnn.tools.bench.jax_baseline import Jax
from fastrnn.tools.bench.machine import Machine
from fastrnn.tools.bench.onnx_baselines import OnnxRuntime, OpenVino
from fastrnn.tools.bench.workload import (
    BEST_BASELINE,
    MICROSECONDS,
    PEAK,
    Target,
    Variant,
    Workload,
)

__all__ = [
    "BASELINES",
    "ONE_THREAD",
    "TORCH",
    "Entry",
    "Gate",
    "GateFailed",
    "Row",
    "Verdict",
    "judge",
    "run",
]

TORCH = "torch.nn"
# Baselines by device.
BASELINES: dict[str, tuple[Implementation, ...]] = {
    "cpu": (
        TorchLayer(TORCH),
        TorchLayer("torch.nn without oneDNN", onednn=False),
        CompiledLoop(),
        OnnxRuntime(),
        OpenVino(),
        Jax(),
    ),
    "cuda": (TorchLayer(TORCH), TorchLayer("torch.nn with TF32", tf32=True), CompiledLoop()),
}
ONE_THREAD = Variant("fastrnn, 1 thread", threads=1)
_BASELINES_LIMIT = 5e-3  # above any rounding, even of TF32, and below the error of a wrong gate
# The same for baselines in a format with few digits, as a factor of the tolerance of ours. Errors
# of up to 4.6e-2 were seen of torch.ao, whose matrices have one scale each.
_BASELINES_FACTOR = 5
_STEPS_GATED = 4
_NOISE = 0.03  # relative change of a median between runs on a quiet machine


class GateFailed(AssertionError):
    """Results are further from float64 than the tolerance, so nothing is timed."""


@dataclass(frozen=True)
class Entry:
    """One implementation of a row. Times are microseconds per call; see `measure.Times`.

    Attributes:
        kind: "ours", "variant" or "baseline".
        error: largest distance from float64, relative to the largest value if that exceeds one.
        memory: bytes by which the first call raised the peak memory of the process.
        kernels: the GPU kernels that it ran.
    """

    name: str
    kind: str
    median: float
    p20: float
    p80: float
    blocks: int
    calls: int
    error: float
    memory: int | None = None
    latency: measure.Latency | None = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A target of a row and its result: "reached", "missed", "within noise" if it is missed by at
    most `_NOISE`, or "not measured"."""

    against: str
    bound: float
    value: float | None
    status: str
    of: str | None = None


@dataclass(frozen=True)
class Row:
    """The results of one workload, cell and mode.

    Attributes:
        roofline: microseconds that no implementation can undercut on the measured machine.
        entries: ours first; the row is about the first one.
        refused: implementations that were not timed, with their reasons.
    """

    workload: str
    group: str
    about: str
    cell: str
    mode: str
    threads: int
    device: str
    dtype: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int
    bidirectional: bool
    rows: int
    flops: int
    roofline: float
    roofline_by: str
    entries: tuple[Entry, ...]
    refused: dict[str, str] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return self.workload, self.cell, self.mode, self.threads, self.device

    @property
    def ours(self) -> Entry:
        return self.entries[0]

    @property
    def baselines(self) -> list[Entry]:
        """The baselines, fastest first."""
        return sorted((e for e in self.entries if e.kind == "baseline"), key=lambda e: e.median)

    def entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name), None)

    def speedup(self, name: str = BEST_BASELINE) -> float | None:
        """Time of an implementation, or of the fastest baseline, divided by ours; None if there is
        no such entry."""
        other = self.entry(name) if name != BEST_BASELINE else next(iter(self.baselines), None)
        return other.median / self.ours.median if other else None

    def gflops(self, entry: Entry) -> float:
        """GFLOP/s of an entry's matrix products."""
        return self.flops / entry.median / 1e3

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        entries = [
            Entry(
                **{
                    **e,
                    "latency": measure.Latency(**e["latency"]) if e["latency"] else None,
                    "kernels": tuple(e["kernels"]),
                }
            )
            for e in values["entries"]
        ]
        verdicts = [Verdict(**v) for v in values["verdicts"]]
        return cls(**{**values, "entries": tuple(entries), "verdicts": tuple(verdicts)})


def run(
    workload: Workload,
    cell: str,
    mode: str,
    machine: Machine,
    *,
    seconds: float = 0.3,
    latency_calls: int = 0,
    device: str = "cpu",
    ours: Sequence[Implementation] | None = None,
    baselines: Sequence[Implementation] | None = None,
) -> tuple[Row, Prepared]:
    """Check and time all implementations that can run a workload with `machine.threads` threads.

    Args:
        seconds: time for the calls of each implementation.
        ours: implementations of ours in place of those of the device. Variants are left out if
            the unchanged layer is none of them.
        baselines: baselines in place of all those of the device.
        latency_calls: in mode "step", number of calls of ours and of the fastest baseline that are
            also timed one by one.

    Returns:
        The row, and our prepared implementation, for further timing.

    Raises:
        GateFailed: if our results are wrong; nothing was timed.
    """
    case = Case.build(workload, cell, mode, machine.threads, device)
    gate = Gate(case)
    ready: dict[str, _Ready] = {}
    refused: dict[str, str] = {}
    if ours is None:
        ours = OURS if device == "cpu" else OURS_ON_GPU
    for implementation in ours:
        reason = implementation.available() or implementation.supports(case)
        if reason is None:
            prepared = implementation.prepare(case)
            tf32 = getattr(implementation, "tf32", False)
            try:
                checked = gate.check(implementation.name, prepared, ours=True, tf32=tf32)
            except KernelRefused as refusal:
                refused[implementation.name] = str(refusal)
            else:
                ready[implementation.name] = _Ready("ours", prepared, *checked)
        elif implementation.available():
            refused[implementation.name] = reason
    for name, other in _variants(case) if _DROP_IN.name in ready else ():
        prepared = _DROP_IN.prepare(other)
        other_gate = gate if other.workload == workload else Gate(other)
        ready[name] = _Ready("variant", prepared, *other_gate.check(name, prepared, ours=True))
    for implementation in BASELINES[device] if baselines is None else baselines:
        reason = implementation.available() or implementation.supports(case)
        if reason is None and workload.baselines and implementation.name not in workload.baselines:
            reason = "left out of this row"
        if reason is None:
            try:
                prepared = implementation.prepare(case)
                ready[implementation.name] = _Ready(
                    "baseline", prepared, *gate.check(implementation.name, prepared)
                )
            except GateFailed as failure:
                reason = f"not timed, as its results are off: {failure}"
            except Exception as error:
                # Any failure of a baseline belongs into its row and must not end the run.
                reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason is not None:
            refused[implementation.name] = reason
    calls = {name: implementation.prepared for name, implementation in ready.items()}
    clock = measure.gpu_clock if device == "cuda" else measure.clock
    times = measure.interleaved(calls, seconds, clock)
    delays: dict[str, measure.Latency] = {}
    if mode == "step" and latency_calls:
        by_time = sorted(times, key=lambda name: times[name].median)
        nearest = [name for name in by_time if ready[name].kind == "baseline"][:1]
        both = [name for name in ready if ready[name].kind == "ours" or name in nearest]
        delays = measure.latencies({name: calls[name] for name in both}, latency_calls)
    entries = tuple(
        Entry(
            name,
            each.kind,
            **asdict(times[name]),
            error=each.error,
            memory=each.memory,
            latency=delays.get(name),
            kernels=_kernels(each.prepared) if device == "cuda" else (),
        )
        for name, each in ready.items()
    )
    row = _row(case, machine, entries, refused)
    return row, ready[row.ours.name].prepared


def _kernels(prepared: Prepared) -> tuple[str, ...]:
    with prepared.around():
        return measure.kernels_of(prepared.call)


@dataclass(frozen=True)
class _Ready:
    """An implementation that passed the gate."""

    kind: str
    prepared: Prepared
    error: float
    memory: int | None


_DROP_IN = next(implementation for implementation in OURS if implementation.name == "fastrnn")


def _variants(case: Case) -> Iterator[tuple[str, Case]]:
    """Our layer under other conditions: the workload's variants, and one thread on CPUs."""
    w = case.workload
    variants = list(w.variants)
    if case.threads > 1 and case.device == "cpu" and case.mode in ("inference", "training"):
        variants.insert(0, ONE_THREAD)
    for variant in variants:
        threads = variant.threads or case.threads
        changed = w.changed(variant.changes)
        yield variant.name, Case.build(changed, case.cell, case.mode, threads, case.device)


class Gate:
    """Checks results against those in float64, by the error of torch.nn in the case's dtype."""

    def __init__(self, case: Case) -> None:
        self._case = case
        exactly = replace(case, module=copy.deepcopy(case.module).double())
        if isinstance(case.x, PackedSequence):
            exactly = replace(exactly, x=case.x._replace(data=case.x.data.double()))
        else:
            exactly = replace(exactly, x=case.x.double())
        exactly = replace(exactly, gradient=case.gradient.double())
        self._exact, _ = self._results(TorchLayer(TORCH).prepare(exactly))
        self._theirs = {False: self._errors(tf32=False)}

    def _errors(self, tf32: bool) -> dict[str, float]:
        """The errors of torch.nn."""
        theirs, _ = self._results(TorchLayer(TORCH, tf32=tf32).prepare(self._case))
        return {n: measure.relative_error(theirs[n], e) for n, e in self._exact.items()}

    def _results(self, prepared: Prepared) -> tuple[Results, int | None]:
        """Results of the first call (in mode "step" of a later one, to show that the state is
        carried), and the memory of the first call."""
        with prepared.around():
            result, memory = measure.peak_memory(prepared.call, self._case.device)
            for _ in range(_STEPS_GATED - 1 if self._case.mode == "step" else 0):
                result = prepared.call()
            return prepared.read(result), memory

    def check(
        self, name: str, prepared: Prepared, *, ours: bool = False, tf32: bool = False
    ) -> tuple[float, int | None]:
        """The largest error of all results, and the memory of the first call.

        Raises:
            GateFailed: if an error exceeds the tolerance. Ours has the tolerance of the tests; that
                of a baseline only tells a wrong result from a different rounding.
        """
        if tf32 not in self._theirs:
            self._theirs[tf32] = self._errors(tf32)
        results, memory = self._results(prepared)
        errors = {n: measure.relative_error(r, self._exact[n]) for n, r in results.items()}
        for what, error in errors.items():
            theirs = self._theirs[tf32][what]
            if prepared.format is not None:
                allowed = tolerance.FORMATS[prepared.format] * (1 if ours else _BASELINES_FACTOR)
            elif ours:
                allowed = measure.limit(what, theirs, self._case.workload.dtype, tf32)
            else:
                allowed = _BASELINES_LIMIT + 10 * theirs
            # `not <=`, so that NaN fails.
            if not error <= allowed:
                raise GateFailed(
                    f"{self._case.workload.name}, {self._case.cell}, {self._case.mode}: {what} of "
                    f"{name} is off from float64 by {error:.3g}, allowed are {allowed:.3g}"
                )
        return max(errors.values()), memory


def _row(case: Case, machine: Machine, entries: tuple[Entry, ...], refused: dict[str, str]) -> Row:
    w = case.workload
    flops = w.flops(case.cell, case.mode)
    roofline = machine.roofline(flops, *w.weight_reads(case.cell, case.mode))
    row = Row(
        workload=w.name,
        group=w.group,
        about=w.about,
        cell=case.cell,
        mode=case.mode,
        threads=case.threads,
        device=case.device,
        dtype=w.dtype,
        steps=w.steps,
        batch=w.batch,
        inputs=w.inputs,
        hidden=w.hidden,
        layers=w.layers,
        bidirectional=w.bidirectional,
        rows=w.rows,
        flops=flops,
        roofline=roofline.microseconds,
        roofline_by=roofline.by,
        entries=entries,
        refused=refused,
    )
    targets = [t for t in w.targets if t.mode == case.mode]
    return replace(row, verdicts=tuple(v for t in targets for v in judge(row, t, machine.peak)))


def judge(row: Row, target: Target, peak: float) -> list[Verdict]:
    """The verdict on one target of a row; empty if it has no bound for the row's cell.

    Args:
        peak: GFLOP/s of the machine.
    """
    bound = target.bound(row.cell)
    if bound is None:
        return []
    ours = row.ours if target.of is None else row.entry(target.of)
    if ours is None:
        return [Verdict(target.against, bound, None, "not measured", target.of)]
    if target.against == MICROSECONDS:
        status = _status(ours.median / bound)
        return [Verdict(target.against, bound, ours.median, status, target.of)]
    if target.against == PEAK:
        value = row.gflops(ours) / peak
    else:
        against = row.baselines[0] if target.against == BEST_BASELINE and row.baselines else None
        against = against or row.entry(target.against)
        if against is None:
            return [Verdict(target.against, bound, None, "not measured", target.of)]
        value = against.median / ours.median
    return [Verdict(target.against, bound, value, _status(bound / value), target.of)]


def _status(share: float) -> str:
    """The status of a target, from our time divided by the time that it asks for."""
    if share <= 1:
        return "reached"
    return "within noise" if share <= 1 + _NOISE else "missed"
