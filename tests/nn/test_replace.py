"""`replace_` and `restore_`: the things that they change, and those that stay."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from tests.support.models import PLACES, SIZES, model_with_all
from tests.support.tensors import sum_of

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


def run(module: nn.Module, seed: int = 0) -> list[Tensor]:
    """Outputs and states of a recurrent module on a fixed input."""
    random = torch.Generator().manual_seed(seed)
    cell = isinstance(module, nn.RNNCellBase)
    out = module(torch.randn(*((3, 5) if cell else (4, 3, 5)), generator=random))
    flat: list[Tensor] = []
    for item in out if isinstance(out, tuple) else (out,):
        flat += item if isinstance(item, tuple) else [item]
    return flat


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_replaces_all_classes_everywhere() -> None:
    model = model_with_all()
    report = fastrnn.replace_(model)
    for place, name in PLACES.items():
        assert type(model.get_submodule(place)) is getattr(fastrnn, name)
    assert {r.name: (r.before, r.after) for r in report.replaced} == {
        place: (f"torch.nn.{name}", f"fastrnn.{name}") for place, name in PLACES.items()
    }
    assert report.skipped == ()


def test_layers_are_no_longer_what_dynamo_refuses() -> None:
    model = model_with_all()
    fastrnn.replace_(model)
    for module in model.modules():
        assert not isinstance(module, (nn.LSTM, nn.GRU, nn.RNN))
    assert isinstance(model.get_submodule("cells.0"), nn.LSTMCell)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_gradients_stay(name: str) -> None:
    module = getattr(nn, name)(*SIZES)
    original = copy.deepcopy(module)
    fastrnn.replace_(module)
    assert_same(run(module), run(original))
    for m in (module, original):
        sum_of(out.square().sum() for out in run(m)).backward()
    assert_same([p.grad for p in module.parameters()], [p.grad for p in original.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True, "bias": False},
        {"batch_first": True, "num_layers": 3, "dropout": 0.5},
        {"proj_size": 3, "num_layers": 2},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_options_of_layers_stay(options: dict[str, Any]) -> None:
    module = nn.LSTM(*SIZES, **options)
    original = copy.deepcopy(module)
    text = repr(module)
    fastrnn.replace_(module)
    assert repr(module) == text
    x = torch.randn(4, 3, 5, dtype=options.get("dtype"))
    torch.manual_seed(0)
    expected, (h, c) = original(x)
    torch.manual_seed(0)
    y, states = module(x)
    assert_same([y, *states], [expected, h, c])


@pytest.mark.parametrize("name", NAMES)
def test_the_model_itself_may_be_a_recurrent_module(name: str) -> None:
    module = getattr(nn, name)(*SIZES)
    report = fastrnn.replace_(module)
    assert type(module) is getattr(fastrnn, name)
    assert report.replaced == (("", f"torch.nn.{name}", f"fastrnn.{name}"),)
    assert "(model)" in str(report)


def test_modules_parameters_and_order_are_the_same_objects() -> None:
    model = model_with_all()
    before = [*model.named_modules()], [*model.named_parameters()]
    state = model.state_dict()
    fastrnn.replace_(model)
    for old, new in zip(
        before, ([*model.named_modules()], [*model.named_parameters()]), strict=True
    ):
        assert [name for name, _ in old] == [name for name, _ in new]
        assert all(a is b for (_, a), (_, b) in zip(old, new, strict=True))
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr()
    model_with_all().load_state_dict(model.state_dict())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 7, num_layers=2, batch_first=True)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        random = torch.Generator().manual_seed(k)
        x, target = torch.randn(4, 6, 5, generator=random), torch.randn(4, 2, generator=random)
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def test_optimizer_goes_on_through_replace_and_restore() -> None:
    torch.manual_seed(0)
    plain = Net()
    swapped: Any = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (plain, swapped)]
    train(plain, optimizers[0], range(9))
    train(swapped, optimizers[1], range(3))
    fastrnn.replace_(swapped)
    train(swapped, optimizers[1], range(3, 6))
    moved = swapped.rnn.weight_hh_l0.detach().clone()
    fastrnn.restore_(swapped)
    train(swapped, optimizers[1], range(6, 9))
    assert not torch.equal(moved, swapped.rnn.weight_hh_l0)
    torch.testing.assert_close(
        list(plain.parameters()), list(swapped.parameters()), atol=1e-4, rtol=1e-3
    )
    assert {id(p) for p in swapped.parameters()} == {id(p) for p in optimizers[1].state}


@pytest.mark.parametrize("first", ["compile", "replace"])
def test_compiled_model_sees_the_replacement(first: str) -> None:
    torch._dynamo.reset()
    model: Any = Net()
    x = torch.randn(4, 6, 5)
    expected = model(x)
    if first == "compile":
        # Not fullgraph, because Dynamo refuses the torch.nn layer of the first call.
        compiled = torch.compile(model, backend="eager")
        assert_same([compiled(x)], [expected])
        fastrnn.replace_(model)
    else:
        fastrnn.replace_(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same([compiled(x)], [expected])
    with torch.no_grad():
        model.rnn.weight_hh_l1.zero_()
    assert_same([compiled(x)], [model(x)])
    assert not torch.allclose(compiled(x), expected)


def test_shared_modules_stay_shared() -> None:
    rnn = nn.GRU(5, 5)
    outside = [rnn]
    model: Any = nn.ModuleDict({"a": rnn, "b": nn.ModuleList([rnn])})
    report = fastrnn.replace_(model)
    assert model["a"] is model["b"][0] is outside[0]
    assert type(outside[0]) is fastrnn.GRU
    assert [r.name for r in report.replaced] == ["a"]


def test_tied_parameters_stay_tied() -> None:
    model = nn.ModuleList([nn.GRU(5, 7), nn.GRU(5, 7)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    fastrnn.replace_(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert len(list(model.parameters())) == 7


def test_mode_requires_grad_and_attributes_stay() -> None:
    model: Any = nn.ModuleList([nn.LSTM(*SIZES).eval(), nn.GRU(*SIZES), nn.LSTMCell(*SIZES).eval()])
    model[0].weight_hh_l0.requires_grad_(False)
    model[0].note = "mine"
    model[1].register_buffer("extra", torch.ones(2))
    fastrnn.replace_(model)
    assert [m.training for m in model] == [False, True, False]
    assert not model[0].weight_hh_l0.requires_grad
    assert model[0].weight_ih_l0.requires_grad
    assert model[0].note == "mine"
    assert torch.equal(model[1].extra, torch.ones(2))


def test_hooks_of_every_kind_stay() -> None:
    calls: list[str] = []

    def note(kind: str) -> Callable[..., None]:
        return lambda *_, **__: calls.append(kind)

    module = nn.GRU(*SIZES)
    module.register_forward_pre_hook(note("forward_pre"))
    handle = module.register_forward_hook(note("forward"))
    module.register_forward_hook(note("forward_kwargs"), with_kwargs=True)
    module.register_full_backward_pre_hook(note("backward_pre"))
    module.register_full_backward_hook(note("backward"))
    module.register_state_dict_pre_hook(note("state_dict_pre"))
    module.register_state_dict_post_hook(note("state_dict_post"))
    module.register_load_state_dict_pre_hook(note("load_pre"))
    module.register_load_state_dict_post_hook(note("load_post"))
    fastrnn.replace_(module)
    module(torch.randn(4, 3, 5, requires_grad=True))[0].sum().backward()
    module.load_state_dict(module.state_dict())
    assert calls == [
        *("forward_pre", "forward", "forward_kwargs", "backward_pre", "backward"),
        *("state_dict_pre", "state_dict_post", "load_pre", "load_post"),
    ]
    handle.remove()
    calls.clear()
    module(torch.randn(4, 3, 5))
    assert calls == ["forward_pre", "forward_kwargs"]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


# The layers of torch.nn use the value that a parametrized weight had when it was set
# (pytorch#65688), so the reference is a new module with the parametrized weights as its own.
def weights_as_plain(module: nn.Module) -> nn.Module:
    plain = nn.GRU(*SIZES)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.copy_(getattr(module, name))
    return plain


@pytest.mark.parametrize("order", ["before", "after"])
def test_parametrization_lives_on_and_trains(order: str) -> None:
    module = nn.GRU(*SIZES)
    if order == "after":
        fastrnn.replace_(module)
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    parametrizations.weight_norm(module, "weight_ih_l0")
    names = [name for name, _ in module.named_parameters()]
    if order == "before":
        report = fastrnn.replace_(module)
        assert report.replaced == (("", "torch.nn.GRU", "fastrnn.GRU"),)
    assert isinstance(module, fastrnn.GRU)
    assert [name for name, _ in module.named_parameters()] == names
    for _ in range(2):
        assert_same(run(module), run(weights_as_plain(module)))
        run(module)[0].sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
    expected = run(module)
    assert_same(run(copy.deepcopy(module)), expected)
    parametrize.remove_parametrizations(module, "weight_ih_l0")
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is fastrnn.GRU
    assert_same(run(module), expected)


def test_parametrized_module_goes_back() -> None:
    module = nn.LSTM(*SIZES)
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    fastrnn.replace_(module)
    report = fastrnn.restore_(module)
    assert report.replaced == (("", "fastrnn.LSTM", "torch.nn.LSTM"),)
    assert isinstance(module, nn.LSTM)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is nn.LSTM


def test_copies_of_a_parametrized_module_are_independent() -> None:
    module = nn.GRU(*SIZES)
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    twin = copy.deepcopy(module)  # it shares the class that has the property
    fastrnn.replace_(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert parametrize.is_parametrized(twin, "weight_hh_l0")
    assert type(twin).__bases__ == (nn.GRU,)
    assert twin.weight_hh_l0.shape == (21, 7)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_by_hook_lives_on() -> None:
    module: Any = torch.nn.utils.weight_norm(nn.GRU(*SIZES), "weight_hh_l0")
    fastrnn.replace_(module)
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(3)
    after = run(module)
    assert_same(after, run(weights_as_plain(module)))
    after[0].sum().backward()
    assert module.weight_hh_l0_g.grad is not None
    torch.nn.utils.remove_weight_norm(module, "weight_hh_l0")
    assert_same(run(module), after)


def test_pruning_lives_on() -> None:
    module: Any = nn.LSTM(*SIZES)
    prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
    fastrnn.replace_(module)
    expected = run(module)
    run(module)[0].sum().backward()
    gradient = module.weight_hh_l0_orig.grad
    assert (gradient[module.weight_hh_l0_mask == 0] == 0).all()
    prune.remove(module, "weight_hh_l0")
    assert int((module.weight_hh_l0 == 0).sum()) == 98
    assert_same(run(module), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_replaced_modules(way: str) -> None:
    model = model_with_all()
    fastrnn.replace_(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for place, name in PLACES.items():
        a, b = model.get_submodule(place), twin.get_submodule(place)
        assert type(b) is getattr(fastrnn, name)
        assert a is not b
        assert_same(run(a), run(b))


def test_restore_is_the_inverse() -> None:
    model = model_with_all()
    original = copy.deepcopy(model)
    members = [*model.modules()]
    parameters = [*model.parameters()]
    fastrnn.replace_(model)
    report = fastrnn.restore_(model)
    assert [(r.before, r.after) for r in report.replaced] == [
        (f"fastrnn.{PLACES[r.name]}", f"torch.nn.{PLACES[r.name]}") for r in report.replaced
    ]
    assert len(report.replaced) == len(PLACES)
    assert all(a is b for a, b in zip(members, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for a, b in zip(model.modules(), original.modules(), strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()
    for place in PLACES:
        a, b = model.get_submodule(place), original.get_submodule(place)
        for x, y in zip(run(a), run(b), strict=True):
            assert torch.equal(x, y)
    pickle.loads(pickle.dumps(model))
    model.to(torch.float64)
    assert run_double(model.get_submodule("list.0")).dtype == torch.float64


def run_double(module: nn.Module) -> Tensor:
    return module(torch.randn(4, 3, 5, dtype=torch.float64))[0]


def test_restores_modules_born_as_fastrnn() -> None:
    module = fastrnn.LSTM(5, 7, num_layers=2, bidirectional=True, proj_size=3)
    expected = run(module)
    fastrnn.restore_(module)
    assert type(module) is nn.LSTM
    assert_same(run(module), expected)
    module.half().float()
    pickle.loads(pickle.dumps(module))


def test_weights_changed_while_replaced_are_seen_after_restore() -> None:
    module = nn.GRU(*SIZES)
    fastrnn.replace_(module)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(21, 7))
    module._parameters["weight_ih_l0"] = nn.Parameter(torch.ones(21, 5))
    expected = run(module)
    fastrnn.restore_(module)
    assert_same(run(module), expected)


def test_replaced_layer_holds_no_list_of_weights() -> None:
    module = nn.GRU(*SIZES)
    fastrnn.replace_(module)
    old = weakref.ref(module.weight_hh_l0)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(21, 7))
    gc.collect()
    assert old() is None
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(nn.GRU(*SIZES).state_dict())  # torch.nn's own layers refuse here
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_layer_born_as_fastrnn_trains_after_restore() -> None:
    module = fastrnn.GRU(5, 7, num_layers=2, bidirectional=True)
    expected = run(module)
    fastrnn.restore_(module)
    assert_same(run(module), expected)
    run(module)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    pickle.loads(pickle.dumps(module.double()))


def test_twice_is_once() -> None:
    model = model_with_all()
    fastrnn.replace_(model)
    report = fastrnn.replace_(model)
    assert report.replaced == ()
    assert {s.name for s in report.skipped} == set(PLACES)


def test_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"should be a torch\.nn\.Module, got: dict"):
        fastrnn.replace_({"rnn": nn.LSTM(*SIZES)})  # type: ignore[arg-type]
