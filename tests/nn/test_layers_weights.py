"""The next call uses weights that other code than the module changed or replaced."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize

import fastrnn
from tests.support.modules import Twins, compare, twins
from tests.support.names import CELLS, LAYERS
from tests.support.tensors import flatten
from tests.support.weights import hidden_weight, old_weight_norm, parametrized, pruned, weight_norm

F64 = torch.float64
NAMES = LAYERS + CELLS


def check(modules: Twins) -> None:
    """Asserts the same numbers as torch.nn, and others than with the old weights."""
    compare(modules, torch.randn(4, 3, dtype=F64))


def data_in_place(module: nn.Module, name: str) -> None:
    with torch.no_grad():
        getattr(module, name).mul_(2)


def data_behind_the_version(module: nn.Module, name: str) -> None:
    getattr(module, name).data.mul_(2)


def data_assigned(module: nn.Module, name: str) -> None:
    getattr(module, name).data = getattr(module, name).data * 2


def parameter_set(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))


def parameter_in_the_registry(module: nn.Module, name: str) -> None:
    module._parameters[name] = nn.Parameter(getattr(module, name).detach() * 2)


def parameter_loaded(module: nn.Module, name: str) -> None:
    state = module.state_dict()
    state[name] = state[name] * 2
    module.load_state_dict(state)


def parameter_assigned_by_loading(module: nn.Module, name: str) -> None:
    state = module.state_dict()
    state[name] = state[name] * 2
    module.load_state_dict(state, assign=True)


def spectral_norm(module: nn.Module, name: str) -> None:
    parametrizations.spectral_norm(module.eval(), name)


def old_spectral_norm(module: nn.Module, name: str) -> None:
    nn.utils.spectral_norm(module.eval(), name)


DOORS: list[Callable[[nn.Module, str], None]] = [
    data_in_place,
    data_behind_the_version,
    data_assigned,
    parameter_set,
    parameter_in_the_registry,
    parameter_loaded,
    parameter_assigned_by_loading,
    spectral_norm,
    weight_norm,
    old_weight_norm,
    old_spectral_norm,
    pruned,
    parametrized,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", DOORS, ids=lambda f: f.__name__)
def test_change_is_seen(name: str, change: Callable[[nn.Module, str], None]) -> None:
    modules = twins(name, 3, 5)
    x = torch.randn(4, 3, dtype=F64)
    before = flatten(modules.ours(x))[0]
    for module in modules:
        torch.manual_seed(1)
        change(module, hidden_weight(module))
    check(modules)
    if change.__name__ not in ("weight_norm", "old_weight_norm") and name in LAYERS:
        assert not torch.allclose(flatten(modules.ours(x))[0], before)
    for module in modules:
        module.double()
    check(modules)


class Counting(nn.Module):
    """A parametrization with a side effect, as spectral_norm has in training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


@pytest.mark.parametrize("name", NAMES)
def test_parametrization_runs_once_a_call(name: str) -> None:
    ours, _, _ = twins(name, 3, 5)
    counters = {n: Counting() for n, _ in ours.named_parameters()}
    for weight, counter in counters.items():
        parametrize.register_parametrization(ours, weight, counter)
        counter.calls = 0
    ours(torch.randn(4, 3, dtype=F64))
    assert [c.calls for c in counters.values()] == [1] * len(counters)


@pytest.mark.parametrize("name", NAMES)
def test_weight_drop(name: str) -> None:
    """A plain tensor, computed anew for each call, takes the name of the Parameter."""
    modules = twins(name, 3, 5)
    for module in modules:
        weight = hidden_weight(module)
        raw = getattr(module, weight)
        del module._parameters[weight]
        module.register_parameter(weight + "_raw", nn.Parameter(raw.detach()))

        def drop(module: Any, _: Any, weight: str = weight) -> None:
            setattr(module, weight, getattr(module, weight + "_raw") * 0.5)

        module.register_forward_pre_hook(drop)
    check(modules)
    check(modules)


@pytest.mark.parametrize("name", LAYERS)
def test_tied_layers(name: str) -> None:
    modules = twins(name, 3, 5, num_layers=2)
    for module in modules:
        module.weight_hh_l0 = module.weight_hh_l1
        module.bias_hh_l0 = module.bias_ih_l0
    check(modules)
    assert len(list(modules.ours.parameters())) == 6
    copied = copy.deepcopy(modules.ours)
    assert copied.weight_hh_l0 is copied.weight_hh_l1


@pytest.mark.parametrize("name", NAMES)
def test_deleted_weight_is_missed(name: str) -> None:
    """torch.nn's layers would go on with the old weight, to which they hold a reference."""
    ours, _, _ = twins(name, 3, 5)
    delattr(ours, hidden_weight(ours))
    with pytest.raises(AttributeError, match=hidden_weight(ours)):
        ours(torch.randn(4, 3, dtype=F64))


@pytest.mark.parametrize("name", NAMES)
def test_functional_call(name: str) -> None:
    ours, theirs, _ = twins(name, 3, 5)
    x = torch.randn(4, 3, dtype=F64)
    other = {n: p.detach() * 2 for n, p in ours.named_parameters()}
    for a, b in zip(
        flatten(functional_call(ours, other, (x,))),
        flatten(functional_call(theirs, other, (x,))),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(flatten(ours(x)), flatten(theirs(x)))


@pytest.mark.parametrize("name", NAMES)
def test_ensemble_of_stacked_parameters(name: str) -> None:
    models = [twins(name, 3, 5).ours for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(4, 3, dtype=F64)
    together = torch.vmap(
        lambda p, b: functional_call(models[0], (p, b), (x,)), randomness="error"
    )(parameters, buffers)
    for k, model in enumerate(models):
        for a, b in zip(flatten(together), flatten(model(x)), strict=True):
            torch.testing.assert_close(a[k], b)


@contextmanager
def future(setter: Callable[[bool], None]) -> Iterator[None]:
    setter(True)
    try:
        yield
    finally:
        setter(False)


@pytest.mark.parametrize("name", NAMES)
def test_swapped_on_conversion(name: str) -> None:
    """torch.nn's layers cannot do this: they hold weak references to their parameters."""
    modules = twins(name, 3, 5)
    ours = modules.ours
    kept = list(ours.parameters())
    state = {n: p * 2 for n, p in modules.torchs.state_dict().items()}
    with future(torch.__future__.set_swap_module_params_on_conversion):
        for module in (ours, copy.deepcopy(ours)):
            module(torch.randn(4, 3, dtype=F64))
            module.load_state_dict(state)
            module.float().double()
    assert all(a is b for a, b in zip(ours.parameters(), kept, strict=True))
    for module in modules:
        if module is not ours:
            module.load_state_dict(state)
    ours.load_state_dict(state)
    check(modules)


@pytest.mark.parametrize("name", NAMES)
def test_overwritten_on_conversion(name: str) -> None:
    modules = twins(name, 3, 5)
    with future(torch.__future__.set_overwrite_module_params_on_conversion):
        for module in modules:
            module.float().double()
    check(modules)


@pytest.mark.parametrize("name", NAMES)
def test_from_meta(name: str) -> None:
    stock = getattr(nn, name)(3, 5, dtype=F64)
    ours = getattr(fastrnn, name)(3, 5, device="meta", dtype=F64)
    ours.to_empty(device="cpu").load_state_dict(stock.state_dict())
    check(Twins(ours, stock, copy.deepcopy(stock)))
    ours = getattr(fastrnn, name)(3, 5, device="meta", dtype=F64)
    ours.load_state_dict(stock.state_dict(), assign=True)
    check(Twins(ours, stock, copy.deepcopy(stock)))


@pytest.mark.parametrize("name", NAMES)
def test_shared_memory(name: str) -> None:
    modules = twins(name, 3, 5)
    for module in modules:
        module.share_memory()
    check(modules)
    assert all(p.is_shared() for p in modules.ours.parameters())


def _child(module: nn.Module, x: Tensor, out: Any) -> None:
    out.put([y.tolist() for y in flatten(module(x))])


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_forked_process(name: str) -> None:
    """A child of a process whose threads have already worked."""
    ours, _, _ = twins(name, 3, 5)
    x = torch.randn(4, 3, dtype=F64)
    expected = [y.tolist() for y in flatten(ours(x))]
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    child = context.Process(target=_child, args=(ours, x, out))
    child.start()
    try:
        assert out.get(timeout=600) == expected
    finally:
        child.join(timeout=600)
    assert child.exitcode == 0


@pytest.mark.parametrize("name", LAYERS)
def test_flat_weights(name: str) -> None:
    """It is never a list of its own, but a view of the parameters."""
    ours, _, _ = twins(name, 3, 5, num_layers=2)
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    replica = ours._replicate_for_data_parallel()
    assert replica._flat_weights == [None] * len(list(ours.parameters()))


def _parameter_like(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.randn(weight.shape, dtype=weight.dtype))


def _one_entry(module: Any) -> None:
    torch.manual_seed(1)
    index = list(module._flat_weights_names).index("weight_hh_l1")
    module._flat_weights[index] = _parameter_like(module.weight_hh_l1)


def _some_entries(module: Any) -> None:
    torch.manual_seed(1)
    module._flat_weights[2:4] = [_parameter_like(w) for w in module._flat_weights[2:4]]


def _whole_list(module: Any) -> None:
    torch.manual_seed(1)
    module._flat_weights = [_parameter_like(w) for w in module._flat_weights]


def _dropped(module: Any) -> None:
    torch.manual_seed(1)
    module._flat_weights = [nn.functional.dropout(w, 0.3) for w in module._flat_weights]


def _its_own_again(module: Any) -> None:
    _whole_list(module)
    module._flat_weights = list(module.parameters())


def _then_a_weight_is_replaced(module: Any) -> None:
    _one_entry(module)
    module.weight_ih_l0 = _parameter_like(module.weight_ih_l0)


def _then_its_dtype_changes(module: nn.Module) -> None:
    _one_entry(module)
    module.to(torch.float32).to(F64)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("when", ["before replace_", "after replace_", "before restore_"])
@pytest.mark.parametrize(
    "write",
    [
        _one_entry,
        _some_entries,
        _whole_list,
        _dropped,
        _its_own_again,
        _then_a_weight_is_replaced,
        _then_its_dtype_changes,
    ],
)
def test_written_flat_weights_are_computed_with(
    write: Callable[[nn.Module], None], when: str, name: str
) -> None:
    """torch.nn computes with the entries of the list, and leaves the parameters alone."""
    theirs = getattr(nn, name)(3, 5, num_layers=2, bidirectional=True, dtype=F64)
    ours = copy.deepcopy(theirs)
    if when == "before replace_":
        write(ours)
        fastrnn.replace_(ours)
    else:
        fastrnn.replace_(ours)
        write(ours)
    if when == "before restore_":
        fastrnn.restore_(ours)
    write(theirs)
    x = torch.randn(4, 2, 3, dtype=F64)
    results = [flatten(m(x)) for m in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    for y, *_ in results:
        y.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(ours._flat_weights, theirs._flat_weights, strict=True):
        torch.testing.assert_close(a, b)


def _two_lists(module: Any) -> None:
    first = module._flat_weights
    module._flat_weights[0] = module.weight_ih_l0 * 0
    first[1] = module.weight_hh_l0 * 0


def _cleared_and_extended(module: Any) -> None:
    torch.manual_seed(1)
    weights = [_parameter_like(w) for w in module._flat_weights]
    module._flat_weights.clear()
    module._flat_weights.extend(weights)


def _popped_and_inserted(module: Any) -> None:
    module._flat_weights.insert(0, module._flat_weights.pop(0) * 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("write", [_two_lists, _cleared_and_extended, _popped_and_inserted])
def test_the_list_is_one_list(write: Callable[[nn.Module], None], name: str) -> None:
    theirs = getattr(nn, name)(3, 5, num_layers=2, dtype=F64)
    ours = fastrnn.from_torch(theirs)
    x = torch.randn(4, 2, 3, dtype=F64)
    for m in (ours, theirs):
        write(m)
    for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_list_of_wrong_length_is_refused() -> None:
    ours: Any = fastrnn.GRU(3, 5)
    ours._flat_weights.append(ours.bias_ih_l0)
    with pytest.raises(RuntimeError, match=r"_flat_weights should hold 4 weights .*, got 5"):
        ours(torch.randn(4, 2, 3))


def test_written_flat_weights_travel() -> None:
    ours = fastrnn.GRU(3, 5, num_layers=2)
    _one_entry(ours)
    x = torch.randn(4, 2, 3)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x)[0], ours(x)[0])
    frozen = fastrnn.freeze(copy.deepcopy(ours))
    with torch.no_grad():
        torch.testing.assert_close(frozen(x)[0], ours(x)[0])


def test_a_deleted_weight_that_torch_still_computes_with() -> None:
    """The old weight stays in torch.nn's list, and so it does after `replace_`."""
    theirs = nn.GRU(3, 5)
    del theirs.weight_hh_l0
    x = torch.randn(4, 2, 3)
    before = theirs(x)[0]
    fastrnn.replace_(theirs)
    torch.testing.assert_close(theirs(x)[0], before)


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_step(name: str) -> None:
    """Three steps with the same gradients end in the same weights."""
    ours, theirs, _ = twins(name, 3, 5)
    data = [torch.randn(4, 3, dtype=F64) for _ in range(3)]
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for x in data:
            optimizer.zero_grad()
            flatten(module(x))[0].square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
