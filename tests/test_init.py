"""Initial values of layers and cells, gate by gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastrnn
from fastrnn import init
from tests.support.weights import Doubled

LAYERS = [fastrnn.LSTM, nn.LSTM, fastrnn.GRU, nn.GRU, fastrnn.RNN, nn.RNN]
CELLS = [fastrnn.LSTMCell, nn.LSTMCell, fastrnn.GRUCell, nn.GRUCell, fastrnn.RNNCell, nn.RNNCell]
every = pytest.mark.parametrize("kind", [*LAYERS, *CELLS], ids=lambda k: f"{k.__module__}.{k}")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def made(kind: Any, **options: Any) -> Any:
    """A layer or cell with 3 inputs and 5 units; a layer has two layers and directions."""
    if issubclass(kind, nn.RNNBase):
        options = {"num_layers": 2, "bidirectional": True, **options}
    return kind(3, 5, **options)


def gates_of(kind: Any) -> int:
    return GATES[kind.__name__.removesuffix("Cell")]


def named(module: nn.Module, part: str) -> list[Tensor]:
    """The weights of all layers and directions whose names begin with `part`."""
    found = [p.detach() for name, p in module.named_parameters() if name.startswith(part)]
    assert len(found) == (4 if isinstance(module, nn.RNNBase) else 1)
    return found


def biases(module: nn.Module) -> list[Tensor]:
    pairs = zip(named(module, "bias_ih"), named(module, "bias_hh"), strict=True)
    return [a + b for a, b in pairs]


def others_as_before(module: nn.Module, before: dict[str, Tensor], *parts: str) -> bool:
    return all(
        torch.equal(p, before[name])
        for name, p in module.named_parameters()
        if not name.startswith(parts)
    )


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@every
def test_each_recurrent_block_is_orthogonal(kind: Any) -> None:
    module = made(kind)
    before = copied(module)
    assert init.orthogonal_(module, gain=2.0) is module
    for weight in named(module, "weight_hh"):
        for block in weight.chunk(gates_of(kind)):
            torch.testing.assert_close(block @ block.T, 4 * torch.eye(5))
    assert others_as_before(module, before, "weight_hh")
    assert all(p.requires_grad for p in module.parameters())


def test_blocks_of_heads_and_projections_are_orthogonal() -> None:
    layer: Any = init.orthogonal_(fastrnn.GRU(3, 8, heads=2))
    for block in layer.weight_hh_l0.detach().reshape(6, 4, 4):
        torch.testing.assert_close(block @ block.T, torch.eye(4))
    layer = init.orthogonal_(fastrnn.LSTM(3, 8, proj_size=5))
    for block in layer.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(block.T @ block, torch.eye(5))


def test_sixteen_bits_become_orthogonal() -> None:
    layer: Any = init.orthogonal_(fastrnn.RNN(3, 5, dtype=torch.bfloat16))
    weight = layer.weight_hh_l0.detach().float()
    assert (weight @ weight.T - torch.eye(5)).abs().max() < 0.02


@every
def test_input_blocks_are_xaviers(kind: Any) -> None:
    module = kind(300, 500)
    before = copied(module)
    init.xavier_uniform_(module, gain=2.0)
    (weight,) = (p.detach() for name, p in module.named_parameters() if "weight_ih" in name)
    limit = 2 * (6 / 800) ** 0.5
    for block in weight.chunk(gates_of(kind)):
        assert 0.99 * limit < block.abs().max() <= limit
        assert abs(block.std() / (limit / 3**0.5) - 1) < 0.02
    assert others_as_before(module, before, "weight_ih")


@pytest.mark.parametrize("kind", [fastrnn.LSTM, nn.LSTM, fastrnn.LSTMCell, nn.LSTMCell])
def test_the_forget_gate_of_an_lstm(kind: Any) -> None:
    module = made(kind)
    before = copied(module)
    assert init.forget_gate_bias_(module, 1.5) is module
    for bias in biases(module):
        assert (bias[5:10] == 1.5).all() and (bias[:5] != 1.5).all() and (bias[10:] != 1.5).all()
    assert others_as_before(module, before, "bias")
    rest = torch.cat([torch.arange(5), torch.arange(10, 20)])
    name = "bias_ih_l1_reverse" if isinstance(module, nn.RNNBase) else "bias_ih"
    assert torch.equal(dict(module.named_parameters())[name][rest], before[name][rest])


def test_the_forget_gate_of_other_cells() -> None:
    layer: Any = init.forget_gate_bias_(fastrnn.Recurrent(fastrnn.cells.peephole_lstm, 3, 5), 2.0)
    assert ((layer.bias_ih_l0 + layer.bias_hh_l0)[5:10] == 2).all()
    layer = init.forget_gate_bias_(fastrnn.GRU(3, 5), 2.0, gate="z")
    assert ((layer.bias_ih_l0 + layer.bias_hh_l0)[5:10] == 2).all()
    layer = init.forget_gate_bias_(fastrnn.LSTM(3, 6, heads=2), 2.0)
    assert ((layer.bias_ih_l0 + layer.bias_hh_l0)[:, 3:6] == 2).all()
    layer = init.forget_gate_bias_(fastrnn.LSTM(3, 5, zoneout=0.1, clip_grad_step=1.0), 2.0)
    assert ((layer.bias_ih_l0 + layer.bias_hh_l0)[5:10] == 2).all()


def test_a_larger_bias_remembers_longer() -> None:
    """`h` returns later to what the input alone would give."""
    layer, x = fastrnn.LSTM(3, 5), torch.zeros(20, 1, 3)
    distances = []
    for bias in (-1.0, 3.0):
        init.forget_gate_bias_(layer, bias)
        starts = [(torch.zeros(1, 1, 5), torch.full((1, 1, 5), c)) for c in (0.0, 1.0)]
        one, other = (layer(x, start)[0][-1] for start in starts)
        distances.append((one - other).norm().item())
    assert distances[0] < 1e-4 < 1e-2 < distances[1]


@pytest.mark.parametrize("kind", [fastrnn.GRU, nn.GRU, fastrnn.RNNCell, nn.RNNCell])
def test_without_a_forget_gate(kind: Any) -> None:
    gates = "r, z, n; a GRU's update gate is gate='z'" if "GRU" in kind.__name__ else "h"
    with pytest.raises(ValueError, match=f"{kind.__name__} has no gate 'f': its gates are {gates}"):
        init.forget_gate_bias_(kind(3, 5))


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        *(("lstm", "f"), ("gru", "z"), ("janet", "f"), ("peephole_lstm", "f"), ("ran", "f")),
        *(("slstm", "f"), ("ligru", "z"), ("ugrnn", "g"), ("nbrc", "c"), ("cfn", "theta")),
    ],
)
def test_forget_gates_of_cells(name: str, gate: str) -> None:
    layer: Any = fastrnn.Recurrent(fastrnn.cells.get(name), 3, 5)
    init.forget_gate_bias_(layer, 2.5, gate)
    own = layer.bias_ih_l0.view(-1, 5)[layer.cell.inputs.index(gate)]
    other = layer.bias_hh_l0.view(-1, 5)[layer.cell.recurrent.index(gate)]
    assert (own + other == 2.5).all()


@pytest.mark.parametrize(
    ("name", "gate"),
    [("mgu", "f"), ("star", "k"), ("lstm", "i"), ("lstm", "o"), ("gru", "r"), ("nbrc", "a")],
)
def test_other_gates_are_no_forget_gates(name: str, gate: str) -> None:
    layer = fastrnn.Recurrent(fastrnn.cells.get(name), 3, 5)
    with pytest.raises(ValueError, match=f"gate '{gate}' of cell '{name}' is no forget gate: "):
        init.forget_gate_bias_(layer, 1.0, gate)


def test_without_biases() -> None:
    for write in (init.forget_gate_bias_, lambda module: init.chrono_(module, 9)):
        with pytest.raises(
            ValueError, match="this LSTM has no biases: it was made with bias=False"
        ):
            write(nn.LSTM(3, 5, bias=False))
    layer: Any = init.identity_(init.orthogonal_(init.xavier_uniform_(nn.RNN(3, 5, bias=False))))
    assert torch.equal(layer.weight_hh_l0, torch.eye(5))
    init.orthogonal_(fastrnn.GRUCell(3, 5, bias=False))


@pytest.mark.parametrize("kind", [fastrnn.LSTM, nn.LSTM, fastrnn.LSTMCell, nn.LSTMCell])
def test_chrono_of_an_lstm(kind: Any) -> None:
    module = kind(3, 2000)
    init.chrono_(module, 101)
    i, f, _, _ = (
        sum(p for name, p in module.named_parameters() if name.startswith("bias")).detach().chunk(4)
    )
    assert torch.equal(i, -f)
    steps = f.exp()  # uniform between 1 and 100
    assert steps.min() >= 1 and steps.max() <= 100.01
    assert abs(steps.mean() - 50.5) < 3 and abs(steps.std() - 99 / 12**0.5) < 2


def test_chrono_of_other_cells() -> None:
    layer: Any = init.chrono_(fastrnn.GRU(3, 5, bidirectional=True), 50)
    before = copied(layer)
    for suffix in ("l0", "l0_reverse"):
        bias = getattr(layer, f"bias_ih_{suffix}") + getattr(layer, f"bias_hh_{suffix}")
        assert (bias[5:10] > 0).all() and (bias[5:10].exp() < 49.01).all()
    init.chrono_(layer, 50)
    assert torch.equal(before["bias_ih_l0"][:5], layer.bias_ih_l0[:5])
    layer = init.chrono_(fastrnn.Recurrent(fastrnn.cells.janet, 3, 5), 50)
    assert (layer.bias_ih_l0[:5] > 0).all() and not layer.bias_hh_l0[:5].any()
    with pytest.raises(ValueError, match=r"RNN has no gate 'f': its gates are h$"):
        init.chrono_(nn.RNN(3, 5), 50)
    with pytest.raises(ValueError, match="should have more than 2 steps, got 2"):
        init.chrono_(nn.LSTM(3, 5), 2)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [fastrnn.RNN, nn.RNN, fastrnn.RNNCell, nn.RNNCell])
def test_an_identity_carries_the_state(kind: Any) -> None:
    module = init.identity_(made(kind, nonlinearity="relu"))
    for weight in named(module, "weight_hh"):
        assert torch.equal(weight, torch.eye(5))
    for weight in named(module, "weight_ih"):
        assert 0 < weight.abs().max() < 0.01
    assert not any(bias.any() for bias in biases(module))
    if isinstance(module, nn.RNNBase):
        h = torch.rand(4, 2, 5)
        h_n = module(torch.zeros(30, 2, 3), h)[1]
        assert torch.equal(h_n[:2], h[:2])  # of the first layer, in both directions


def test_an_identity_of_other_cells() -> None:
    layer: Any = init.identity_(fastrnn.Recurrent(fastrnn.cells.rnn_tanh, 3, 6, heads=2))
    assert torch.equal(layer.weight_hh_l0, torch.eye(3).expand(2, 3, 3))
    with pytest.raises(ValueError, match="GRU has r, z, n; orthogonal_ is for any"):
        init.identity_(nn.GRU(3, 5))


FUNCTIONS = [
    init.orthogonal_,
    init.xavier_uniform_,
    init.forget_gate_bias_,
    init.identity_,
    lambda module: init.chrono_(module, 50),
]


@pytest.mark.parametrize("write", FUNCTIONS)
def test_other_modules_are_refused(write: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a recurrent layer or cell .*, got Linear; for"):
        write(nn.Linear(3, 5))
    layer = fastrnn.LSTM(3, 5)
    fastrnn.quantize_(layer, keep_float=False)
    with pytest.raises(RuntimeError, match=r"fastrnn\.dequantize_"):
        write(layer)


def test_a_parametrized_weight_is_assigned() -> None:
    layer: Any
    for layer in (nn.RNN(3, 5), fastrnn.RNN(3, 5)):
        parametrizations.weight_norm(layer, "weight_hh_l0")
        init.identity_(layer)
        torch.testing.assert_close(layer.weight_hh_l0.detach(), torch.eye(5))
    parametrize.register_parametrization(layer, "weight_ih_l0", Doubled())
    with pytest.raises(RuntimeError, match="right_inverse"):
        init.xavier_uniform_(layer)


def test_a_frozen_layer_says_that_it_changed() -> None:
    layer, x = fastrnn.freeze(fastrnn.LSTM(3, 5)), torch.randn(4, 2, 3)
    init.orthogonal_(layer)
    with pytest.raises(RuntimeError, match="changed or replaced after freezing"):
        layer(x)


def test_a_layer_trains_after_it() -> None:
    layer = init.chrono_(init.orthogonal_(fastrnn.LSTM(3, 5)), 20)
    layer(torch.randn(4, 2, 3))[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
