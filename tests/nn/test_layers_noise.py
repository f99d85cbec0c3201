"""Layers whose cells draw random numbers in training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import cells, kernels
from fastrnn.cells.variants import unclipped
from tests.support.forms import FORMS, call, given, with_gradients
from tests.support.kernels import planned
from tests.support.shared import noisy, noisy_staged
from tests.support.tensors import flatten

F64 = torch.float64
CELLS = {"pointwise": noisy, "staged": noisy_staged}
each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))


def layer_of(cell: cells.Cell, hidden: int = 33, layers: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    return fastrnn.Recurrent(cell, 3, hidden, layers, dtype=F64, **options)


@each_cell
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("hidden", "steps", "batch", "options"),
    [
        (1, 3, 2, {}),
        (5, 4, 3, {"bias": False}),
        (64, 5, 4, {"heads": 2}),
        (130, 4, 9, {"num_layers": 2, "bidirectional": True}),
    ],
)
def test_kernel_and_reference_draw_the_same(
    cell: cells.Cell, form: str, hidden: int, steps: int, batch: int, options: dict[str, Any]
) -> None:
    options = {**options}
    layer = layer_of(cell, hidden, options.pop("num_layers", 1), **options)
    x, states = given(layer, steps, batch)
    ours = with_gradients(layer, form, x, states)
    with kernels.use("reference"):
        theirs = with_gradients(layer, form, x, states)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dtype_draws_the_same(cell: cells.Cell, dtype: torch.dtype) -> None:
    layer = layer_of(cell, 70)
    x, states = given(layer, 4, 5)
    exact = call(layer, "dense", x, states)[0]
    rounded = call(layer.to(dtype), "dense", x.to(dtype), tuple(s.to(dtype) for s in states))[0]
    torch.testing.assert_close(rounded.double(), exact, rtol=0.1, atol=0.1)
    if cell is noisy:
        assert torch.equal(rounded == 0, exact == 0)
        assert 0.3 < (exact == 0).double().mean() < 0.7


@each_cell
@pytest.mark.parametrize(
    "changes",
    [
        {"split_sequences": 2},
        {"split_recurrences": 2},
        {"split_units": 2},
        {"chunk_rows": 6},
        {"weights": "unpacked"},
    ],
    ids=str,
)
def test_numbers_do_not_depend_on_the_plan(cell: cells.Cell, changes: dict[str, Any]) -> None:
    layer = layer_of(cell, 130, bidirectional=True)
    x, states = given(layer, 7, 6)
    usual = with_gradients(layer, "lengths", x, states)
    with planned(**changes):
        changed = with_gradients(layer, "lengths", x, states)
    for a, b in zip(usual, changed, strict=True):
        assert torch.equal(a, b)


@each_cell
def test_recomputation_draws_the_same(cell: cells.Cell) -> None:
    layer = layer_of(cell, 20, 2)
    x, states = given(layer, 5, 3)
    usual = with_gradients(layer, "dense", x, states)
    layer.recompute = True
    for a, b in zip(usual, with_gradients(layer, "dense", x, states), strict=True):
        assert torch.equal(a, b)

    def part(x: Tensor) -> Tensor:
        return layer(x)[0]

    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    (plain,) = torch.autograd.grad(part(leaf).square().sum(), leaf)
    torch.manual_seed(5)
    y: Any = checkpoint(part, leaf, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), leaf)[0], plain)


@each_cell
def test_packing_keeps_the_numbers_of_a_sequence(cell: cells.Cell) -> None:
    layer = layer_of(cell)
    x, states = given(layer, 6, 5)
    lengths = (torch.arange(5) * 5 % 6) + 1
    torch.manual_seed(3)
    packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), states)
    torch.manual_seed(3)
    padded = layer(x, states, lengths=lengths)
    y, _ = pad_packed_sequence(packed[0], total_length=6)
    assert torch.equal(y, padded[0])
    for a, b in zip(packed[1], padded[1], strict=True):
        assert torch.equal(a, b)


@each_cell
def test_double_backward_draws_the_same(cell: cells.Cell) -> None:
    layer = layer_of(cell, 2)
    x, states = given(layer, 2, 2)

    def function(x: Tensor, *states: Tensor) -> Tensor:
        torch.manual_seed(4)
        y: Tensor = layer(x, states)[0]
        return y

    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in states)]
    assert torch.autograd.gradgradcheck(function, leaves)


@each_cell
def test_the_seed_is_that_of_torch(cell: cells.Cell) -> None:
    layer = layer_of(cell)
    x, states = given(layer, 4, 3)
    first, again = call(layer, "dense", x, states), call(layer, "dense", x, states)
    other = call(layer, "dense", x, states, seed=4)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    # Layers and directions draw numbers of their own.
    deep = layer_of(noisy, 64, 2, bidirectional=True) if cell is noisy else None
    if deep:
        y = call(deep, "dense", *given(deep, 4, 3))[0]
        assert not torch.equal(y[..., :64] == 0, y[..., 64:] == 0)


@each_cell
def test_evaluation_draws_nothing(cell: cells.Cell) -> None:
    layer = layer_of(cell, 16).eval()
    x, states = given(layer, 4, 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    y = layer(x, states)[0]
    assert torch.equal(torch.get_rng_state(), before)
    loop = []
    s = [state[0] for state in states]
    w = layer._weights()[0]
    for step in x:
        u = torch.nn.functional.linear(step, w.w_ih, w.b_ih).chunk(4, -1)

        def project(h: Tensor) -> Any:
            return torch.nn.functional.linear(h, w.w_hh, w.b_hh).chunk(4, -1)

        s = cell.step(u, project(s[0]), s, w.params, project)
        loop.append(s[0])
    torch.testing.assert_close(y, torch.stack(loop))
    frozen = fastrnn.freeze(copy.deepcopy(layer).train())
    with torch.no_grad():
        torch.testing.assert_close(frozen(x, states)[0], y)
    stepper = layer.stream(batch_size=3)
    with torch.no_grad():
        torch.testing.assert_close(stepper.step(x[0]), layer(x[:1])[0][0])


def test_compiled_graphs_draw_anew() -> None:
    layer = layer_of(replace(noisy), 16)  # a cell whose draws no call has asked for yet
    x, states = given(layer, 4, 3)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    ours = compiled(x, states)
    for a, b in zip(flatten(ours), call(layer, "dense", x, states), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(compiled(x, states)[0], ours[0])


VARIANTS: dict[str, Any] = {
    "plain": {},
    "two layers, both directions": {"layers": 2, "bidirectional": True},
    "variants": {"zoneout": 0.25, "recurrent_dropout": 0.5, "clip_grad_step": 0.02},
}


@pytest.mark.filterwarnings("ignore:.*loop of torch operations")
@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_compiled_graphs_of_the_reference_draw_the_same(options: dict[str, Any]) -> None:
    """Of a cell that no code is derived for: its steps are operations of the graph."""

    @fastrnn.cell(gates="h", states="h")
    def running_sum(u: Any, v: Any, h: Tensor) -> Tensor:
        return fastrnn.dropout(0.1 * torch.tanh(u.h + v.h).cumsum(-1), 0.5)

    layer = layer_of(running_sum, 5, **options)
    x = torch.randn(4, 3, 3, dtype=F64, requires_grad=True)

    def gradients(function: Any) -> list[Tensor]:
        torch.manual_seed(3)
        y = function(x)[0]
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert bool(ours.any())
    assert not torch.equal(compiled(x)[0], compiled(x)[0])


def test_vmap_draws_for_every_member() -> None:
    layer = layer_of(noisy, 5)
    x, _ = given(layer, 4, 3)

    def run(x: Tensor) -> Any:
        return layer(x)[0]

    y: Any = torch.func.vmap(run, randomness="different")(x.expand(3, -1, -1, -1).clone())
    assert y.shape == (3, 4, 3, 5)
    assert not torch.equal(y[0], y[1])


LAYERS: dict[str, Any] = {"RNN": fastrnn.RNN, "GRU": fastrnn.GRU, "LSTM": fastrnn.LSTM}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("per", ["step", "sequence"])
def test_keywords_of_layers(kind: str, per: str) -> None:
    """Against a loop over torch operations with the same numbers."""
    options = {"zoneout": 0.25, "recurrent_dropout": 0.5, "recurrent_dropout_per": per}
    torch.manual_seed(0)
    layer = LAYERS[kind](3, 17, dtype=F64, clip_grad_step=0.02, **options)
    x, states = given(layer, 6, 4)
    with planned():
        ours = with_gradients(layer, "dense", x, states if kind == "LSTM" else states[:1])
    with kernels.use("reference"):
        theirs = with_gradients(layer, "dense", x, states if kind == "LSTM" else states[:1])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for name in ("zoneout=0.25", "recurrent_dropout=0.5", "clip_grad_step=0.02"):
        assert name in repr(layer)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again._noisy == layer._noisy
        copied = call(again, "dense", x, None)
        assert all(map(torch.equal, copied, call(layer, "dense", x, None)))
    with pytest.raises(TypeError, match=r"torch.nn has no zoneout"):
        fastrnn.to_torch(layer)


def test_zoneout_keeps_states_at_its_rate() -> None:
    layer: Any = fastrnn.LSTM(3, 256, dtype=F64, zoneout=(0.1, 0.4))
    x, states = given(layer, 20, 4)
    torch.manual_seed(0)
    y, _, ((_, c),) = layer(x, states, return_states=True)
    for state, rate in ((y, 0.1), (c, 0.4)):
        share = (state[1:] == state[:-1]).double().mean().item()
        assert abs(share - rate) < 0.02
    # In evaluation a state is the mean.
    layer.eval()
    fresh: Any = fastrnn.LSTM(3, 256, dtype=F64)
    fresh.load_state_dict(layer.state_dict())
    (h, c), (new_h, new_c) = layer(x[:1], states)[1], fresh(x[:1], states)[1]
    torch.testing.assert_close(h, 0.1 * states[0] + 0.9 * new_h)
    torch.testing.assert_close(c, 0.4 * states[1] + 0.6 * new_c)


@pytest.mark.parametrize("per", ["step", "sequence"])
def test_recurrent_dropout_drops_what_the_weights_multiply(per: str) -> None:
    layer: Any = fastrnn.RNN(2, 64, bias=False, recurrent_dropout=0.5, recurrent_dropout_per=per)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.eye(64))
        layer.weight_ih_l0.fill_(1)
    y = layer(torch.full((5, 3, 2), 0.1))[0]
    # A unit whose state was dropped sees the input alone.
    dropped = (y[1:] - torch.tanh(torch.tensor(0.2))).abs() < 1e-6
    assert 0.4 < dropped.float().mean() < 0.6
    assert torch.equal(dropped[0], dropped[1]) == (per == "sequence")


def test_clipping_bounds_what_goes_back() -> None:
    torch.manual_seed(0)
    plain: Any = fastrnn.RNN(2, 8, nonlinearity="relu", dtype=F64)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(3 * torch.eye(8))
    layer: Any = fastrnn.RNN(2, 8, nonlinearity="relu", dtype=F64, clip_grad_step=0.5)
    layer.load_state_dict(plain.state_dict())
    grads = []
    for each in (plain, layer):
        h0 = torch.ones(1, 3, 8, dtype=F64, requires_grad=True)
        y = each(torch.zeros(20, 3, 2, dtype=F64), h0)[0]
        grads.append(torch.autograd.grad(y[-1].sum(), h0)[0])
    assert grads[0].max() > 1e6
    assert grads[1].abs().max() <= 0.5 * 3
    torch.testing.assert_close(
        layer(torch.zeros(4, 3, 2, dtype=F64))[0], plain(torch.zeros(4, 3, 2, dtype=F64))[0]
    )


def clipped_loop(layer: Any, x: Tensor, states: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Output, final states, and states past the first after every step, of one layer in one
    direction, by hooks on the states themselves."""
    w, (cell, _) = layer._weights()[0], unclipped(layer._cell())
    s = [state[0] for state in states]
    every: list[list[Tensor]] = [[] for _ in s]
    for row in x:
        u = torch.nn.functional.linear(row, w.w_ih, w.b_ih).chunk(len(cell.gates), -1)
        v = torch.nn.functional.linear(s[0], w.w_hh, w.b_hh).chunk(len(u), -1)
        before = s if w.w_hr is None else [torch.zeros_like(s[1]), *s[1:]]
        s = cell.step(u, v, before, w.params)
        if w.w_hr is not None:
            s[0] = s[0] @ w.w_hr.T
        s = [state.clone() for state in s]  # after the step, in which h reads c
        for states_of, state in zip(every, s, strict=True):
            state.register_hook(lambda gradient: gradient.clamp(-limit, limit))
            states_of.append(state)
    y, *others = (torch.stack(states_of) for states_of in every)
    return [y, *(state[None] for state in s), *others]


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize(
    "kind", ["GRU", "LSTM", "LayerNormLSTM", "projected LSTM", "projected LayerNormLSTM"]
)
def test_clipping_is_of_the_gradients_of_states(kind: str, kernel: str) -> None:
    """Those of h, after a projection, and of c."""
    limit, options = 0.05, {"proj_size": 5} if "projected" in kind else {}
    make = getattr(fastrnn, kind.split()[-1])
    layer = make(3, 17, dtype=F64, clip_grad_step=limit, **options)
    x = torch.randn(7, 4, 3, dtype=F64, requires_grad=True)
    states = [torch.randn_like(s).requires_grad_() for s in flatten(layer(x.detach())[1])]
    leaves = [x, *states, *layer.parameters()]
    dy = torch.randn(7, 4, options.get("proj_size", 17), dtype=F64)
    count = len(states)

    def gradients(out: Any, every_step: bool = False) -> list[Tensor]:
        y, *others = flatten(out)
        states = others if every_step else others[:count]
        total = (y * dy).sum() + torch.stack([state.sum() for state in states]).sum()
        return [y.detach(), *torch.autograd.grad(total, leaves)]

    def assert_same(ours: list[Tensor], right: list[Tensor]) -> None:
        for one, theirs in zip(ours, right, strict=True):
            torch.testing.assert_close(one, theirs, rtol=1e-9, atol=1e-11)

    hx = tuple(states) if len(states) > 1 else states[0]
    right = gradients(clipped_loop(layer, x, states, limit))
    with kernels.use(kernel):
        assert_same(gradients(layer(x, hx)), right)
        layer.recompute = True
        assert_same(gradients(layer(x, hx)), right)
        layer.recompute = False
        torch._dynamo.reset()
        compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_same(gradients(compiled(x, hx)), right)
        y, last, ((_, *every),) = layer(x, hx, return_states=True)
    ours = gradients([y, *flatten(last), *every], every_step=True)
    assert_same(ours, gradients(clipped_loop(layer, x, states, limit), every_step=True))
    without = gradients(clipped_loop(layer, x, states, 100.0))
    assert all((a - b).abs().max() > 0.01 for a, b in zip(without[1:], right[1:], strict=True))


def test_faulty_arguments() -> None:
    with pytest.raises(ValueError, match=r"a probability from 0 to 1, got 1\.5"):
        fastrnn.LSTM(2, 3, zoneout=1.5)
    with pytest.raises(ValueError, match="one for each of the states h, c, got 3"):
        fastrnn.LSTM(2, 3, zoneout=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="states that are not projected"):
        fastrnn.LSTM(2, 3, proj_size=2, zoneout=0.1)
    with pytest.raises(ValueError, match="recurrent_dropout is for states that are not projected"):
        fastrnn.LSTM(2, 3, proj_size=2, recurrent_dropout=0.1)
    with pytest.raises(ValueError, match="per='step' or per='sequence', got 'batch'"):
        fastrnn.GRU(2, 3, recurrent_dropout_per="batch")
    with pytest.raises(ValueError, match="a positive limit, got 0"):
        fastrnn.RNN(2, 3, clip_grad_step=0)


def test_draws_that_change_are_refused() -> None:
    calls = iter(range(100))

    @fastrnn.cell(gates="h", states="h")
    def changing(u: Any, v: Any, h: Tensor) -> Tensor:
        x = torch.tanh(u.h + v.h)
        return fastrnn.dropout(x, 0.1) if next(calls) % 2 == 0 else x

    layer = fastrnn.Recurrent(changing, 2, 3)
    with pytest.raises(ValueError, match="draws other random numbers each time"):
        layer(torch.zeros(4, 1, 2))


def test_draws_that_cannot_be_found_are_refused() -> None:
    """Not ignored: a layer that trains without its noise looks like one that trains."""
    scale = torch.ones(3)

    @fastrnn.cell(gates="h", states="h")
    def narrow(u: Any, v: Any, h: Tensor) -> Tensor:
        return fastrnn.dropout(torch.tanh(u.h + v.h) * scale, 0.5)

    layer = fastrnn.Recurrent(narrow, 2, 3)
    with pytest.warns(UserWarning, match="loop of torch operations"):
        assert layer.eval()(torch.zeros(4, 1, 2))[0].shape == (4, 1, 3)
    layer.train()
    said = r"'narrow' draws random numbers, .* of shape \[1, 2\], .* fails: The size of tensor a"
    for _ in range(2):  # the first call prepares the cell
        for fullgraph, error in ((True, torch._dynamo.exc.Unsupported), (False, ValueError)):
            compiled: Any = torch.compile(layer, backend="eager", fullgraph=fullgraph)
            with pytest.raises(error, match=said):
                compiled(torch.zeros(4, 1, 2))
            torch._dynamo.reset()  # else Dynamo does not compile the code again that raised
    with pytest.raises(ValueError, match=said) as eager:
        layer(torch.zeros(4, 1, 2))
    assert isinstance(eager.value.__cause__, RuntimeError)
