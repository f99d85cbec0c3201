"""A sequence's numbers depend on that sequence alone, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import plan
from tests.support.kernels import planned
from tests.support.properties import given, settings, st
from tests.support.shared import apart, mixed, staged

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Depths of sums below, at and above the length of a block, and with one block and many.
WIDTHS = (1, 7, 16, 31, 33, 64, 65, 100, 130, 200, 300)


def leaky(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A custom cell with sums of products, which compilers could fuse in more than one way."""
    c = u.a * v.b + torch.sigmoid(u.b) * c - p.each * v.a * h
    return torch.tanh(c * v.a + p.all * u.a * h), c


def custom(inputs: int, hidden: int, **options: Any) -> Any:
    learned = {
        "each": fastrnn.Param("unit", init=torch.nn.init.normal_),
        "all": fastrnn.Param("one"),
    }
    cell = fastrnn.cells.Cell("leaky_sums", ("a", "b"), ("h", "c"), leaky, learned)
    return fastrnn.Recurrent(cell, inputs, hidden, **options)


LAYERS: dict[str, Callable[..., Any]] = {
    "rnn": fastrnn.RNN,
    "lstm": fastrnn.LSTM,
    "gru": fastrnn.GRU,
    "projected": lambda inputs, hidden, **options: fastrnn.LSTM(
        inputs, hidden, proj_size=(hidden + 1) // 2, **options
    ),
    "projected with norms": lambda inputs, hidden, **options: fastrnn.LayerNormLSTM(
        inputs, hidden, proj_size=(hidden + 1) // 2, **options
    ),
    "custom": custom,
    "staged": lambda inputs, hidden, **options: fastrnn.Recurrent(
        staged, inputs, hidden, **options
    ),
    "rows": lambda inputs, hidden, **options: fastrnn.Recurrent(mixed, inputs, hidden, **options),
    "apart": lambda inputs, hidden, **options: fastrnn.Recurrent(apart, inputs, hidden, **options),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A layer of one direction and its input."""

    layer: Any
    x: Tensor  # [T, B, I]
    states: tuple[Tensor, ...]

    @classmethod
    def draw(
        cls, data: Any, dtypes: tuple[str, ...] = ("float32", "float64"), kinds: Any = None
    ) -> Case:
        torch.manual_seed(data.draw(st.integers(0, 1000)))
        dtype = DTYPES[data.draw(st.sampled_from(dtypes))]
        hidden = data.draw(st.sampled_from(WIDTHS[1:]))
        inputs = data.draw(st.sampled_from(WIDTHS))
        steps, batch = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20))
        kind = data.draw(st.sampled_from(kinds or list(LAYERS)))
        layer = LAYERS[kind](inputs, hidden).to(dtype)
        x = torch.randn(steps, batch, inputs).to(dtype)
        with torch.no_grad():
            last = layer(x[:1])[1]
        shapes = [each.shape for each in _tuple(last)]
        return cls(layer, x, tuple(torch.randn(shape).to(dtype) / 2 for shape in shapes))

    def part(self, steps: Any = slice(None), sequences: Any = slice(None)) -> Case:
        return Case(
            self.layer,
            self.x[steps][:, sequences].contiguous(),
            tuple(s[:, sequences].contiguous() for s in self.states),
        )

    def run(self, states: tuple[Tensor, ...] | None = None, **options: Any) -> list[Tensor]:
        """The output and the last states."""
        states = self.states if states is None else states
        y, last = self.layer(self.x, _pack(states), **options)
        return [y, *_tuple(last)]

    def gradients(self, dy: Tensor, dlast: list[Tensor], cut: int = 0) -> list[Tensor]:
        """Of the input, the states and the weights, by two calls if `cut` is a step."""
        x = self.x.detach().requires_grad_()
        first = tuple(s.detach().requires_grad_() for s in self.states)
        states, outputs = first, []
        for begin, end in [(0, cut), (cut, len(x))] if cut else [(0, len(x))]:
            y, *last = Case(self.layer, x[begin:end], first).run(states)
            states = tuple(last)
            outputs.append(y)
        weights = list(self.layer.parameters())
        roots = [torch.cat(outputs), *states]
        return list(torch.autograd.grad(roots, [x, *first, *weights], [dy, *dlast]))


def _tuple(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def _pack(states: tuple[Tensor, ...]) -> Any:
    return states if len(states) > 1 else states[0]


def _columns(tensors: list[Tensor], sequences: Any) -> list[Tensor]:
    return [t[:, sequences] for t in tensors]


def same(ours: list[Tensor], expected: list[Tensor], where: str) -> None:
    assert len(ours) == len(expected)
    for k, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(one, other), (where, k, (one - other).abs().max())


plans = st.fixed_dictionaries(
    {
        "weights": st.sampled_from(plan.WEIGHT_LAYOUTS),
        "split_sequences": st.integers(1, 2),
        "split_units": st.integers(1, 3),
        "chunk_rows": st.sampled_from([1, 7, 1000]),
    }
)


@settings(max_examples=30)
@given(st.data())
def test_a_row_does_not_depend_on_the_batch_the_plan_or_training(data: Any) -> None:
    case = Case.draw(data, tuple(DTYPES))
    with torch.no_grad():
        whole = case.run()
        batch = case.x.shape[1]
        some = torch.randperm(batch)[: data.draw(st.integers(1, batch))]
        with threads(data.draw(st.integers(1, 3))):
            same(case.part(sequences=some).run(), _columns(whole, some), "in another batch")
        with planned(**data.draw(plans)):
            same(case.run(), whole, "by another plan")
            same(case.part(sequences=some).run(), _columns(whole, some), "part, another plan")
        fastrnn.freeze(case.layer)
        same(case.run(), whole, "frozen")
        fastrnn.unfreeze(case.layer)
    same(case.run(), whole, "in training")
    case.layer.recompute = True
    same(case.run(), whole, "in training with recompute")


@settings(max_examples=20)
@given(st.data())
def test_a_sequence_does_not_depend_on_how_it_is_cut(data: Any) -> None:
    case = Case.draw(data)
    steps, batch = case.x.shape[:2]
    with torch.no_grad(), threads(data.draw(st.integers(1, 3))):
        whole = case.run()
        states, outputs = case.states, []
        for begin in range(0, steps, size := data.draw(st.integers(1, steps))):
            y, *last = case.part(slice(begin, begin + size)).run(states)
            states = tuple(last)
            outputs.append(y)
        same([torch.cat(outputs), *states], whole, f"{size} steps a call")
        stream = case.layer.stream(batch_size=batch, threads=data.draw(st.integers(1, 2)))
        stream.state = _pack(case.states)
        outputs = [torch.as_tensor(stream.step(x.contiguous())).clone() for x in case.x]
        states = tuple(torch.as_tensor(s) for s in _tuple(stream.state))
        same([torch.stack(outputs), *states], whole, "step by step")


@settings(max_examples=20)
@given(st.data())
def test_a_sequence_does_not_depend_on_longer_ones(data: Any) -> None:
    case = Case.draw(data, tuple(DTYPES))
    steps, batch = case.x.shape[:2]
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[data.draw(st.integers(0, batch - 1))] = steps
    with torch.no_grad(), threads(data.draw(st.integers(1, 3))):
        y, *last = case.run(lengths=lengths)
        packed = pack_padded_sequence(case.x, lengths, enforce_sorted=False)
        by_packing, states = case.layer(packed, _pack(case.states))
        padded = pad_packed_sequence(by_packing, total_length=steps)[0]
        same([padded, *_tuple(states)], [y, *last], "packed")
        for k, n in enumerate(lengths.tolist()):
            one = slice(k, k + 1)
            alone = case.part(slice(0, n), one).run()
            same(alone, [y[:n, one], *_columns(last, one)], f"sequence {k} alone")


@settings(max_examples=20)
@given(st.data())
def test_gradients_do_not_depend_on_batch_plan_or_cuts(data: Any) -> None:
    case = Case.draw(data)
    steps, batch = case.x.shape[:2]
    y, *last = case.run()
    dy, dlast = torch.randn_like(y), [torch.randn_like(s) for s in last]
    whole = case.gradients(dy, dlast)
    inputs = 1 + len(case.states)
    with planned(**data.draw(plans)):
        same(case.gradients(dy, dlast), whole, "by another plan")
    some = torch.randperm(batch)[: data.draw(st.integers(1, batch))]
    part = case.part(sequences=some).gradients(dy[:, some], _columns(dlast, some))
    same(part[:inputs], _columns(whole[:inputs], some), "in another batch")
    cut = data.draw(st.integers(0, steps - 1))
    same(case.gradients(dy, dlast, cut)[:inputs], whole[:inputs], f"cut at step {cut}")
    case.layer.recompute = True
    same(case.gradients(dy, dlast), whole, "with recompute")


QUANTISED: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int16": {"weights": "int8", "activations": "int16"},
    "bfloat16": {"weights": "bfloat16"},
}


@settings(max_examples=30)
@given(st.data())
def test_quantised_layers_are_exact_too(data: Any) -> None:
    case = Case.draw(data, ("float32",))
    fastrnn.quantize_(case.layer, **QUANTISED[data.draw(st.sampled_from(list(QUANTISED)))])
    steps, batch = case.x.shape[:2]
    with torch.no_grad():
        whole = case.run()
        some = torch.randperm(batch)[: data.draw(st.integers(1, batch))]
        with threads(data.draw(st.integers(1, 3))):
            same(case.part(sequences=some).run(), _columns(whole, some), "in another batch")
        with planned(**data.draw(plans)):
            same(case.run(), whole, "by another plan")
        cut = data.draw(st.integers(0, steps))
        y, *last = case.part(slice(0, cut)).run() if cut else [case.x.new_empty(0), *case.states]
        if cut < steps:
            later, *last = case.part(slice(cut, None)).run(tuple(last))
            y = torch.cat([y, later]) if cut else later
        same([y, *last], whole, f"cut at step {cut}")
        stream = case.layer.stream(batch_size=batch, threads=data.draw(st.integers(1, 2)))
        stream.state = _pack(case.states)
        y = torch.stack([torch.as_tensor(stream.step(x.contiguous())).clone() for x in case.x])
        same([y, *(torch.as_tensor(s) for s in _tuple(stream.state))], whole, "step by step")


def heads(inputs: int, hidden: int, **options: Any) -> Any:
    return fastrnn.GRU(inputs, hidden, heads=4, **options)


@settings(max_examples=20)
@given(st.data())
def test_gradients_of_inputs_in_bfloat16_do_not_depend_on_the_batch(data: Any) -> None:
    case = Case.draw(data, ("bfloat16",))
    y, *last = case.run()
    dy, dlast = torch.randn_like(y), [torch.randn_like(s) for s in last]
    whole = case.gradients(dy, dlast)
    inputs = 1 + len(case.states)
    drawn = data.draw(plans)
    del drawn["chunk_rows"]  # two rows share a word, and so a sum over rows follows the chunks
    with planned(**drawn):
        same(case.gradients(dy, dlast), whole, "by another plan")
    some = torch.randperm(case.x.shape[1])[: data.draw(st.integers(1, case.x.shape[1]))]
    part = case.part(sequences=some).gradients(dy[:, some], _columns(dlast, some))
    same(part[:inputs], _columns(whole[:inputs], some), "in another batch")
    case.layer.recompute = True
    same(case.gradients(dy, dlast), whole, "with recompute")


@pytest.mark.parametrize("make", [LAYERS["projected"], heads])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_do_not_depend_on_chunks(make: Callable[..., Any], bidirectional: bool) -> None:
    torch.manual_seed(0)
    layer = make(20, 40, bidirectional=bidirectional)
    x = torch.randn(23, 5, 20, requires_grad=True)
    lengths = torch.tensor([23, 3, 11, 22, 7])

    def gradients() -> list[Tensor]:
        y, _ = layer(x, lengths=lengths)
        return list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))

    whole = gradients()
    for rows in (1, 12, 40):
        with planned(chunk_rows=rows):
            same(gradients(), whole, f"chunks of {rows} rows")


def test_frozen_weights_are_read_as_they_were_packed() -> None:
    layer, x = fastrnn.GRU(20, 40).eval(), torch.randn(3, 2, 20)
    with torch.no_grad():
        whole = layer(x)[0]
        fastrnn.freeze(layer)
        for weights in plan.WEIGHT_LAYOUTS:
            with planned(weights=weights):
                assert torch.equal(layer(x)[0], whole)


def test_log_probabilities_of_a_rollout_are_those_of_training() -> None:
    torch.manual_seed(0)
    policy, head = fastrnn.GRU(12, 64), torch.nn.Linear(64, 4)
    observations, state = torch.randn(30, 8, 12), None
    rollout = []
    with torch.no_grad():
        for observation in observations:
            h, state = policy(observation[None], state)
            rollout.append(h[0])
    trained = policy(observations)[0]
    assert trained.requires_grad
    assert torch.equal(trained, torch.stack(rollout))
    # torch's Linear makes no such promise, so it is given the rows of one step at a time.
    ratio = torch.cat(
        [
            head(a).log_softmax(-1) - head(b).log_softmax(-1)
            for a, b in zip(trained, rollout, strict=True)
        ]
    ).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))
