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
