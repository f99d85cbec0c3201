"""Frozen modules: they give the numbers of before, and never those of weights changed since."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import kernels
from fastrnn.kernels.operands import Operands
from tests.support.names import DTYPES
from tests.support.shared import minimal
from tests.support.tensors import batches, flatten

CHANGED = "changed or replaced after freezing"


def layer(name: str, *sizes: int, **kwargs: Any) -> nn.Module:
    kind: Any = getattr(fastrnn, name)
    if name == "Recurrent":
        return kind(minimal, *sizes, **kwargs)
    return kind(*sizes, **kwargs)


def assert_same(ours: Any, theirs: Any) -> None:
    for one, other in zip(flatten(ours), flatten(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def spoil(module: Any) -> None:
    """Changes what was packed, and nothing else: who does not read it notices nothing."""
    for packed in module._frozen.layers:
        for each in packed.weights:
            each.mul_(2)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("RNN", {}),
        ("RNN", {"nonlinearity": "relu", "bias": False}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        ("LSTM", {"num_layers": 3, "batch_first": True}),
        ("LSTM", {"proj_size": 5, "bidirectional": True, "num_layers": 2}),
        ("LSTM", {"proj_size": 61, "bias": False}),
        ("Recurrent", {"bidirectional": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(1, 1, 3, 63), (9, 3, 7, 65), (2, 17, 1, 130)], ids=str)
def test_results_are_those_of_the_layer(
    name: str, kwargs: dict[str, Any], sizes: tuple[int, int, int, int]
) -> None:
    steps, batch, inputs, hidden = sizes
    module = layer(name, inputs, hidden, dtype=torch.float64, **kwargs)
    first, second = (batch, steps) if kwargs.get("batch_first") else (steps, batch)
    x = torch.randn(first, second, inputs, dtype=torch.float64)
    resets = torch.rand(first, second) < 0.3
    lengths = torch.randint(0, steps + 1, (batch,))
    packed = pack_sequence(batches([steps] * batch, inputs), enforce_sorted=False)
    calls: list[Callable[[], Any]] = [
        lambda: module(x),
        lambda: module(x, states),
        lambda: module(x, lengths=lengths, resets=resets),
        lambda: module(packed),
        lambda: module(x[0]),
    ]
    with torch.no_grad():
        states = module(x)[1]
        before = [call() for call in calls]
        assert fastrnn.freeze(module) is module
        for call, expected in zip(calls, before, strict=True):
            assert_same(call(), expected)
        spoil(module)
        assert not torch.equal(flatten(module(x))[0], flatten(before[0])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    module = layer(name, 7, 33, dtype=dtype).requires_grad_(False)
    x = torch.randn(5, 3, 7, dtype=dtype)
    before = module(x)
    for one, other in zip(flatten(fastrnn.freeze(module)(x)), flatten(before), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(name: str, bias: bool) -> None:
    cell = getattr(fastrnn, name)(5, 33, bias=bias, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(3, 5, dtype=torch.float64)
    hx = cell(x)
    before = [cell(x), cell(x[0]), cell(x, hx)]
    fastrnn.freeze(cell)
    for given, expected in zip([(x,), (x[0],), (x, hx)], before, strict=True):
        assert_same(cell(*given), expected)
    spoil(cell)
    assert not torch.equal(flatten(cell(x))[0], flatten(before[0])[0])


def replaced(module: Any) -> None:
    weight = module.weight_hh_l0
    module.weight_hh_l0 = nn.Parameter(weight * 2, requires_grad=False)


def optimised(module: Any) -> None:
    module.bias_ih_l0.grad = torch.ones_like(module.bias_ih_l0)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight_ih_l0.add_(1),
        lambda m: nn.init.orthogonal_(m.weight_hh_l0),
        lambda m: m.bias_hh_l0[0].zero_(),
        lambda m: m.weight_hh_l0.numpy().fill(0),
        lambda m: m.weight_hh_l0.data.mul_(2),
        lambda m: m.weight_hh_l0.data[3, 1].add_(1),
        lambda m: m.weight_hh_l0.view(-1)[7:8].zero_(),
        lambda m: m.bias_hh_l0.numpy().__setitem__(5, 3),
        lambda m: torch.utils.dlpack.from_dlpack(m.bias_ih_l0)[2:3].fill_(3),
        lambda m: setattr(m.weight_ih_l0, "data", m.weight_ih_l0.data.clone()),
        lambda m: m.reset_parameters(),
        lambda m: parametrize.register_parametrization(m, "weight_hh_l0", nn.Tanh()),
        replaced,
        optimised,
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_change_is_found_out(change: Callable[[nn.Module], object], compiled: bool) -> None:
    torch._dynamo.reset()
    module = fastrnn.freeze(fastrnn.GRU(5, 9, dtype=torch.float64))
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    call(x)
    with torch.no_grad():
        change(module)
        with pytest.raises(RuntimeError, match=CHANGED):
            call(x)
        expected = fastrnn.unfreeze(copy.deepcopy(module))(x)
        if not parametrize.is_parametrized(module):
            assert_same(fastrnn.freeze(module)(x), expected)
        assert_same(fastrnn.unfreeze(module)(x), expected)


@pytest.mark.parametrize("steps", [1, 7, 64])
@pytest.mark.parametrize("where", [0, 11_111, -1])
def test_one_number_of_a_large_weight_is_found_out(where: int, steps: int) -> None:
    """Past torch's count of changes: while at most 64 rows are computed."""
    module: Any = fastrnn.freeze(fastrnn.LSTM(16, 65))
    assert module.weight_hh_l0.nbytes > 16 << 10
    x = torch.randn(steps, 1, 16)
    for _ in range(3):
        module(x)
    module.weight_hh_l0.data.view(-1)[where] += 1
    with pytest.raises(RuntimeError, match=CHANGED):
        for _ in range(-(-64 // steps)):
            module(x)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_change_of_a_cell_is_found_out(name: str) -> None:
    cell = fastrnn.freeze(getattr(fastrnn, name)(5, 9))
    x = torch.randn(3, 5)
    cell(x)
    cell.bias_hh.numpy()[4] += 1
    with pytest.raises(RuntimeError, match=CHANGED):
        cell(x)
    fastrnn.freeze(cell)(x)
    with pytest.raises(RuntimeError, match="frozen and has no derivative"):
        cell(x.clone().requires_grad_())


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_cell_takes_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = fastrnn.freeze(getattr(fastrnn, name)(5, 9))
    monkeypatch.setattr(fastrnn.nn.functional, "rnn_cell", None)
    cell(torch.randn(3, 5), cell(torch.randn(3, 5)))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_cell_takes_special_tensors_for_what_they_are(name: str) -> None:
    """The memory of a negated view holds the negative of its numbers; a zero tensor has none."""
    cell = getattr(fastrnn, name)(5, 9).requires_grad_(False)
    frozen = fastrnn.freeze(copy.deepcopy(cell))
    x = torch.randn(3, 5)
    imaginary = torch.randn(3, 1, dtype=torch.complex64).conj().imag.expand(3, 5)
    for special in (torch._neg_view(x), imaginary, torch._efficientzerotensor(3, 5)):
        expected = cell(special.clone() if special.is_neg() else torch.zeros(3, 5))
        for module in (cell, frozen):
            for one, other in zip(flatten(module(special)), flatten(expected), strict=True):
                torch.testing.assert_close(one, other)


def test_what_was_trained_trains_again() -> None:
    module = fastrnn.freeze(fastrnn.GRU(5, 9))
    fastrnn.restore_(module)
    assert all(p.requires_grad for p in module.parameters())
    broken = fastrnn.GRU(5, 9)
    broken._flat_weights[1] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"w_hh should be \[27, 9\]"):
        fastrnn.freeze(broken)
    assert all(p.requires_grad for p in broken.parameters())


def reloaded(module: nn.Module, assign: bool) -> nn.Module:
    state = {name: value * 2 for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)
    return module


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "renew",
    [
        lambda m: reloaded(m, False),
        lambda m: reloaded(m, True),
        lambda m: m.to(torch.float32),
        lambda m: m.to(torch.bfloat16).double(),
        lambda m: m.share_memory(),
        copy.deepcopy,
        copy.copy,
        saved,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
)
def test_what_goes_through_the_module_packs_anew(
    renew: Callable[[nn.Module], Any],
) -> None:
    module = fastrnn.freeze(fastrnn.LSTM(5, 9, num_layers=2, dtype=torch.float64))
    again = renew(module)
    x = torch.randn(4, 3, 5, dtype=again.weight_ih_l0.dtype)
    frozen = again(x)
    plain = fastrnn.LSTM(5, 9, num_layers=2, dtype=x.dtype).requires_grad_(False)
    plain.load_state_dict(again.state_dict())
    assert_same(frozen, plain(x))
    spoil(again)
    assert not torch.equal(again(x)[0], frozen[0])


def test_copies_have_weights_of_their_own() -> None:
    module: Any = fastrnn.freeze(fastrnn.GRU(5, 9))
    other, x = copy.deepcopy(module), torch.randn(4, 3, 5)
    before = other(x)
    module.weight_hh_l0.add_(1)
    assert_same(other(x), before)
    with pytest.raises(RuntimeError, match=CHANGED):
        module(x)


def test_parameters_stay_and_are_not_trained() -> None:
    module = fastrnn.GRU(5, 9)
    module.bias_hh_l0.requires_grad_(False)
    names = list(module.state_dict())
    fastrnn.freeze(fastrnn.freeze(module))
    assert not any(p.requires_grad for p in module.parameters())
    assert list(module.state_dict()) == names
    fastrnn.unfreeze(module)
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["bias_hh_l0"]
    module(torch.randn(3, 2, 5))[0].sum().backward()
    assert module.weight_ih_l0.grad is not None


def test_no_derivative_is_said_and_not_lost() -> None:
    module = fastrnn.freeze(fastrnn.GRU(5, 9))
    x = torch.randn(4, 3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"frozen.*no_grad.*unfreeze"):
        module(x)
    with pytest.raises(RuntimeError, match="frozen"):
        module(x.detach(), torch.zeros(1, 3, 9, requires_grad=True))
    with torch.no_grad():
        assert not module(x)[0].requires_grad
    with torch.inference_mode():
        module(x)
    module.weight_ih_l0.requires_grad_()
    with pytest.raises(RuntimeError, match="frozen"):
        module(x.detach())


def test_a_whole_model() -> None:
    model = nn.Sequential(nn.Linear(4, 5), fastrnn.GRU(5, 9))
    x = torch.randn(6, 2, 4)
    with torch.no_grad():
        before = model(x)
        assert_same(fastrnn.freeze(model)(x), before)
    assert model[0].weight.requires_grad
    with pytest.raises(RuntimeError, match="no_grad"):
        model(x)


def test_what_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="replace_"):
        fastrnn.freeze(nn.LSTM(3, 4))
    for function in (fastrnn.freeze, fastrnn.unfreeze):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function("lstm")  # type: ignore[type-var]
    model = nn.Sequential(fastrnn.RNN(3, 4), fastrnn.GRU(3, 4))
    prune.random_unstructured(model[1], "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match=r"weight_hh_l0 of 1 .*permanent"):
        fastrnn.freeze(model)
    assert all(p.requires_grad for p in model.parameters())
    prune.remove(model[1], "weight_hh_l0")
    fastrnn.freeze(model)


def test_where_another_kernel_runs_the_parameters_do() -> None:
    module = fastrnn.GRU(5, 9).requires_grad_(False)
    x = torch.randn(4, 3, 5)
    calls = [
        lambda: torch.func.vmap(module, 1)(x.unsqueeze(1)),
        lambda: torch.export.export(module, (x,)).module()(x),
        lambda: within(torch.autocast("cpu", torch.bfloat16)),
        lambda: within(kernels.use("reference")),
        lambda: fastrnn.to_torch(module)(x),
    ]

    def within(context: Any) -> Any:
        with context:
            return module(x)

    before = [call() for call in calls]
    fastrnn.freeze(module)
    for call, expected in zip(calls, before, strict=True):
        assert_same(call(), expected)


@pytest.mark.filterwarnings("ignore:cell")
def test_a_cell_without_compiled_code() -> None:
    cell = fastrnn.cell(gates="h", states="h", name="frozen_summing")(
        lambda u, v, h: torch.tanh(u.h + v.h).cumsum(-1)
    )
    module = fastrnn.Recurrent(cell, 3, 4).requires_grad_(False)
    x = torch.randn(5, 2, 3)
    before = module(x)
    assert_same(fastrnn.freeze(module)(x), before)


def test_compiled() -> None:
    torch._dynamo.reset()
    module: Any = fastrnn.freeze(fastrnn.LSTM(5, 9, num_layers=2, bidirectional=True))
    x = torch.randn(4, 3, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), module(x))
    module.weight_hh_l1.mul_(2)
    fastrnn.freeze(module)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(compiled(x), module(x))


def test_the_way_back_to_torch() -> None:
    model = nn.Sequential(nn.LSTM(5, 9))
    x = torch.randn(4, 3, 5)
    fastrnn.replace_(model)
    fastrnn.freeze(model)
    fastrnn.restore_(model)
    assert type(model[0]) is nn.LSTM and "_frozen" not in vars(model[0])
    model(x)


def test_the_operator_checks_what_it_is_given() -> None:
    module = fastrnn.freeze(fastrnn.GRU(5, 9))
    packed: Any
    assert module._frozen is not None
    (packed,) = module._frozen.layers
    w_ih, w_hh, b_ih, b_hh = ([w] for w in module._weights()[0].present())

    def call(*last: Any) -> Any:
        given = Operands(torch.randn(4, 3, 5), w_ih, w_hh, b_ih, b_hh)
        return torch.ops.fastrnn.scan_packed("gru", *given, *last)

    call(*packed)
    for weights in ([packed.weights[0][:-1]], [packed.weights[0].double()], packed.weights * 2):
        with pytest.raises(RuntimeError, match="packed"):
            call(weights, packed.fingerprint, packed.format)
    with pytest.raises(RuntimeError, match=CHANGED):
        call(packed.weights, packed.fingerprint + 1, packed.format)
