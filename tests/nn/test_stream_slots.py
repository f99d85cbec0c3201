"""Slots: each stream has the numbers of a stepper of its own, whichever streams run with it."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.extension import _C
from fastrnn.kernels.prepare import prepare
from fastrnn.nn import stream
from tests.support.reruns import for_other_instruction_sets, run_again
from tests.support.tensors import flatten


@fastrnn.cell(gates="fgo", states="hc", name="slotted_coupled")
def coupled(u: Any, v: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f = torch.sigmoid(u.f + v.f)
    c = f * c + (1 - f) * torch.tanh(u.g + f * v.g)
    return torch.sigmoid(u.o + v.o) * torch.tanh(c) + 0.1 * h, c


LAYERS: dict[str, Callable[..., Any]] = {
    "rnn": fastrnn.RNN,
    "lstm": fastrnn.LSTM,
    "projected": partial(fastrnn.LSTM, proj_size=11),
    "projected with norms": partial(fastrnn.LayerNormLSTM, proj_size=11),
    "gru": fastrnn.GRU,
    "own": partial(fastrnn.Recurrent, coupled),
    "reductions": fastrnn.LayerNormLSTM,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def with_threads(layer: Any, capacity: int, threads: int) -> stream.Slots:
    """Slots of that many threads, regardless of the plan."""
    weights = layer._weights()
    like = weights[0].w_ih
    key = prepare(layer._cell(), dtype=like.dtype)
    assert key is not None
    scales: list[list[Tensor]] = [[] for _ in weights]
    layers = [recurrence.flat() for recurrence in weights]
    return stream.Slots(key, like, layers, _C.format_of(like), scales, capacity, threads, True)


def only(slots: stream.Slots, slot: int) -> Tensor:
    """The state of a stream of a cell with one."""
    state = slots.state(slot)
    assert isinstance(state, Tensor)
    return state


class Pair:
    """Slots, and a stepper of its own for each stream, whose numbers they should have."""

    def __init__(self, layer: Any, slots: stream.Slots) -> None:
        self.layer, self.slots = layer, slots
        self.steppers: dict[int, stream.Stepper] = {}

    def add(self) -> int:
        slot = self.slots.add()
        assert slot not in self.steppers
        self.steppers[slot] = self.layer.stream()
        return slot

    def remove(self, slot: int) -> None:
        self.slots.remove(slot)
        del self.steppers[slot]

    def expected(self, x: Tensor, chosen: list[int]) -> Tensor:
        return torch.cat(
            [self.steppers[s].step(row[None]) for row, s in zip(x, chosen, strict=True)]
        )

    def step(self, chosen: list[int]) -> None:
        x = torch.randn(len(chosen), self.slots.input_size).to(self.layer.weight_ih_l0.dtype)
        assert torch.equal(self.slots.step(x, chosen), self.expected(x, chosen))

    def run(self, chosen: list[int], steps: int) -> None:
        x = torch.randn(len(chosen), steps, self.slots.input_size)
        x = x.to(self.layer.weight_ih_l0.dtype)
        y = self.slots.run(x, chosen)
        assert y.shape == (len(chosen), steps, self.slots.output_size)
        for t in range(steps):
            assert torch.equal(y[:, t], self.expected(x[:, t], chosen))

    def check_states(self) -> None:
        assert len(self.slots) == len(self.steppers)
        for slot, stepper in self.steppers.items():
            for ours, expected in zip(
                flatten(self.slots.state(slot)), flatten(stepper.state), strict=True
            ):
                assert torch.equal(ours, expected[:, 0])


def walk(pair: Pair, moves: int, seed: int) -> None:
    """Adds, removes and runs streams in a random order."""
    draw = random.Random(seed)
    for _ in range(moves):
        taken = sorted(pair.steppers)
        chosen = draw.sample(taken, draw.randint(0, len(taken)))
        move = draw.choice(["add", "add", "remove", "step", "step", "step", "run"])
        if move == "add" and len(taken) < pair.slots.capacity:
            pair.add()
        elif move == "remove" and taken:
            pair.remove(draw.choice(taken))
        elif move == "step" and chosen:
            pair.step(chosen)
        elif move == "run" and chosen:
            pair.run(chosen, draw.randint(1, 4))
    pair.check_states()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_stream_is_a_stepper_of_its_own(kind: str, layers: int, dtype: torch.dtype) -> None:
    layer = LAYERS[kind](7, 19, num_layers=layers, dtype=dtype).requires_grad_(False)
    walk(Pair(layer, layer.stream_slots(9)), 120, seed=layers)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["lstm", "projected", "gru"])
def test_threads_change_no_number(kind: str, threads: int) -> None:
    layer = LAYERS[kind](5, 67, num_layers=2).requires_grad_(False)
    walk(Pair(layer, with_threads(layer, 30, threads)), 60, seed=threads)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_more_streams_than_run_at_a_time(kind: str) -> None:
    layer = LAYERS[kind](3, 8).requires_grad_(False)
    pair = Pair(layer, layer.stream_slots(300))
    slots = [pair.add() for _ in range(300)]
    assert slots == list(range(300))
    random.Random(0).shuffle(slots)
    for count in (300, 128, 129, 257, 1):
        pair.step(slots[:count])
        pair.run(slots[-count:], 2)
    pair.check_states()


@pytest.mark.parametrize("kind", [fastrnn.GRU, fastrnn.GRUResetBefore])
def test_quantised_layers_and_cells(kind: Any) -> None:
    layer = kind(6, 24, num_layers=2)
    fastrnn.quantize_(layer)
    slots, x = layer.stream_slots(4), torch.randn(3, 4, 6)
    chosen = [slots.add() for _ in range(3)]
    y = slots.run(x, chosen)
    for row, ours in zip(x, y, strict=True):
        stepper = layer.stream()
        assert torch.equal(ours, torch.cat([stepper.step(each[None]) for each in row]))

    cell = fastrnn.LSTMCell(6, 24).requires_grad_(False)
    slots = cell.stream_slots(2)
    slot = slots.add()
    h = slots.step(x[:1, 0], [slot])
    assert torch.equal(h, cell.stream().step(x[:1, 0]))
    assert [each.shape for each in slots.state(slot)] == [(1, 24)] * 2


def test_whole_sequences_are_those_of_the_layer() -> None:
    layer = fastrnn.LSTM(5, 12, batch_first=True).requires_grad_(False)
    slots, x = layer.stream_slots(3), torch.randn(3, 6, 5)
    chosen = [slots.add() for _ in range(3)]
    y, (h, c) = layer(x)
    assert torch.equal(torch.cat([slots.run(x[:, :4], chosen), slots.run(x[:, 4:], chosen)], 1), y)
    for k, slot in enumerate(chosen):
        assert torch.equal(slots.state(slot)[0], h[:, k])
        assert torch.equal(slots.state(slot)[1], c[:, k])


def test_slots_are_taken_and_freed() -> None:
    slots = fastrnn.GRU(3, 5).stream_slots(2)
    assert (len(slots), slots.capacity, 0 in slots) == (0, 2, False)
    first, second = slots.add(), slots.add()
    assert {first, second} == {0, 1} and len(slots) == 2
    assert first in slots and 2 not in slots and -1 not in slots and 1 << 70 not in slots
    assert "first" not in slots
    with pytest.raises(RuntimeError, match="all 2 slots are taken"):
        slots.add()
    slots.run(torch.randn(2, 3, 3), [first, second])
    assert only(slots, first).any()
    slots.remove(first)
    assert first not in slots and len(slots) == 1
    with pytest.raises(ValueError, match=f"no stream has slot {first}"):
        slots.remove(first)
    assert slots.add() == first
    assert not only(slots, first).any() and only(slots, second).any()
    slots.reset(second)
    assert not only(slots, second).any()


def test_states_go_in_and_out() -> None:
    layer = fastrnn.LSTM(3, 5, num_layers=2, proj_size=2).requires_grad_(False)
    slots, stepper, x = layer.stream_slots(4), layer.stream(), torch.randn(6, 1, 3)
    _, slot = slots.add(), slots.add()
    states = torch.randn(2, 2), torch.randn(2, 5)
    slots.set_state(slot, states)
    assert all(torch.equal(*pair) for pair in zip(slots.state(slot), states, strict=True))
    stepper.state = [each[:, None] for each in states]
    for each in x:
        assert torch.equal(slots.step(each, [slot]), stepper.step(each))
    other = fastrnn.GRU(3, 5).stream_slots(1)
    other.set_state(other.add(), torch.ones(1, 5))
    assert bool((only(other, 0) == 1).all())
    wrong: Any
    for wrong, message in [
        (states[:1], "2 tensors, got 1"),
        ((states[0], states[0]), r"state 1 .*\[2, 5\] \(layers, width\).*\[2, 2\]"),
        ((states[0], states[1].long()), "floating"),
    ]:
        with pytest.raises(ValueError, match=message):
            slots.set_state(slot, wrong)
    for unknown in (2, -1):
        with pytest.raises(ValueError, match=f"no stream has slot {unknown}"):
            slots.set_state(unknown, states)
        with pytest.raises(ValueError, match=f"no stream has slot {unknown}"):
            slots.state(unknown)


def test_every_form_of_slots_and_frames() -> None:
    layer = fastrnn.GRU(3, 5).requires_grad_(False)
    slots, x = layer.stream_slots(4), torch.randn(2, 3)
    for _ in range(4):
        slots.add()
    stepper = layer.stream(2)
    numbers = torch.tensor([3, 9, 1, 9])[::2]  # rows of a larger tensor
    forms: list[Any] = [[3, 1], (3, 1), numbers, numbers.numpy(), np.array([3, 1])]
    forms += [[np.int64(3), torch.tensor(1)], np.array([1, 3])[::-1]]
    for given in forms:
        expected = stepper.step(x)
        y = slots.step(x, given)
        assert type(y) is Tensor and torch.equal(y, expected)
        result = slots.step(x.numpy(), slots=given)
        assert type(result) is np.ndarray
        assert (result == stepper.step(x).numpy()).all()
        out = torch.empty(2, 5)
        assert slots.step(x=x, slots=given, out=out) is out
        assert torch.equal(out, stepper.step(x))
    assert slots.step(torch.empty(0, 3), []).shape == (0, 5)
    assert slots.run(torch.empty(0, 4, 3), []).shape == (0, 4, 5)
    assert slots.run(torch.empty(2, 0, 3), [3, 1]).shape == (2, 0, 5)
    assert torch.equal(slots.step(x, [3, 1]), stepper.step(x))


def test_frames_may_lie_in_any_order() -> None:
    layer = fastrnn.GRU(3, 3).requires_grad_(False)
    x = torch.randn(4, 2, 3)  # time first
    y = layer(x)[0]

    def made() -> tuple[stream.Slots, list[int]]:
        slots = layer.stream_slots(2)
        return slots, [slots.add(), slots.add()]

    slots, chosen = made()
    out = torch.full((4, 3, 4), torch.nan)
    slots.run(x.transpose(0, 1), chosen, out[:, 1:, :3].transpose(0, 1))
    assert torch.equal(out[:, 1:, :3], y) and out[:, 0].isnan().all() and out[..., 3].isnan().all()

    slots, chosen = made()
    same = x.transpose(0, 1).clone()
    assert slots.run(same, chosen, same) is same
    assert torch.equal(same, y.transpose(0, 1))

    slots, chosen = made()
    memory = torch.zeros(3, 3)
    memory[1:] = x[0]
    with pytest.raises(ValueError, match="out overlaps x"):
        slots.step(memory[1:], chosen, memory[:2])
    windows = torch.randn(12).as_strided((2, 3, 3), (6, 1, 1))
    with pytest.raises(ValueError, match="rows of out overlap"):
        slots.run(windows.clone(), chosen, windows)
    for strides in ((0, 3, 1), (3, 3, 1), (4, 6, 1), (3, 0, 1)):
        out = torch.zeros(40).as_strided((2, 4, 3), strides)
        with pytest.raises(ValueError, match="rows of out overlap"):
            slots.run(x.transpose(0, 1), chosen, out)
    assert not any(only(slots, slot).any() for slot in chosen)
    slots.run(windows, chosen)


@pytest.mark.parametrize(
    ("x", "chosen", "out", "error", "message"),
    [
        (torch.zeros(2, 3), [0], None, ValueError, r"\(1, 3\), the slots.*got \(2, 3\)"),
        (torch.zeros(3), [0], None, ValueError, r"got \(3,\)"),
        (torch.zeros(1, 4, 3), [0], None, ValueError, r"got \(1, 4, 3\)"),
        (torch.zeros(1, 3).double(), [0], None, ValueError, "x should be float32.*got float64"),
        (torch.zeros(1, 6)[:, ::2], [0], None, ValueError, "side by side"),
        (torch.zeros(1, 3), [0], torch.zeros(2, 5), ValueError, r"out should have shape \(1, 5\)"),
        (torch.zeros(1, 3), [2], None, ValueError, "no stream has slot 2"),
        (torch.zeros(1, 3), [-1], None, ValueError, "no stream has slot -1"),
        (torch.zeros(1, 3), [1 << 70], None, ValueError, "no stream has slot 118"),
        (torch.zeros(2, 3), [1, 1], None, ValueError, r"slot 1 is given twice.*run\(\)"),
        (torch.zeros(2, 3), torch.tensor([0, 0]), None, ValueError, "slot 0 is given twice"),
        (torch.zeros(9, 3), list(range(9)), None, ValueError, "no stream has slot 2"),
        (torch.zeros(1, 3), 0, None, TypeError, "slots should be.*got int"),
        (torch.zeros(1, 3), None, None, TypeError, "slots should be.*got NoneType"),
        (torch.zeros(1, 3), [0.0], None, TypeError, "slots should be.*got float"),
        (torch.zeros(1, 3), torch.tensor([0.0]), None, TypeError, "another tensor"),
        (torch.zeros(1, 3), torch.tensor(0), None, TypeError, "another tensor"),
        (torch.zeros(1, 3), np.array([0], "i4"), None, TypeError, "another array"),
        (torch.zeros(1, 3), np.array([0], ">i8"), None, TypeError, "another array"),
        (torch.zeros(1, 3), np.array([[0]]), None, TypeError, "another array"),
        (torch.zeros(1, 3, requires_grad=True), [0], None, RuntimeError, "requires gradients"),
    ],
)
def test_what_a_step_refuses(
    x: Any, chosen: Any, out: Any, error: type[Exception], message: str
) -> None:
    slots = fastrnn.GRU(3, 5).stream_slots(5)
    slots.add(), slots.add()
    slots.set_state(1, torch.ones(1, 5))
    with pytest.raises(error, match=f"(?s){message}"):
        slots.step(x, chosen, out)
    assert not only(slots, 0).any() and bool((only(slots, 1) == 1).all())
    slots.step(torch.zeros(2, 3), [0, 1])  # the slots still work


def test_wrong_calls() -> None:
    layer = fastrnn.GRU(3, 5)
    slots: Any = layer.stream_slots(2)
    x, slot = torch.zeros(1, 3), slots.add()
    for call in (
        lambda: slots.step(),
        lambda: slots.step(x),
        lambda: slots.step(x, [slot], None, None),
        lambda: slots.step(x, [slot], y=x),
        lambda: slots.step(x, [slot], x=x),
        lambda: slots.step(slots=[slot]),
    ):
        with pytest.raises(TypeError, match=r"step\(x, slots, out=None\)"):
            call()
    with pytest.raises(TypeError, match=r"run\(x, slots, out=None\)"):
        slots.run(x)
    with pytest.raises(ValueError, match=r"x should have shape \(1, T, 3\).*got \(1, 3\)"):
        slots.run(x, [slot])
    with pytest.raises(ValueError, match=r"out should have shape \(1, 2, 5\).*got \(1, 3, 5\)"):
        slots.run(torch.zeros(1, 2, 3), [slot], torch.zeros(1, 3, 5))
    for wrong in ({"capacity": 0}, {"capacity": 1.0}, {"capacity": 1, "threads": 0}):
        with pytest.raises(ValueError, match="positive integer"):
            layer.stream_slots(**wrong)
    with pytest.raises(ValueError, match="bidirectional=False"):
        fastrnn.GRU(3, 5, bidirectional=True).stream_slots(2)
    with pytest.raises(ValueError, match="heads=2"):
        fastrnn.GRU(3, 6, heads=2).stream_slots(2)
    for unwanted in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"layer\.stream_slots"):
            unwanted(slots)


def test_a_list_that_changes_while_it_is_read() -> None:
    slots = fastrnn.GRU(3, 5).stream_slots(4)
    for _ in range(3):
        slots.add()

    class Index:
        def __init__(self, act: Callable[[], object]) -> None:
            self.act = act

        def __index__(self) -> int:
            self.act()
            return 0

    chosen: list[Any] = [Index(lambda: chosen.clear()), 1, 2]
    with pytest.raises(ValueError, match=r"x should have shape \(1, 3\)"):
        slots.step(torch.zeros(3, 3), chosen)
    with pytest.raises(RuntimeError, match="runs slot 1"):
        slots.step(torch.zeros(2, 3), [1, Index(lambda: slots.remove(1))])
    with pytest.raises(RuntimeError, match="another thread runs these slots"):
        slots.step(torch.zeros(1, 3), [Index(lambda: slots.step(torch.zeros(1, 3), [1]))])
    assert len(slots) == 3 and slots.step(torch.zeros(1, 3), [0]).shape == (1, 5)


def test_other_threads_may_use_other_slots() -> None:
    layer = fastrnn.GRU(256, 256).requires_grad_(False)
    slots = layer.stream_slots(70)
    chosen = [slots.add() for _ in range(64)]
    x = torch.randn(64, 50, 256)
    results: list[Tensor] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with suppress(RuntimeError):  # the other thread runs these slots
                results.append(slots.run(x, chosen))

    running = threading.Thread(target=run)
    running.start()
    refused = added = 0
    deadline = time.monotonic() + 300
    while not (results and added and refused) and time.monotonic() < deadline:
        extra = slots.add()
        slots.set_state(extra, torch.ones(1, 256))
        slots.reset(extra)
        assert not only(slots, extra).any()
        slots.remove(extra)
        added += 1
        try:
            slots.state(chosen[0])
        except RuntimeError as error:
            assert "another thread runs slot" in str(error)
            refused += 1
        try:
            slots.step(torch.zeros(0, 256), [])
        except RuntimeError as error:
            assert "another thread runs these slots" in str(error)
        time.sleep(0.001)
    stop.set()
    running.join()
    assert added and refused
    expected = layer.stream(64)
    for t in range(50):
        assert torch.equal(results[0][:, t], expected.step(x[:, t].contiguous()))


def test_a_call_without_the_gil_only_if_asked() -> None:
    layer = fastrnn.GRU(3, 5).requires_grad_(False)
    one, other = layer.stream_slots(1), layer.stream_slots(1, release_gil=False)
    x = torch.randn(1, 4, 3)
    assert torch.equal(one.run(x, [one.add()]), other.run(x, [other.add()]))


@pytest.mark.skipif(sys.platform != "linux", reason="others count memory in other units")
def test_memory_does_not_grow() -> None:
    resource = pytest.importorskip("resource")
    layer = fastrnn.LSTM(8, 16, num_layers=2)
    slots = layer.stream_slots(64)
    x, out = torch.zeros(32, 8), torch.empty(32, 16)
    frames, block = torch.zeros(32, 5, 8), torch.empty(32, 5, 16)
    chosen = [slots.add() for _ in range(32)]

    def serve(number: int) -> None:
        for _ in range(number):
            slots.step(x, chosen, out)
            slots.run(frames, chosen, block)
            slots.remove(chosen.pop())
            chosen.append(slots.add())

    serve(200)
    frames_of_a_round = 32 + 32 * 5
    before = sys.getallocatedblocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    serve(1_000_000 // frames_of_a_round + 1)
    after = sys.getallocatedblocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after[0] - before[0] < 10 and after[1] - before[1] < 512, (before, after)


def test_facts() -> None:
    slots = fastrnn.LSTM(3, 6, num_layers=2, proj_size=4).stream_slots(7)
    assert (slots.capacity, slots.input_size, slots.output_size, slots.num_layers) == (7, 3, 4, 2)
    assert (slots.threads, slots.weights) == (1, "float32") and slots.nbytes > 0
    assert fastrnn.GRU(256, 256).stream_slots(4, threads=2).threads == 2


@for_other_instruction_sets(20)
def test_other_instruction_sets(isa: str) -> None:
    """Runs the tests of numbers again with the code for an older processor."""
    chosen = "stepper_of_its_own or no_number or at_a_time or quantised"
    run_again(isa, __file__, "-k", chosen)
