"""Cells beside those of torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastrnn
from tests.support.modules import compare, same_error, twins
from tests.support.names import CELLS, SIZES
from tests.support.properties import given, settings, st
from tests.support.tensors import flatten

F64 = torch.float64
SIZE = st.sampled_from(SIZES)


@settings(max_examples=40)
@given(data=st.data())
def test_cells_match(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(CELLS), "cell")
    hidden, width = draw(SIZE, "hidden"), draw(SIZE, "width")
    options: dict[str, Any] = {
        "bias": draw(st.booleans(), "bias"),
        "dtype": draw(st.sampled_from([torch.float32, F64]), "dtype"),
    }
    if name == "RNNCell":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]), "nonlinearity")
    torch.manual_seed(draw(st.integers(0, 2**16), "seed"))
    modules = twins(name, width, hidden, **options)
    batch = draw(st.sampled_from([(), (1,), (4,)]), "batch")
    arguments: list[Any] = [torch.randn(*batch, width)]
    if draw(st.booleans(), "hx"):
        h = torch.randn(*batch, hidden)
        arguments.append((h, torch.randn(*batch, hidden)) if name == "LSTMCell" else h)
    compare(modules, *arguments)


def test_nonlinearity_of_a_cell_is_read_at_the_call() -> None:
    ours, theirs, _ = twins("RNNCell", 3, 5)
    x = torch.randn(2, 3, dtype=F64)
    ours.nonlinearity = theirs.nonlinearity = "relu"
    torch.testing.assert_close(ours(x), theirs(x))
    ours.nonlinearity = theirs.nonlinearity = "x"
    message, theirs_message = same_error(lambda: ours(x), lambda: theirs(x))
    assert message.startswith(theirs_message)


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_torchs(name: str) -> None:
    assert isinstance(getattr(fastrnn, name)(3, 5), getattr(nn, name))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (0, 0)])
def test_empty_cells(name: str, sizes: tuple[int, int]) -> None:
    ours, theirs, _ = twins(name, *sizes)
    x = torch.randn(2, sizes[0], dtype=torch.float64)
    for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        torch.testing.assert_close(a, b)
