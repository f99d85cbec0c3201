"""The choice of a kernel by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastrnn.plan import choose
from tests.support.problems import LSTM, TWO


def test_a_kernel_asked_for_by_name_is_used_or_named_wrong() -> None:
    assert choose(LSTM, replace(TWO, forced="reference")).kernel == "reference"
    with pytest.raises(
        ValueError, match=r"no kernel named 'gpu'; there are: cpu, cuda, triton, reference"
    ):
        choose(LSTM, replace(TWO, forced="gpu"))


def test_lengths_that_agree_in_their_leading_bits_share_a_plan() -> None:
    few = replace(LSTM, steps=1, batch=40, rows=32, hidden=1024)
    assert choose(few, TWO).cpu.weights == "unpacked"
    assert choose(replace(few, rows=35), TWO) == choose(few, TWO)
    assert choose(replace(few, rows=36), TWO).cpu.weights == "panels"
    assert replace(few, steps=1000, rows=15).rounded() == replace(few, steps=960, rows=15)
