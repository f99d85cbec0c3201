"""A large tape uses the memory of one that is gone, and no memory of one that is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrnn import cells
from fastrnn.kernels.prepare import prepare
from tests.support.operands import operands, positional

STEPS, BATCH, HIDDEN = 256, 16, 512
LEAST = 32 << 20  # bytes of a large tape
HELD = 256 << 20  # most bytes that wait for one


@pytest.fixture
def tape() -> Callable[[], Tensor]:
    """Runs a GRU forward and gives its tape, which is just large."""
    cell = cells.get("gru")
    given = operands(cell, STEPS, BATCH, 1, HIDDEN, recurrences=1, dtype=torch.float32)
    arguments = positional(prepare(cell), given)

    def run() -> Tensor:
        saved: Tensor = torch.ops.fastrnn.scan(*arguments, tape=True)[-1]
        return saved

    return run


def test_memory_is_used_again(tape: Callable[[], Tensor]) -> None:
    first = tape()
    assert first.nbytes == LEAST
    where, values = first.data_ptr(), first.clone()
    del first
    again = tape()
    assert again.data_ptr() == where
    assert torch.equal(again, values)
    again.fill_(torch.nan)
    del again
    assert torch.equal(tape(), values)


def test_tapes_that_live_have_memory_of_their_own(tape: Callable[[], Tensor]) -> None:
    held = HELD // LEAST
    tapes = [tape() for _ in range(held + 2)]
    places = [each.data_ptr() for each in tapes]
    assert len(set(places)) == len(places)
    assert all(torch.equal(each, tapes[0]) for each in tapes)
    view = tapes[-1][5:]
    tapes.clear()
    # All were given back but the one in use, and as many as may wait do.
    again = [tape() for _ in range(held)]
    assert {each.data_ptr() for each in again} <= set(places[:-1])
    assert torch.equal(view, again[0][5:])
