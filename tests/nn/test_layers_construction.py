"""Arguments, parameters, initial values and everything else before the first call."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fastrnn
from tests.support.modules import twins
from tests.support.names import CELLS, LAYERS
from tests.support.tensors import flatten

NAMES = LAYERS + CELLS

LAYER_OPTIONS = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"bidirectional": True, "num_layers": 2},
    {"batch_first": True, "dropout": 0.5, "num_layers": 2},
    {"bidirectional": 1},
    {"bidirectional": "no"},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.complex64},
    {"dropout": 1, "num_layers": 2},
    {"device": "meta"},
]
LSTM_OPTIONS = [
    {"proj_size": 2},
    {"proj_size": 1, "bias": False, "num_layers": 2, "bidirectional": True},
]
CASES = [
    *((name, options) for name in LAYERS for options in LAYER_OPTIONS),
    *(("LSTM", options) for options in LSTM_OPTIONS),
    ("RNN", {"nonlinearity": "relu"}),
    *((name, options) for name in CELLS for options in ({}, {"bias": False}, {"bias": 0})),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("RNNCell", {"nonlinearity": "unknown"}),
    ("LSTMCell", {"dtype": torch.float64}),
]


def seeded(cls: type[nn.Module], *args: object, **kwargs: object) -> Any:
    torch.manual_seed(7)
    return cls(*args, **kwargs)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parameters_equal(name: str, options: dict[str, object]) -> None:
    theirs = seeded(getattr(nn, name), 3, 5, **options)
    after_theirs = torch.rand(1)
    ours = seeded(getattr(fastrnn, name), 3, 5, **options)
    assert torch.equal(torch.rand(1), after_theirs)  # both used as many random numbers

    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.is_meta or torch.equal(a, b)
    assert repr(ours) == repr(theirs)
    assert ours.__constants__ == theirs.__constants__
    if name in LAYERS:
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert ours._all_weights == theirs._all_weights
        shapes = [[w.shape for w in group] for group in ours.all_weights]
        assert shapes == [[w.shape for w in group] for group in theirs.all_weights]
        assert ours.flatten_parameters() is None


@pytest.mark.parametrize("name", NAMES)
def test_attributes_equal(name: str) -> None:
    ours, theirs, _ = twins(name, 3, 5)
    for attribute, value in vars(theirs).items():
        if not attribute.startswith("_"):
            assert getattr(ours, attribute) == value, attribute
    missing = [a for a in dir(theirs) if not a.startswith("__") and not hasattr(ours, a)]
    assert missing == []


def test_positional_order() -> None:
    for name, arguments in (
        ("RNN", (3, 5, 2, "relu", False, True, 0.25, True, 0, "cpu", torch.float64)),
        ("LSTM", (3, 5, 2, False, True, 0.25, True, 2, "cpu", torch.float64)),
        ("GRU", (3, 5, 2, False, True, 0.25, True, 0, "cpu", torch.float64)),
        ("RNNCell", (3, 5, False, "relu", "cpu", torch.float64)),
        ("LSTMCell", (3, 5, False, "cpu", torch.float64)),
        ("GRUCell", (3, 5, False, "cpu", torch.float64)),
    ):
        ours, theirs = getattr(fastrnn, name)(*arguments), getattr(nn, name)(*arguments)
        assert repr(ours) == repr(theirs)
        assert [p.dtype for p in ours.parameters()] == [p.dtype for p in theirs.parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_without_a_second_layer_warns_at_the_caller(name: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as seen:
        getattr(fastrnn, name)(3, 5, dropout=0.5)
    assert [w.filename for w in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fastrnn, name)(3, 5, num_layers=2, dropout=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_loads_both_ways(name: str) -> None:
    ours, theirs = getattr(fastrnn, name)(3, 5), getattr(nn, name)(3, 5)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    ours.reset_parameters()
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str) -> None:
    ours, _, _ = twins(name, 3, 5)
    ours.eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = flatten(ours(x))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (
        copy.copy(ours),
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(ours) and not other.training and repr(other) == repr(ours)
        for a, b in zip(flatten(other(x)), expected, strict=True):
            assert torch.equal(a, b)
    assert copy.deepcopy(ours).state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("name", LAYERS)
def test_states_of_old_pickles(name: str) -> None:
    """Before torch 1.4 all_weights held tensors, and before 1.8 there was no proj_size."""
    choices: list[dict[str, Any]] = [{}, {"bias": False, "bidirectional": True}]
    for options in choices:
        ours, _, _ = twins(name, 3, 5, num_layers=2, **options)
        state = ours.__getstate__()
        state["all_weights"] = [list(group) for group in ours.all_weights]
        del state["_all_weights"], state["proj_size"], state["_flat_weights_names"]
        old = getattr(fastrnn, name).__new__(getattr(fastrnn, name))
        old.__setstate__(state)
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        for a, b in zip(flatten(old(x)), flatten(ours(x)), strict=True):
            assert torch.equal(a, b)
        assert old._all_weights == ours._all_weights


@pytest.mark.parametrize("name", NAMES)
def test_skip_init(name: str) -> None:
    """torch.nn's own layers hide `device` from it behind **kwargs."""
    assert "device" in inspect.signature(getattr(fastrnn, name)).parameters
    module = nn.utils.skip_init(getattr(fastrnn, name), 3, 5)
    assert not any(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_meta_device(name: str) -> None:
    ours = getattr(fastrnn, name)(3, 5, device="meta")
    outputs = flatten(ours(torch.empty(4, 3, device="meta")))
    stock = flatten(getattr(nn, name)(3, 5, device="meta")(torch.empty(4, 3, device="meta")))
    assert [y.shape for y in outputs] == [y.shape for y in stock]
    assert all(y.is_meta for y in outputs)
    with torch.device("meta"):
        assert all(p.is_meta for p in getattr(fastrnn, name)(3, 5).parameters())
    ours.to_empty(device="cpu").reset_parameters()
    assert all(y.isfinite().all() for y in flatten(ours(torch.randn(4, 3))))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_rnn_base_but_not_torchs(name: str) -> None:
    """Utilities look for RNNBase; torch.compile refuses the classes of torch.nn."""
    ours = getattr(fastrnn, name)(3, 5)
    assert isinstance(ours, nn.RNNBase)
    assert not isinstance(ours, nn.RNN | nn.LSTM | nn.GRU)
