"""The functional form: weights are an argument."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastrnn import cells, ops
from fastrnn.cells import Cell
from fastrnn.kernels import reference
from fastrnn.kernels.operands import Operands, Weights
from fastrnn.nn import functional as F
from tests.support.modules import twins
from tests.support.names import LAYERS
from tests.support.tensors import flatten

F64 = torch.float64
CELL = {"RNN": cells.rnn_tanh, "LSTM": cells.lstm, "GRU": cells.gru}


def assert_same(a: Any, b: Any) -> None:
    for mine, wanted in zip(flatten(a), flatten(b), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_all_weights_are_the_weights(name: str, bidirectional: bool, bias: bool) -> None:
    """What `all_weights` of torch's layers holds is what `rnn` takes."""
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": bidirectional, "bias": bias}
    _, theirs, _ = twins(name, 3, 5, batch_first=True, **options)
    x = torch.randn(2, 4, 3, dtype=F64)
    h = torch.randn(2 * (1 + bidirectional), 2, 5, dtype=F64)
    hx = (h, 2 * h) if name == "LSTM" else h
    for given in (None, hx):
        result = F.rnn(
            CELL[name],
            x,
            theirs.all_weights,
            given,
            bidirectional=bidirectional,
            batch_first=True,
        )
        assert_same(result, theirs(x, given))
    packed = pack_padded_sequence(x, [4, 2], batch_first=True)
    output, _ = F.rnn(CELL[name], packed, theirs.all_weights, bidirectional=bidirectional)
    assert isinstance(output, PackedSequence)
    assert_same(output, theirs(packed)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_projection(bias: bool) -> None:
    _, theirs, _ = twins("LSTM", 3, 5, num_layers=2, proj_size=2, bias=bias)
    x = torch.randn(4, 2, 3, dtype=F64)
    assert_same(F.rnn(cells.lstm, x, theirs.all_weights), theirs(x))


def test_dropout_needs_training() -> None:
    _, theirs, _ = twins("GRU", 3, 5, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, 3, dtype=F64)
    torch.manual_seed(2)
    dropped = F.rnn(cells.gru, x, theirs.all_weights, dropout=0.5, training=True)
    torch.manual_seed(2)
    assert_same(dropped, theirs(x))
    assert_same(F.rnn(cells.gru, x, theirs.all_weights, dropout=0.5), theirs.eval()(x))


def test_one_scan_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that runs both directions together and applies the masks in every layer."""
    calls: list[tuple[Operands, Any, bool]] = []

    def run(cell: Cell, operands: Operands, packed: Any, *, recompute: bool, steps: bool) -> Any:
        assert not steps
        calls.append((operands, packed, recompute))
        return *reference.scan(cell, operands), None

    monkeypatch.setattr(ops, "run", run)
    _, theirs, _ = twins("GRU", 3, 5, num_layers=3, bidirectional=True)
    x, resets = torch.randn(4, 2, 3, dtype=F64), torch.zeros(4, 2, dtype=torch.bool)
    options: dict[str, Any] = {"bidirectional": True, "recompute": True}
    F.rnn(cells.gru, x, theirs.all_weights, lengths=[4, 1], resets=resets, **options)
    assert len(calls) == 3
    for given, packed, recompute in calls:
        assert len(given.b_ih) == 2 and given.reverse == 0b10
        assert packed is None and recompute is True
        assert given.lengths is not None and given.lengths.tolist() == [4, 1]
        assert given.resets is resets


def weights(inputs: int = 3, hidden: int = 5) -> list[list[Tensor]]:
    return [[torch.randn(3 * hidden, inputs), torch.randn(3 * hidden, hidden), *torch.randn(2, 15)]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(3), weights()), ValueError, "^rnn: Expected input to be 2D or 3D, got 1D"),
        ((torch.randn(4, 2, 4), weights()), RuntimeError, "Expected 3, got 4"),
        ((torch.randn(4, 2, 3).double(), weights()), ValueError, "does not match weight dtype"),
        ((torch.randn(0, 2, 3), weights()), RuntimeError, "pass lengths= to allow empty"),
        ((torch.randn(4, 2, 3), []), ValueError, "one list for every layer and direction, got 0"),
        (
            (torch.randn(4, 2, 3), weights(), torch.randn(1, 3, 5)),
            RuntimeError,
            r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]",
        ),
        (
            (torch.randn(4, 2, 3).to("meta"), weights()),
            RuntimeError,
            "tensor at meta and parameter",
        ),
        (
            (torch.randn(4, 2, 3), weights(), torch.randn(2, 5)),
            RuntimeError,
            "For batched 3-D input, hx should also be 3-D but got 2-D tensor",
        ),
        (
            (torch.randn(4, 2, 3), weights(), torch.randn(1, 2, 5).half()),
            RuntimeError,
            r"hx dtype \(torch.float16\) does not match input dtype \(torch.float32\)",
        ),
        (
            (torch.randn(4, 2, 3), weights(), torch.randn(1, 2, 5).to("meta")),
            RuntimeError,
            r"input tensor at cpu and hidden tensor at meta. Move hx: hx.to\('cpu'\)",
        ),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F.rnn(cells.gru, *arguments)


def test_directions_must_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="got 1 with bidirectional=True"):
        F.rnn(cells.gru, torch.randn(4, 2, 3), weights(), bidirectional=True)


@pytest.mark.parametrize("name", LAYERS)
def test_one_step(name: str) -> None:
    _, theirs, _ = twins(f"{name}Cell", 3, 5)
    x = torch.randn(2, 3, dtype=F64)
    parameters = [theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh]
    cell = CELL[name]
    states = tuple(torch.randn(len(cell.states), 2, 5, dtype=F64))
    for row in (slice(None), 0):  # batched and unbatched
        piece = tuple(s[row] for s in states)
        assert_same(F.rnn_cell(cell, x[row], (), Weights(*parameters)), theirs(x[row]))
        after = F.rnn_cell(cell, x[row], piece, Weights(*parameters))
        assert [s.shape for s in after] == [s.shape for s in piece]
        assert_same(after, theirs(x[row], piece if len(piece) > 1 else piece[0]))
    hx = states if len(states) > 1 else states[0]
    for absent in (("bias_hh",), ("bias_ih",), ("bias_ih", "bias_hh")):
        given = [p for n, p in theirs.named_parameters() if not n.startswith("bias")]
        given += [None if n in absent else getattr(theirs, n) for n in ("bias_ih", "bias_hh")]
        without = copy.deepcopy(theirs)
        for bias in absent:
            setattr(without, bias, None)
        assert_same(F.rnn_cell(cell, x, states, Weights(*given)), without(x, hx))
