"""Values, gradients and errors of a call, compared with torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fastrnn
from tests.support.modules import compare, run, same_error, twins
from tests.support.names import CELLS, LAYERS, LONG, SIZES
from tests.support.properties import given, settings, st
from tests.support.tensors import batches, flatten, sum_of
from tests.support.tolerance import assert_matches

F64 = torch.float64
SIZE = st.sampled_from(SIZES)


def states(name: str, layers: int, *batch: int, hidden: int, first: int | None = None) -> Any:
    """Initial states in the form that the class of that name takes."""
    h = torch.randn(layers, *batch, first or hidden, dtype=F64)
    return (h, torch.randn(layers, *batch, hidden, dtype=F64)) if name == "LSTM" else h


@settings(max_examples=60)
@given(data=st.data())
def test_layers_match(data: st.DataObject) -> None:
    """Any combination of cells, layers, directions, layouts, biases, states and dtypes."""
    draw = data.draw
    name = draw(st.sampled_from(LAYERS), "layer")
    hidden, width = draw(SIZE, "hidden"), draw(SIZE, "width")
    layout = draw(st.sampled_from(["dense", "packed", "unsorted", "unbatched"]), "layout")
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3), "layers"),
        "bidirectional": draw(st.booleans(), "bidirectional"),
        "batch_first": draw(st.booleans(), "batch_first"),
        "bias": draw(st.booleans(), "bias"),
        "dtype": draw(st.sampled_from([torch.float32, F64]), "dtype"),
    }
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]), "nonlinearity")
    if name == "LSTM" and hidden > 1:
        options["proj_size"] = draw(st.integers(0, hidden - 1), "projection")
    torch.manual_seed(draw(st.integers(0, 2**16), "seed"))
    modules = twins(name, width, hidden, **options)

    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5), "lengths")
    steps, batch = max(lengths), len(lengths)
    if layout == "unbatched":
        x: Any = torch.randn(steps, width)
    elif layout == "dense":
        x = torch.randn(*((batch, steps) if options["batch_first"] else (steps, batch)), width)
    else:
        pieces = batches(sorted(lengths, reverse=True) if layout == "packed" else lengths, width)
        x = pack_sequence(pieces, enforce_sorted=layout == "packed")
    arguments = [x]
    if draw(st.booleans(), "hx"):
        rows = options["num_layers"] * (1 + options["bidirectional"])
        first = options.get("proj_size") or hidden
        shape = () if layout == "unbatched" else (batch,)
        arguments.append(states(name, rows, *shape, hidden=hidden, first=first))
    compare(modules, *arguments)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("sizes", [(17, 32), (31, 61)])
def test_dtypes_match(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    layer = {"num_layers": 2, "bidirectional": True} if name in LAYERS else {}
    shape = (7, 5) if name in LAYERS else (33,)
    compare(twins(name, *sizes, dtype=dtype, **layer), torch.randn(*shape, sizes[0]))


@pytest.mark.parametrize("name", LAYERS)
def test_long_sequence(name: str) -> None:
    """With weights below 1/sqrt(H), errors must not grow faster than torch.nn's in 4096 steps."""
    modules = twins(name, 2, 3, dtype=torch.float32)
    x = torch.randn(LONG, 1, 2)
    with torch.no_grad():
        results = [m(x.to(next(m.parameters()).dtype))[0] for m in modules]
    assert_matches(*({"output": y} for y in results))


# The form of the result.


@pytest.mark.parametrize("name", LAYERS)
def test_form_of_results(name: str) -> None:
    ours, theirs, _ = twins(name, 3, 5, batch_first=True, num_layers=2)
    x = torch.randn(2, 4, 3, dtype=F64)
    results = [ours(x), theirs(x)]
    assert [type(r) for r in results] == [tuple, tuple]
    assert type(results[0][1]) is type(results[1][1])
    for a, b in zip(*map(flatten, results), strict=True):
        assert (a.shape, a.stride(), a.is_contiguous()) == (b.shape, b.stride(), b.is_contiguous())

    packed = pack_padded_sequence(x, [2, 4], batch_first=True, enforce_sorted=False)
    output, _ = ours(packed)
    assert type(output) is PackedSequence
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(output, field) is getattr(packed, field)


@pytest.mark.parametrize("name", LAYERS)
def test_results_alias_nothing(name: str) -> None:
    ours, _, _ = twins(name, 3, 3)
    x = torch.randn(1, 2, 3, dtype=F64)
    hx = states(name, 1, 2, hidden=3)
    tensors = [x, *flatten(hx), *flatten(ours(x, hx)), *ours.parameters()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_final_states_may_change_in_place(name: str) -> None:
    ours, theirs, _ = twins(name, 3, 5)
    x = torch.randn(4, 2, 3, dtype=F64)
    for module in (ours, theirs):
        output, final = module(x)
        with torch.no_grad():
            for s in flatten(final):
                s.zero_()
        output.sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTMCell", "GRUCell"])
def test_outputs_may_change_in_place(name: str) -> None:
    """`h *= mask` between the steps of a cell; torch.nn's LSTM and RNNCell refuse it as well."""
    ours, theirs, _ = twins(name, 3, 5)
    x = torch.randn(4, 3, dtype=F64)
    for module in (ours, theirs):
        output = flatten(module(x))[0]
        output *= 2
        output.sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("victim", ["x", "hx", "weight"])
def test_changing_what_backward_needs_raises(name: str, victim: str) -> None:
    ours, theirs, _ = twins(name, 3, 5)

    def call(module: Any) -> None:
        x, hx = torch.randn(4, 2, 3, dtype=F64), states(name, 1, 2, hidden=5)
        output, _ = module(x, hx)
        with torch.no_grad():
            {"x": x, "hx": flatten(hx)[0], "weight": module.weight_hh_l0}[victim].add_(1)
        output.sum().backward()

    message, _ = same_error(lambda: call(ours), lambda: call(theirs))
    assert "modified" in message


@pytest.mark.parametrize("name", LAYERS)
def test_backward_twice(name: str) -> None:
    ours, theirs, _ = twins(name, 3, 5)
    x = torch.randn(4, 2, 3, dtype=F64)

    def twice(module: nn.Module, retain: bool) -> None:
        loss = module(x)[0].sum()
        loss.backward(retain_graph=retain)
        loss.backward()

    same_error(lambda: twice(ours, False), lambda: twice(theirs, False))
    for module in (ours, theirs):
        module.zero_grad()
        twice(module, True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name: str) -> None:
    compare(twins(name, 3, 5, num_layers=2, bidirectional=True), torch.randn(4, 0, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_strided_operands(name: str) -> None:
    """Views: slices of larger tensors, expanded, with reversed dimensions, with an offset."""
    modules = twins(name, 3, 5)
    for module in modules:
        weight = torch.zeros(7, module.weight_hh_l0.size(0), dtype=F64)
        weight[1:6] = module.weight_hh_l0.detach().T
        module.weight_hh_l0 = nn.Parameter(weight[1:6].T)
    ours, theirs, _ = modules
    for x in (
        torch.randn(2, 3, 4, dtype=F64).permute(2, 0, 1),
        torch.randn(9, 4, 8, dtype=F64)[1::2, ::2, 2:8:2],
        torch.randn(3, dtype=F64).expand(4, 2, 3),
        torch.randn(4, 1, 3, dtype=F64).expand(4, 2, 3),
    ):
        wide = states(name, 2, 2, hidden=9)
        hx = tuple(s[::2, :, 2:7] for s in wide) if name == "LSTM" else wide[::2, :, 2:7]
        for a, b in zip(flatten(ours(x, hx)), flatten(theirs(x, hx)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_spread_as_in_torch(name: str, value: float) -> None:
    ours, theirs, _ = twins(name, 3, 5)
    x = torch.randn(6, 3, 3, dtype=F64)
    x[2, 1, 0] = value
    for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


# Random numbers.


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed"])
def test_dropout_is_torchs(name: str, layout: str) -> None:
    """The same elements are dropped; results of the first layers differ by rounding at most."""
    batch_first = layout == "batch_first"
    modules = twins(
        name, 3, 5, num_layers=3, dropout=0.5, bidirectional=True, batch_first=batch_first
    )
    x: Any = torch.randn(4, 2, 3, dtype=F64)
    if layout == "packed":
        x = pack_padded_sequence(x, [3, 4], enforce_sorted=False)
    results = []
    for module in modules:
        torch.manual_seed(3)
        results.append((*run(module, x), torch.rand(1)))
    values, gradients, following = zip(*results, strict=True)
    assert_matches(*values)
    assert_matches(*gradients, gradients=True)
    assert torch.equal(following[0], following[1])
    for module in modules:
        module.eval()
    compare(modules, x)


@pytest.mark.parametrize("name", LAYERS)
def test_random_state_is_untouched(name: str) -> None:
    ours, _, _ = twins(name, 3, 5, num_layers=2)
    before = torch.get_rng_state()
    run(ours, torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", LAYERS)
def test_bitwise_repeatable(name: str) -> None:
    ours, _, _ = twins(name, 3, 5, num_layers=2, dtype=torch.float32)
    x = torch.randn(9, 4, 3)
    for first, second in zip(run(ours, x), run(ours, x), strict=True):
        for what, value in first.items():
            assert torch.equal(value, second[what]), what


# Each call reads the attributes.


@pytest.mark.parametrize("name", LAYERS)
def test_attributes_are_read_at_the_call(name: str) -> None:
    modules = twins(name, 3, 5, num_layers=2)
    ours, theirs, _ = modules
    x = torch.randn(4, 2, 3, dtype=F64)
    for module in modules:
        module.batch_first = True
    torch.testing.assert_close(ours(x), theirs(x))
    for module in modules:
        module.dropout = 1.0
    torch.testing.assert_close(ours(x), theirs(x))
    for module in modules:
        module.training = False
    torch.testing.assert_close(ours(x), theirs(x))
    if name == "RNN":
        for module in modules:
            module.nonlinearity = "unknown"
            module.mode = "RNN_RELU"
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_forward_assigns_nothing(name: str) -> None:
    ours, _, _ = twins(name, 3, 5)
    before = dict(vars(ours))
    ours(torch.randn(4, 3, dtype=F64))
    assert vars(ours) == before


# Kinds of tensors and modes.


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_inference_mode(name: str) -> None:
    ours, theirs, _ = twins(name, 3, 5)
    x = torch.randn(4, 3, dtype=F64)
    with torch.inference_mode():
        for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
            torch.testing.assert_close(a, b)
            assert a.is_inference()
        born = getattr(fastrnn, name)(3, 5)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        born(torch.randn(4, 3, requires_grad=True))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_complex(name: str) -> None:
    ours, theirs = (getattr(m, name)(3, 5, dtype=torch.complex64) for m in (fastrnn, nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, dtype=torch.complex64)
    for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        torch.testing.assert_close(a, b)
    for module in (ours, theirs):
        sum_of(y.abs().sum() for y in flatten(module(x))).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Tagged(Tensor):
    """A subclass that behaves like its base."""


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_subclass_of_tensor_comes_back(name: str) -> None:
    ours, theirs, _ = twins(name, 3, 5)
    x = torch.randn(4, 3, dtype=F64).as_subclass(Tagged)
    results = flatten(ours(x)), flatten(theirs(x))
    for a, b in zip(*results, strict=True):
        assert type(a) is type(b) is Tagged
        torch.testing.assert_close(a.as_subclass(Tensor), b.as_subclass(Tensor))


@pytest.mark.parametrize("name", LAYERS)
def test_threads(name: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ours, _, _ = twins(name, 3, 5, num_layers=2)
    inputs = [torch.randn(6, 2, 3, dtype=F64) for _ in range(16)]
    expected = [ours(x)[0].detach() for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, y in zip(pool.map(lambda x: ours(x)[0], inputs), expected, strict=True):
            assert torch.equal(got, y)
