"""`lengths=` and `resets=` against running the pieces separately."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import kernels
from tests.support.kernels import planned
from tests.support.modules import twins
from tests.support.names import LAYERS
from tests.support.properties import given, settings, st
from tests.support.shared import noisy, staged
from tests.support.tensors import flatten, mapped, sum_of

F64 = torch.float64


def column(value: Any, k: int) -> Any:
    """Sequence `k` of states [L*D, B, H], or tuples of them."""
    return mapped(value, lambda t: t[:, k : k + 1])


def states(name: str, layers: int, batch: int, hidden: int) -> Any:
    h, c = torch.randn(2, layers, batch, hidden, dtype=F64, requires_grad=True)
    return (h, c) if name == "LSTM" else h


def gradients(outputs: Any, module: nn.Module, *leaves: Any) -> list[Tensor]:
    tensors = flatten(outputs)
    weights = [
        torch.randn(y.shape, generator=torch.Generator().manual_seed(y.dim()), dtype=F64)
        for y in tensors
    ]
    total = sum_of((y * w).sum() for y, w in zip(tensors, weights, strict=True))
    inputs = [*module.parameters(), *flatten(leaves)]
    return list(torch.autograd.grad(total, inputs, materialize_grads=True))


def assert_same(a: Any, b: Any) -> None:
    for mine, wanted in zip(flatten(a), flatten(b), strict=True):
        torch.testing.assert_close(mine, wanted)


OPTIONS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 2),
        "bidirectional": st.booleans(),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
    }
)


@settings(max_examples=40)
@given(
    name=st.sampled_from(LAYERS),
    options=OPTIONS,
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    extra=st.integers(0, 2),
    with_states=st.booleans(),
    form=st.sampled_from([list, tuple, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)]),
)
def test_lengths_are_separate_sequences(
    name: str, options: Any, lengths: list[int], extra: int, with_states: bool, form: Any
) -> None:
    """torch.nn on each row alone, cut to its length; rows of length zero only pass hx on."""
    ours, theirs, _ = twins(name, 3, 4, **options)
    batch, steps = len(lengths), max(lengths) + extra
    rows = options["num_layers"] * (1 + options["bidirectional"])
    x = torch.randn(steps, batch, 3, dtype=F64, requires_grad=True)
    hx = states(name, rows, batch, 4) if with_states else None
    given_x = x.transpose(0, 1) if options["batch_first"] else x
    output, final = ours(given_x, hx, lengths=form(lengths))
    if options["batch_first"]:
        output = output.transpose(0, 1)

    start = hx if with_states else mapped(final, torch.zeros_like)
    columns, finals = [], []
    for k, n in enumerate(lengths):
        s, y = column(start, k), torch.zeros(0, 1, output.size(-1), dtype=F64)
        if n:
            piece = x[:n, k : k + 1]
            y, s = theirs(piece.transpose(0, 1) if options["batch_first"] else piece, s)
            y = y.transpose(0, 1) if options["batch_first"] else y
        columns.append(torch.cat([y, torch.zeros(steps - n, 1, output.size(-1), dtype=F64)]))
        finals.append(s)
    wanted = torch.cat(columns, 1)
    merged = [torch.cat(s, 1) for s in zip(*map(flatten, finals), strict=True)]
    assert_same([output, final], [wanted, merged])
    if steps and max(lengths):
        leaves = [x, hx]
        assert_same(
            gradients([output, final], ours, *leaves), gradients([wanted, merged], theirs, *leaves)
        )


@settings(max_examples=40)
@given(
    name=st.sampled_from(LAYERS),
    options=OPTIONS,
    flags=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    with_states=st.booleans(),
    begins=st.sampled_from(["zeros", "each", "one for all"]),
)
def test_resets_are_separate_episodes(
    name: str, options: Any, flags: list[list[bool]], with_states: bool, begins: str
) -> None:
    """Each episode alone, layer by layer, from zeros or given states, except the episode that hx
    enters."""
    ours, theirs, _ = twins(name, 3, 4, **options)
    batch, steps = len(flags), 6
    directions = 1 + options["bidirectional"]
    rows = options["num_layers"] * directions
    x = torch.randn(steps, batch, 3, dtype=F64, requires_grad=True)
    hx = states(name, rows, batch, 4) if with_states else None
    resets = torch.tensor(flags).T
    extras: dict[str, Any] = {}
    if begins != "zeros":
        extras["reset_states"] = states(name, rows, batch if begins == "each" else 1, 4)
    if options["batch_first"]:
        output, final = ours(x.transpose(0, 1), hx, resets=resets.T, **extras)
        output = output.transpose(0, 1)
    else:
        output, final = ours(x, hx, resets=resets, **extras)

    start = hx if with_states else mapped(final, torch.zeros_like)
    begin = mapped(
        extras.get("reset_states", mapped(final, torch.zeros_like)),
        lambda t: t.expand(rows, batch, 4),
    )
    columns, finals = [], []
    for k in range(batch):
        y, s = episodes(theirs, x[:, k : k + 1], column(start, k), column(begin, k), flags[k])
        columns.append(y)
        finals.append(s)
    wanted = torch.cat(columns, 1)
    merged = [torch.cat(s, 1) for s in zip(*finals, strict=True)]
    assert_same([output, final], [wanted, merged])
    leaves = [x, hx, extras.get("reset_states")]
    assert_same(
        gradients([output, final], ours, *leaves), gradients([wanted, merged], theirs, *leaves)
    )


def episodes(
    module: Any, x: Tensor, start: Any, begin: Any, flags: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    """One sequence [T, 1, I] through torch.nn's own layers, cut where `flags` says.

    It runs one layer in one direction at a time, because each is cut anew.
    """
    directions = 2 if module.bidirectional else 1
    kind = type(module)
    cuts = [0, *[t for t in range(1, len(flags)) if flags[t]], len(flags)]
    spans = list(itertools.pairwise(cuts))
    finals: list[list[Tensor]] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            names = module._all_weights[layer * directions + direction]
            single = kind(x.size(-1), module.hidden_size, bias=module.bias, dtype=F64)
            weights = {
                own: getattr(module, n)
                for own, n in zip(single._flat_weights_names, names, strict=True)
            }
            row = layer * directions + direction
            given, fresh = (
                mapped(each, partial(Tensor.narrow, dim=0, start=row, length=1))
                for each in (start, begin)
            )
            parts = []
            for first, last in reversed(spans) if direction else spans:
                # hx enters at the step that runs first, unless an episode begins at this step.
                enters = last == len(flags) if direction else first == 0 and not flags[0]
                s = given if enters else fresh
                piece = x[first:last].flip(0) if direction else x[first:last]
                y, after = torch.func.functional_call(single, weights, (piece, s))
                parts.append((first, y.flip(0) if direction else y, after))
            outputs.append(torch.cat([y for _, y, _ in sorted(parts, key=lambda p: p[0])]))
            finals.append(flatten(parts[-1][2]))
        x = torch.cat(outputs, -1)
    return x, [torch.cat(s) for s in zip(*finals, strict=True)]


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_packing_without_the_sort(name: str) -> None:
    ours, _, _ = twins(name, 3, 4, num_layers=2, bidirectional=True, dropout=0.0)
    x, lengths = torch.randn(7, 4, 3, dtype=F64), [3, 7, 1, 5]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    wanted, final = ours(packed)
    assert_same(ours(x, lengths=lengths), [pad_packed_sequence(wanted)[0], final])


@pytest.mark.parametrize("name", LAYERS)
def test_both_together(name: str) -> None:
    """Resets past the end of a row have no effect; the others act as in the cut row."""
    ours, _, _ = twins(name, 3, 4, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(6, 3, 3, dtype=F64), [6, 2, 4]
    resets = torch.rand(6, 3) < 0.4
    resets[5] = True
    output, final = ours(x, lengths=lengths, resets=resets)
    for k, n in enumerate(lengths):
        y, s = ours(x[:n, k : k + 1], resets=resets[:n, k : k + 1])
        assert_same([output[:n, k : k + 1], column(final, k)], [y, s])
        assert not output[n:, k].any()


@pytest.mark.parametrize("name", LAYERS)
def test_resets_of_packed_input(name: str) -> None:
    """Resets as a PackedSequence, as its data, and in dense form with lengths."""
    ours, _, _ = twins(name, 3, 4, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(6, 3, 3, dtype=F64), [2, 6, 4]
    resets = torch.rand(6, 3) < 0.4
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    flags = pack_padded_sequence(resets, lengths, enforce_sorted=False)
    wanted, final = ours(x, lengths=lengths, resets=resets)
    for form in (flags, flags.data):
        output, after = ours(packed, resets=form)
        assert_same([pad_packed_sequence(output)[0], after], [wanted, final])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(name: str, batch_first: bool) -> None:
    ours, _, _ = twins(name, 3, 4, batch_first=batch_first)
    x = torch.randn(6, 3, dtype=F64)
    resets = torch.tensor([False, False, True, False, True, False])
    output, final = ours(x, resets=resets)
    batch_dim = 0 if batch_first else 1
    wanted, wanted_final = ours(x.unsqueeze(batch_dim), resets=resets.unsqueeze(batch_dim))
    assert_same(output, wanted.squeeze(batch_dim))
    assert_same(final, mapped(wanted_final, lambda t: t.squeeze(1)))
    for form in (4, [4], torch.tensor(4), torch.tensor([4])):
        output, final = ours(x, lengths=form)
        assert_same([output[:4], final], ours(x[:4]))
        assert not output[4:].any()


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_but_empty_rows(name: str) -> None:
    """With lengths, input of no steps at all is valid: the states are passed on."""
    ours, _, _ = twins(name, 3, 4, num_layers=2, bidirectional=True)
    hx = states(name, 4, 2, 4)
    for steps in (0, 3):
        x = torch.randn(steps, 2, 3, dtype=F64, requires_grad=True)
        output, final = ours(x, hx, lengths=[0, 0])
        assert output.shape == (steps, 2, 8) and not output.any()
        assert_same(final, hx)
        assert all(a is not b for a, b in zip(flatten(final), flatten(hx), strict=True))
        found = torch.autograd.grad(sum_of(s.sum() for s in flatten(final)), [x, *flatten(hx)])
        assert not found[0].any()
        assert all((g == 1).all() for g in found[1:])
        _, final = ours(x, lengths=[0, 0])
        assert all(s.shape == (4, 2, 4) and not s.any() for s in flatten(final))
    output, _ = ours(torch.randn(3, 0, 3, dtype=F64), lengths=[])
    assert output.shape == (3, 0, 8)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_does_not_matter(name: str) -> None:
    """NaN in the padding reaches no result."""
    ours, _, _ = twins(name, 3, 4, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(5, 2, 3, dtype=F64), [5, 2]
    clean = gradients(ours(x, lengths=lengths), ours)
    output, final = ours(x, lengths=lengths)
    x[2:, 1] = float("nan")
    assert_same(ours(x, lengths=lengths), [output, final])
    found = gradients(ours(x, lengths=lengths), ours)
    assert_same(found, clean)


WIDE: dict[str, Any] = {
    "projected": lambda: fastrnn.LSTM(3, 21, 2, proj_size=9, bidirectional=True, dtype=F64),
    "heads": lambda: fastrnn.GRU(3, 20, heads=2, bidirectional=True, dtype=F64),
    "staged": lambda: fastrnn.Recurrent(staged, 3, 33, 2, dtype=F64),
    "noisy": lambda: fastrnn.Recurrent(noisy, 3, 33, bidirectional=True, dtype=F64),
}


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("form", ["dense", "packed", "unbatched"])
@pytest.mark.parametrize("plans", [{}, {"split_units": 2}, {"chunk_rows": 4}], ids=str)
def test_episodes_begin_in_given_states(kind: str, form: str, plans: dict[str, int]) -> None:
    """The kernel against the reference, with gradients of these states."""
    torch.manual_seed(0)
    layer = WIDE[kind]()
    steps, batch = 7, 5 if form != "unbatched" else 1
    x = torch.randn(steps, batch, 3, dtype=F64, requires_grad=True)
    resets = torch.rand(steps, batch) < 0.4
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    shapes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    sizes = shapes if len(layer._cell().states) > 1 else shapes[:1]

    def draw() -> Any:
        made = tuple(torch.randn(rows, batch, n, dtype=F64, requires_grad=True) for n in sizes)
        return made if len(made) > 1 else made[0]

    hx, begins = draw(), draw()
    extras: dict[str, Any] = {"resets": resets}
    lengths = torch.tensor([3, 7, 1, 6, 6])
    if form == "packed":
        extras["resets"] = pack_padded_sequence(resets, lengths, enforce_sorted=False)
    one = form == "unbatched"

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        states, begin = (mapped(s, lambda t: t[:, 0]) if one else s for s in (hx, begins))
        call = dict(extras, resets=resets[:, 0]) if one else extras
        input: Any = x[:, 0] if one else x
        if form == "packed":
            input = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, final = layer(input, states, reset_states=begin, **call)
        outputs = [y.data if form == "packed" else y, *flatten(final)]
        return [*outputs, *gradients(outputs, layer, x, hx, begins)]

    with planned(**plans):
        ours = run()
    with kernels.use("reference"):
        theirs = run()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(g.abs().max() > 0 for g in ours[-len(sizes) :])


@pytest.mark.parametrize(
    ("extras", "error", "message"),
    [
        ({"lengths": [3]}, ValueError, r"one entry for each of the 2 sequences .* shape \(1,\)"),
        ({"lengths": 3}, ValueError, r"one entry for each of the 2 sequences .* shape \(\)"),
        ({"lengths": [[3, 3]]}, ValueError, r"got shape \(1, 2\)"),
        ({"lengths": [5, 3]}, ValueError, "between 0 and the 4 steps .* values from 3 to 5"),
        ({"lengths": [-1, 3]}, ValueError, "between 0 and the 4 steps .* values from -1 to 3"),
        ({"lengths": [1.0, 2.0]}, TypeError, r"integers, got dtype torch.float32; .* int\(...\)"),
        ({"lengths": torch.ones(2)}, TypeError, r"torch.float32; convert with lengths.long\(\)"),
        ({"lengths": 2.5}, TypeError, "must be integers, got dtype torch.float32"),
        ({"lengths": [1, None]}, TypeError, "lengths must be a .* each of the 2 sequences"),
        ({"lengths": [[1], [1, 2]]}, TypeError, "lengths must be a tensor or sequence of integers"),
        ({"lengths": "12"}, TypeError, "lengths must be a tensor or sequence of integers"),
        ({"resets": [[False, True]] * 4}, TypeError, r"bool tensor, got list; .*torch.tensor\("),
        ({"lengths": torch.tensor([True, True])}, TypeError, "must be integers"),
        ({"resets": torch.zeros(4, 2)}, TypeError, r"must be bool, got torch.float32; .*bool\(\)"),
        ({"resets": torch.zeros(2, 4).bool()}, ValueError, r"dimension, \(4, 2\), got \(2, 4\)"),
        ({"resets": torch.zeros(4).bool()}, ValueError, r"dimension, \(4, 2\), got \(4,\)"),
        ({"reset_states": torch.zeros(1, 2, 5)}, ValueError, "for resets=, which is missing"),
        (
            {"resets": torch.zeros(4, 2).bool(), "reset_states": torch.zeros(1, 3, 5)},
            ValueError,
            r"the shape of hx, \(1, 2, 5\), or a batch of 1, got \(1, 3, 5\)",
        ),
        (
            {"resets": torch.zeros(4, 2).bool(), "reset_states": torch.zeros(1, 2, 5).double()},
            ValueError,
            "the dtype of the input, torch.float32, got torch.float64",
        ),
        (
            {"resets": torch.zeros(4, 2).bool(), "reset_states": [torch.zeros(1, 2, 5)] * 2},
            ValueError,
            "a tensor for each of the 1 states, got 2",
        ),
        (
            {"resets": torch.zeros(4, 2).bool(), "reset_states": 0},
            TypeError,
            "reset_states must be tensors in the form of hx, .* got 0",
        ),
        (
            {"resets": torch.zeros(4, 2).bool(), "reset_states": (None,)},
            TypeError,
            "reset_states must be tensors in the form of hx",
        ),
        (
            {"resets": PackedSequence(torch.zeros(8).bool(), torch.tensor([2] * 4))},
            ValueError,
            "resets is a PackedSequence, but the input is not",
        ),
    ],
)
def test_bad_extras(extras: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastrnn.GRU(3, 5)(torch.randn(4, 2, 3), **extras)


def test_bad_extras_in_other_layouts() -> None:
    x = torch.randn(2, 4, 3)
    layer = fastrnn.GRU(3, 5, batch_first=True)
    with pytest.raises(ValueError, match=r"dimension, \(2, 4\), got \(4, 2\)"):
        layer(x, resets=torch.zeros(4, 2).bool())
    packed = pack_padded_sequence(x, [4, 2], batch_first=True)
    with pytest.raises(ValueError, match="a PackedSequence holds its own lengths"):
        layer(packed, lengths=[4, 2])
    other = pack_padded_sequence(torch.zeros(2, 4).bool(), [4, 3], batch_first=True)
    with pytest.raises(ValueError, match="packed with the same lengths"):
        layer(packed, resets=other)
    with pytest.raises(ValueError, match=r"dimension, \(6,\), got \(7,\)"):
        layer(packed, resets=other.data)


def test_resets_packed_in_another_order() -> None:
    """The sizes are equal: only the order shows that the flags belong to other rows."""
    layer, lengths = fastrnn.GRU(3, 5), [2, 4]
    x = pack_padded_sequence(torch.randn(4, 2, 3), lengths, enforce_sorted=False)
    flags = torch.zeros(4, 2).bool()
    same = pack_padded_sequence(flags, lengths, enforce_sorted=False)
    assert same.sorted_indices is not x.sorted_indices
    layer(x, resets=same)
    layer(x, resets=PackedSequence(same.data, same.batch_sizes))
    swapped = pack_padded_sequence(flags, lengths[::-1], enforce_sorted=False)
    with pytest.raises(ValueError, match="in the order of the input: sorted_indices differ"):
        layer(x, resets=swapped)
