"""Layers of custom cells against loops of plain torch operations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import cells, to_torch
from fastrnn.cells import Cell
from tests.support.modules import same_error
from tests.support.names import LAYERS
from tests.support.shared import minimal, peepholes
from tests.support.tensors import flatten, sum_of

F64 = torch.float64


@fastrnn.cell(gates="zifo", states="hcnm")
def own_slstm(u: Any, v: Any, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> Any:
    """Exponential gating with a normaliser and a stabiliser, Beck et al. 2024, arXiv:2405.04517."""
    i, f = u.i + v.i, u.f + v.f
    stable = torch.maximum(f + m, i)
    i, f = torch.exp(i - stable), torch.exp(f + m - stable)
    c = f * c + i * torch.tanh(u.z + v.z)
    n = f * n + i
    return torch.sigmoid(u.o + v.o) * c / (n + 1), c, n, stable


@fastrnn.cell(gates="ab", states="ph")
def own_pair(u: Any, v: Any, p: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """It has two states; the second depends on the first's new value."""
    p = torch.tanh(u.a + v.a + 0.5 * h)
    return p, torch.sigmoid(u.b + v.b) * h + p


CELLS = [minimal, own_slstm, own_pair, peepholes]
cell_of = pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)


def by_hand(
    layer: fastrnn.Recurrent, x: Tensor, hx: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The layer on x [T, B, I], step by step, from its Parameters by name."""
    cell, size = layer.cell, layer.hidden_size
    weights = dict(layer.named_parameters())
    finals: list[list[Tensor]] = []
    for k in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"] if layer.bidirectional else [""]):
            w: Any = {n: weights.get(f"{n}_l{k}{suffix}") for n in ("weight_ih", "bias_ih")}
            r: Any = {n: weights.get(f"{n}_l{k}{suffix}") for n in ("weight_hh", "bias_hh")}
            row = len(finals)
            if hx is None:
                s = [torch.zeros(x.size(1), size, dtype=x.dtype) for _ in cell.states]
            else:
                s = [h[row] for h in hx]
            ys = []
            for step in x.flip(0) if d else x:
                u = nn.functional.linear(step, *w.values()).split(size, -1)
                v = nn.functional.linear(s[0], *r.values()).split(size, -1)
                s = cell.step(u, v, s, [weights[f"weight_{n}_l{k}{suffix}"] for n in cell.params])
                ys.append(s[0])
            outputs.append(torch.stack(ys[::-1] if d else ys))
            finals.append(s)
        x = torch.cat(outputs, -1)
    return x, [torch.stack(s) for s in zip(*finals, strict=True)]


def start(cell: Cell, *shape: int) -> Any:
    states = tuple(torch.randn(*shape, dtype=F64, requires_grad=True) for _ in cell.states)
    return states if len(states) > 1 else states[0]


def gradients(outputs: Any, *leaves: Any) -> list[Tensor]:
    total = sum_of((y * (k + 1)).square().sum() for k, y in enumerate(flatten(outputs)))
    return list(torch.autograd.grad(total, flatten(leaves)))


def assert_same(a: Any, b: Any) -> None:
    assert len(flatten(a)) == len(flatten(b)) > 0
    for mine, wanted in zip(flatten(a), flatten(b), strict=True):
        torch.testing.assert_close(mine, wanted)


@cell_of
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_values_and_gradients(cell: Cell, layers: int, bidirectional: bool, bias: bool) -> None:
    layer = fastrnn.Recurrent(cell, 3, 5, layers, bias, bidirectional=bidirectional, dtype=F64)
    x = torch.randn(6, 2, 3, dtype=F64, requires_grad=True)
    hx = start(cell, layers * (1 + bidirectional), 2, 5)
    leaves = [x, hx, list(layer.parameters())]
    result = layer(x, hx)
    wanted = by_hand(layer, x, flatten(hx))
    assert_same(result, wanted)
    assert_same(gradients(result, *leaves), gradients(wanted, *leaves))
    assert isinstance(result[1], Tensor) == (len(cell.states) == 1)
    assert_same(layer(x), by_hand(layer, x))


@cell_of
def test_layouts(cell: Cell) -> None:
    layer = fastrnn.Recurrent(cell, 3, 5, 2, bidirectional=True, batch_first=True, dtype=F64)
    x, lengths = torch.randn(3, 6, 3, dtype=F64), [4, 6, 1]
    output, final = layer(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    after, last = layer(packed)
    assert_same([pad_packed_sequence(after, batch_first=True)[0], last], [output, final])
    for k, n in enumerate(lengths):
        alone, single = layer(x[k, :n])
        assert_same(output[k, :n], alone)
        assert_same([s[:, k] for s in flatten(final)], single)
    resets = torch.zeros(3, 6, dtype=torch.bool)
    resets[:, 3] = True
    single_layer = fastrnn.Recurrent(cell, 3, 5, batch_first=True, dtype=F64)
    cut = torch.cat([single_layer(x[:, :3])[0], single_layer(x[:, 3:])[0]], 1)
    assert_same(single_layer(x, resets=resets)[0], cut)


@pytest.mark.parametrize("name", LAYERS)
def test_built_in_cells_are_the_layers(name: str) -> None:
    cell = {"RNN": cells.rnn_tanh, "LSTM": cells.lstm, "GRU": cells.gru}[name]
    torch.manual_seed(1)
    stock = getattr(nn, name)(3, 5, 2, bidirectional=True, dtype=F64)
    torch.manual_seed(1)
    ours = fastrnn.Recurrent(cell, 3, 5, 2, bidirectional=True, dtype=F64)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(4, 2, 3, dtype=F64)
    assert_same(ours(x), stock(x))


@cell_of
def test_dropout_between_layers(cell: Cell) -> None:
    layer = fastrnn.Recurrent(cell, 3, 5, 2, dropout=1.0, dtype=F64)
    x, y = torch.randn(2, 4, 2, 3, dtype=F64)
    assert_same(layer(x)[0], layer(y)[0])
    layer.eval()
    assert not torch.allclose(layer(x)[0], layer(y)[0])


@cell_of
def test_copies(cell: Cell) -> None:
    layer = fastrnn.Recurrent(cell, 3, 5, dtype=F64)
    x = torch.randn(4, 2, 3, dtype=F64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.cell is cell
        assert_same(other(x), layer(x))
    assert repr(layer) == f"Recurrent({cell.name}, 3, 5)"
    assert repr(fastrnn.Recurrent(cell, 3, 5, 2, False)).endswith("num_layers=2, bias=False)")


@cell_of
def test_derivatives_and_transforms(cell: Cell) -> None:
    layer = fastrnn.Recurrent(cell, 2, 3, dtype=F64)
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)

    def call(x: Tensor) -> list[Tensor]:
        return flatten(layer(x))

    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)
    many = torch.randn(3, *x.shape, dtype=F64)
    together = torch.vmap(lambda x: tuple(call(x)))(many)
    for k in range(3):
        assert_same([y[k] for y in together], layer(many[k]))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), call(x))
    assert_same(gradients(compiled(x), x), gradients(call(x), x))
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=(sizes,))
    longer = torch.randn(5, 4, 2, dtype=F64)
    assert_same(program.module()(longer), layer(longer))


@cell_of
def test_bad_states(cell: Cell) -> None:
    layer = fastrnn.Recurrent(cell, 3, 5)
    x, h = torch.randn(4, 2, 3), torch.randn(1, 2, 5)
    count = len(cell.states)
    wrong = (h[:, :1],) + (h,) * (count - 1) if count > 1 else h[:, :1]
    with pytest.raises(
        RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 5\), got \[1, 1, 5\]"
    ):
        layer(x, wrong)
    if count > 1:
        with pytest.raises(RuntimeError, match=rf"hidden states \({', '.join(cell.states)}"):
            layer(x, (h,) * (count + 1))
        with pytest.raises(RuntimeError, match="should also be 3-D"):
            layer(x, (h[0],) * count)
    with pytest.raises(ValueError, match="Recurrent: Expected input to be 2D or 3D"):
        layer(x[0, 0])


def test_bad_arguments() -> None:
    def plain(u: Any, v: Any, h: Tensor) -> Tensor:
        return u.h + v.h + h

    with pytest.raises(TypeError, match=r"should be a fastrnn\.Cell, got: function; make one"):
        fastrnn.Recurrent(plain, 3, 5)  # type: ignore[arg-type]
    calls: list[dict[str, Any]] = [{"hidden_size": 0}, {"bias": 1}, {"dropout": 2.0}]
    for arguments in calls:
        given = {"input_size": 3, "hidden_size": 5, **arguments}
        same_error(
            partial(fastrnn.Recurrent, minimal, **given),
            partial(nn.GRU, **given),
        )
    with pytest.raises(TypeError, match="it is none of"):
        to_torch(fastrnn.Recurrent(minimal, 3, 5))


@cell_of
def test_check_methods(cell: Cell) -> None:
    layer = fastrnn.Recurrent(cell, 3, 5)
    x, hx = torch.randn(4, 2, 3), start(cell, 1, 2, 5)
    layer.check_forward_args(x, hx, None)
    order = torch.tensor([1, 0])
    swapped: Callable[[Any], list[Tensor]] = lambda s: [t[:, [1, 0]] for t in flatten(s)]  # noqa: E731
    assert_same(layer.permute_hidden(hx, order), swapped(hx))
    assert layer.permute_hidden(hx, None) is hx
