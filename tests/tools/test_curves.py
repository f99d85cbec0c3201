"""What a side-by-side training gave. The test of the demo has table and plot."""

from __future__ import annotations

import pytest

from fastrnn.tools.curves import COMPILED, FASTRNN, LOOP, TORCH, Comparison, table


def test_speed_is_of_the_median_step() -> None:
    comparison = Comparison("lstm")
    comparison.losses[TORCH].extend([3.0, 2.0, 1.0])
    comparison.losses[FASTRNN].extend([3.0, 2.5, 1.0])
    comparison.times[TORCH].extend([0.5, 0.5, 9.0])
    comparison.times[FASTRNN].extend([0.1, 4.0, 0.1])
    assert comparison.ratio() == pytest.approx(5)
    assert comparison.curve_difference() == comparison.early_difference() == pytest.approx(0.5)
    comparison.losses[FASTRNN][1] = float("nan")
    assert not comparison.curve_difference() <= 1
    assert not comparison.early_difference() <= 1
    assert comparison.curve(TORCH) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_each_baseline_is_compared() -> None:
    comparison = Comparison("mgu", (LOOP, COMPILED, FASTRNN))
    for name, losses, seconds in ((LOOP, 3.0, 0.8), (COMPILED, 2.5, 0.3), (FASTRNN, 2.9, 0.1)):
        comparison.losses[name].append(losses)
        comparison.times[name].append(seconds)
    assert comparison.baselines == (LOOP, COMPILED)
    assert comparison.early_difference() == comparison.curve_difference() == pytest.approx(0.4)
    assert comparison.ratio() == pytest.approx(8) and comparison.ratio(COMPILED) == pytest.approx(3)
    assert "8.00 times as fast as the loop, and 3.00 times as the compiled loop" in table(
        comparison
    )
