"""The measurement of times, memory and errors. No test asserts a time."""

from __future__ import annotations

import sys

import pytest
import torch

from fastrnn.tools.bench import measure
from fastrnn.tools.bench.implementation import Prepared


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

        return Prepared(call, dict, Around)

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
