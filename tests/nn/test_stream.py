"""Steppers: the steps give the results of the whole sequence, and have no side effects."""

from __future__ import annotations

import array
import copy
import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import kernels, plan
from fastrnn.extension import _C
from fastrnn.kernels.prepare import prepare
from fastrnn.nn import stream
from tests.support.modules import twins
from tests.support.names import CELLS, DTYPES
from tests.support.paths import ROOT
from tests.support.reruns import for_other_instruction_sets, run_again
from tests.support.tensors import flatten
from tests.support.tolerance import assert_matches


@fastrnn.cell(gates="fgo", states="hc", name="streamed_coupled")
def coupled(u: Any, v: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f = torch.sigmoid(u.f + v.f)
    c = f * c + (1 - f) * torch.tanh(u.g + f * v.g)
    return torch.sigmoid(u.o + v.o) * torch.tanh(c) + 0.1 * h, c


LAYERS: dict[str, Callable[..., Any]] = {
    "tanh": fastrnn.RNN,
    "relu": partial(fastrnn.RNN, nonlinearity="relu", bias=False),
    "lstm": fastrnn.LSTM,
    "projected": lambda i, h, **k: fastrnn.LSTM(i, h, proj_size=h // 2, **k),
    "projected with norms": lambda i, h, **k: fastrnn.LayerNormLSTM(i, h, proj_size=h // 2, **k),
    "gru": fastrnn.GRU,
    "own": lambda *a, **k: fastrnn.Recurrent(coupled, *a, **k),
}


def made(kind: str, *sizes: int, **kwargs: Any) -> Any:
    return LAYERS[kind](*sizes, **kwargs).requires_grad_(False)


def with_threads(layer: Any, batch: int, threads: int) -> stream.Stepper:
    """A stepper of that many threads, regardless of the plan."""
    weights = layer._weights()
    like = weights[0].w_ih
    key = prepare(layer._cell(), dtype=like.dtype)
    assert key is not None
    scales: list[list[Tensor]] = [[] for _ in weights]
    layers = [recurrence.flat() for recurrence in weights]
    return stream.Stepper(key, like, layers, _C.format_of(like), scales, batch, threads, True)


def stepped(stepper: stream.Stepper, x: Tensor) -> Tensor:
    return torch.stack([stepper.step(each) for each in x])


def assert_close(ours: Any, theirs: Any) -> None:
    for one, other in zip(flatten(ours), flatten(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("hidden", [1, 5, 64, 67])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_step_by_step_is_the_whole_sequence(
    kind: str, layers: int, hidden: int, batch: int, threads: int
) -> None:
    layer = made(kind, 3, hidden, num_layers=layers, dtype=torch.float64)
    stepper = with_threads(layer, batch, threads)
    x = torch.randn(5, batch, 3, dtype=torch.float64)
    y, last = layer(x)
    assert_close(stepped(stepper, x), y)
    assert_close(stepper.state, last)
    y, last = layer(x, last)  # and on
    assert_close(stepped(stepper, x), y)
    assert_close(stepper.state, last)
    stepper.reset()
    assert_close(stepped(stepper, x), layer(x)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_step_by_step(name: str, batch: int, bias: bool) -> None:
    cell = getattr(fastrnn, name)(3, 17, bias=bias, dtype=torch.float64)
    stepper = cell.stream(batch, threads=1, release_gil=False)
    states = None
    for x in torch.randn(5, batch, 3, dtype=torch.float64):
        states = cell(x, states)
        assert_close(stepper.step(x), flatten(states)[0])
    for ours, theirs in zip(flatten(stepper.state), flatten(states), strict=True):
        assert_close(ours, theirs.unsqueeze(0))
    with pytest.raises(ValueError, match="batch_size should be a positive integer"):
        cell.stream(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_as_accurate_as_torch(name: str, dtype: torch.dtype) -> None:
    ours, torchs, exact = twins(name, 33, 67, num_layers=2, dtype=dtype)
    x = torch.randn(40, 2, 33, dtype=dtype)
    stepper = ours.stream(2)
    with torch.no_grad():
        y, expected = torchs(x)[0], exact(x.double())[0]
        assert_matches({"y": stepped(stepper, x)}, {"y": y}, {"y": expected})


@pytest.mark.parametrize("kind", LAYERS)
def test_state_can_be_taken_and_put_back(kind: str) -> None:
    layer = made(kind, 3, 19, num_layers=2, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    stepper = layer.stream(2)
    stepped(stepper, x[:3])
    kept = stepper.state
    rest = stepped(stepper, x[3:])
    assert_close(kept, layer(x[:3])[1])  # a copy
    stepper.reset()
    assert all(not s.any() for s in flatten(stepper.state))
    stepper.state = kept
    assert torch.equal(stepped(stepper, x[3:]), rest)
    stepper.state = layer(x)[1]
    assert_close(stepped(stepper, x), layer(x, layer(x)[1])[0])


def test_wrong_states_change_nothing() -> None:
    stepper = fastrnn.LSTM(3, 5).stream()
    good = torch.ones(1, 1, 5)
    stepper.state = good, good
    wrong: Any
    for wrong, message in [
        ((good,), r"2 tensors, got 1"),
        (good, r"2 tensors, got 1"),
        ((good, good[0]), r"state 1 .*\[1, 1, 5\].*\[1, 5\]"),
        ((2 * good, good.expand(2, 1, 5)), r"state 1 .*\[2, 1, 5\]"),
        ((2 * good, good.long()), "floating"),
    ]:
        with pytest.raises(ValueError, match=message):
            stepper.state = wrong
    assert all(torch.equal(s, good) for s in stepper.state)


def test_every_kind_of_buffer() -> None:
    layer = made("gru", 3, 5)
    x = torch.randn(1, 3)
    right = layer.stream().step(x)
    assert type(right) is Tensor and right.shape == (1, 5)
    assert layer.stream().step(x[0]).shape == (5,)

    result = layer.stream().step(x.numpy())
    assert type(result) is np.ndarray and result.dtype == np.float32 and result.shape == (1, 5)
    assert (result == right.numpy()).all()
    assert layer.stream().step(x[0].numpy()).shape == (5,)
    outs: list[Any] = [torch.empty(1, 5), torch.empty(5), np.empty((1, 5), "f")]
    outs += [array.array("f", [0] * 5), memoryview(bytearray(20)).cast("f")]
    outs += [np.empty((1, 5), "f").view(np.memmap), torch.nn.Parameter(torch.empty(1, 5), False)]
    buffer: Any = x.numpy()
    inputs: list[Any] = [x, x[0], buffer, array.array("f", x[0].tolist()), memoryview(buffer)]
    for given in inputs:
        for out in outs:
            assert layer.stream().step(given, out) is out
            assert layer.stream().step(out=out, x=given) is out
            assert (np.asarray(out) == right.numpy()).all()
    with pytest.raises(TypeError, match="pass out="):
        layer.stream().step(array.array("f", [0] * 3))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_of_arrays(dtype: str) -> None:
    layer = made("lstm", 3, 5, dtype=getattr(torch, dtype))
    x = np.random.default_rng(0).normal(size=(1, 3)).astype(dtype)
    out = layer.stream().step(x)
    assert out.dtype == np.dtype(dtype)
    assert (out == layer.stream().step(torch.from_numpy(x)).numpy()).all()


@pytest.mark.parametrize("kind", ["gru", "projected"])
@pytest.mark.parametrize("layers", [1, 2])
def test_out_may_be_x(kind: str, layers: int) -> None:
    layer = made(kind, 70, 140 if kind == "projected" else 70, num_layers=layers)
    for threads in (1, 2):
        x = torch.randn(4, 3, 70)
        right = stepped(with_threads(layer, 3, threads), x)
        stepper = with_threads(layer, 3, threads)
        for each, expected in zip(x, right, strict=True):
            memory = torch.full((4, 70), torch.nan)
            memory[:3] = each
            assert stepper.step(memory[:3], memory[1:]) is not None
            assert torch.equal(memory[1:], expected)


def test_rows_may_lie_apart() -> None:
    layer = made("lstm", 4, 5)
    x, out = torch.randn(3, 6, 4), torch.full((3, 2, 5), torch.nan)
    whole = layer.stream(3)
    stepper, arrays = layer.stream(3), layer.stream(3)
    for t in range(6):
        right = whole.step(x[:, t].contiguous())
        stepper.step(x[:, t], out[:, 0])
        assert torch.equal(out[:, 0], right) and out[:, 1].isnan().all()
        result = np.full((3, 2, 5), np.nan, "f")
        arrays.step(x.numpy()[:, t], result[::-1, 1])
        assert (result[::-1, 1] == right.numpy()).all() and np.isnan(result[:, 0]).all()


@pytest.mark.parametrize(
    ("x", "out", "error", "message"),
    [
        (torch.zeros(2, 3), None, ValueError, r"x should have shape \(1, 3\).*got \(2, 3\)"),
        (torch.zeros(4), None, ValueError, r"\(1, 3\) or without the first.*got \(4,\)"),
        (np.zeros((1, 1, 3), "f"), None, ValueError, r"got \(1, 1, 3\)"),
        (torch.zeros(()), None, ValueError, r"got \(\)"),
        (torch.zeros(1, 3), torch.zeros(1, 3), ValueError, r"out should have shape \(1, 5\)"),
        (torch.zeros(1, 3).double(), None, ValueError, "x should be float32.*got float64"),
        (torch.zeros(1, 3).int(), None, ValueError, "x should be float32.*got Int"),
        (np.zeros((1, 3)), None, ValueError, "x should be float32.*got float64"),
        (np.zeros((1, 3), ">f4"), None, ValueError, "x should be float32.*got >f4"),
        (np.zeros((1, 3), "i"), None, ValueError, "x should be float32.*got int32"),
        (array.array("d", [0] * 3), None, ValueError, "x should be float32.*got d"),
        (b"abc", None, ValueError, "x should be float32.*got B"),
        (torch.zeros(1, 6)[:, ::2], None, ValueError, r"side by side.*x\.contiguous"),
        (np.zeros((3, 2), "f")[:, 0], None, ValueError, r"side by side"),
        (np.zeros(13, "b")[1:].view("f"), None, ValueError, "aligned"),
        (torch.zeros(1, 3).to("meta"), None, ValueError, "CPU"),
        (torch.zeros(1, 3).to_sparse(), None, ValueError, "dense"),
        (torch._neg_view(torch.zeros(1, 3)), None, ValueError, "plain dense"),
        (torch.zeros(1, 3, requires_grad=True), None, RuntimeError, r"x\.detach.*no_grad"),
        (torch.zeros(1, 3), torch.zeros(1, 5, requires_grad=True), RuntimeError, "out requires"),
        ([[0.0] * 3], None, TypeError, "got list"),
        (None, None, TypeError, "got NoneType"),
        (torch.zeros(1, 3), [0.0] * 5, TypeError, "out should be a torch.Tensor.*got list"),
        (torch.zeros(1, 3), b"12345678901234567890", ValueError, "got B"),
        (torch.zeros(1, 3), memoryview(bytes(20)).cast("f"), ValueError, "read-only"),
        (torch.zeros(1, 3), np.broadcast_to(np.float32(0), (1, 5)), ValueError, "read-only"),
    ],
)
def test_what_a_step_refuses(x: Any, out: Any, error: type[Exception], message: str) -> None:
    stepper = fastrnn.GRU(3, 5).stream()
    with pytest.raises(error, match=f"(?s){message}"):
        stepper.step(x, out)
    assert isinstance(stepper.state, Tensor)
    assert not stepper.state.any()
    stepper.step(torch.zeros(1, 3))  # the stepper still works


def test_wrong_calls() -> None:
    step: Any = fastrnn.GRU(3, 5).stream().step
    x = torch.zeros(1, 3)
    for call in (
        lambda: step(),
        lambda: step(out=x),
        lambda: step(x, None, None),
        lambda: step(x, y=x),
        lambda: step(x, x=x),
        lambda: step(x, x, out=x),
    ):
        with pytest.raises(TypeError, match=r"step\(x, out=None\)"):
            call()
    with pytest.raises(ValueError, match="overlap"):
        fastrnn.GRU(3, 5).stream(2).step(torch.zeros(2, 3), torch.zeros(1, 5).expand(2, 5))
    with torch.no_grad():
        step(torch.zeros(1, 3, requires_grad=True))


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="bidirectional=False"):
        fastrnn.GRU(3, 5, bidirectional=True).stream()
    for wrong in ({"batch_size": 0}, {"threads": 0}, {"batch_size": 1.0}):
        with pytest.raises(ValueError, match="positive integer"):
            fastrnn.GRU(3, 5).stream(**wrong)
    with pytest.raises(ValueError, match="meta"):
        fastrnn.GRU(3, 5, device="meta").stream()
    for unwanted in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"layer\.stream"):
            unwanted(fastrnn.GRU(3, 5).stream())


@pytest.mark.parametrize(
    ("which", "shape"),
    [
        ("weight_ih_l0", (20, 3)),
        ("weight_hh_l0", (20, 4)),
        ("weight_hh_l0", (19, 5)),
        ("bias_ih_l0", (19,)),
        ("bias_hh_l0", (21,)),
        ("weight_hr_l0", (2, 4)),
        ("weight_hr_l0", (3, 5)),
    ],
)
def test_weights_that_do_not_fit(which: str, shape: tuple[int, ...]) -> None:
    """The kernel would read past the ends of such weights."""
    layer = fastrnn.LSTM(4, 5, proj_size=2)
    setattr(layer, which, torch.nn.Parameter(torch.zeros(shape)))
    if which == "weight_ih_l0":  # another number of inputs is valid
        assert layer.stream().input_size == 3
    else:
        with pytest.raises(RuntimeError, match=r"should be|fit onto each other"):
            layer.stream()


@pytest.mark.filterwarnings("ignore:cell")
def test_a_cell_without_compiled_code() -> None:
    cell = fastrnn.cell(gates="h", states="h", name="streamed_summing")(
        lambda u, v, h: torch.tanh(u.h + v.h).cumsum(-1)
    )
    with pytest.raises(plan.KernelRefused, match="streamed_summing"):
        fastrnn.Recurrent(cell, 3, 4).stream()


def test_another_kernel_is_not_replaced_silently() -> None:
    with kernels.use("reference"), pytest.raises(plan.KernelRefused, match="'reference'"):
        fastrnn.GRU(3, 4).stream()
    with kernels.use("cpu"):
        fastrnn.GRU(3, 4).stream()


def test_a_stepper_has_weights_of_its_own() -> None:
    layer = made("gru", 3, 5)
    stepper, other, x = layer.stream(), layer.stream(), torch.randn(1, 3)
    before = stepper.step(x)
    layer.weight_ih_l0.zero_()
    del layer
    gc.collect()
    assert torch.equal(other.step(x), before)
    assert (stepper.batch_size, stepper.input_size, stepper.output_size) == (1, 3, 5)
    assert (stepper.num_layers, stepper.threads) == (1, 1)


def test_a_buffer_stays_in_place_during_a_step_only() -> None:
    memory = bytearray(12)
    layer, out = fastrnn.GRU(3, 5), np.empty(5, "f")
    layer.stream().step(memoryview(memory).cast("f"), out)
    with pytest.raises(ValueError, match="should"):
        layer.stream().step(memory, out)
    memory.extend(b"more")  # no buffer is left exported


def test_writing_counts_as_a_change_of_out() -> None:
    stepper, x = fastrnn.GRU(3, 3).stream(), torch.zeros(1, 3)
    weight = torch.ones(1, 3, requires_grad=True)
    out = torch.ones(1, 3)
    loss = (weight * out).sum()
    stepper.step(x, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        stepper.step(x, torch.empty(1, 3))
        stepper.step(x)


def test_streams_in_threads_do_not_meet() -> None:
    layer = made("lstm", 9, 33, num_layers=2)
    x = torch.randn(4, 200, 1, 9)
    right = [stepped(layer.stream(), each) for each in x]
    results: list[Any] = [None] * 4

    def run(k: int) -> None:
        results[k] = stepped(layer.stream() if k % 2 else with_threads(layer, 1, 2), x[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for ours, expected in zip(results, right, strict=True):
        torch.testing.assert_close(ours, expected)


def test_one_stream_in_two_threads_is_refused() -> None:
    stepper = fastrnn.GRU(512, 512).stream(64)
    x, out = torch.zeros(64, 512), torch.empty(64, 512)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                stepper.step(x, out)
            except RuntimeError:
                time.sleep(0.001)

    other = threading.Thread(target=run)
    other.start()
    try:
        with pytest.raises(RuntimeError, match="in use by another thread"):
            for _ in range(100_000):
                stepper.step(x, torch.empty(64, 512))
    finally:
        stop.set()
        other.join()


def test_denormals_are_flushed_in_a_step_only() -> None:
    layer = made("relu", 1, 1)
    layer.weight_ih_l0.fill_(1)
    tiny = np.full((1, 1), 1e-40, "f")
    assert layer.stream().step(tiny) == 0
    assert torch.from_numpy(tiny).mul(1) > 0


def test_helpers_that_fell_asleep_wake_up() -> None:
    layer = made("gru", 3, 70)
    x = torch.randn(6, 1, 3)
    stepper = with_threads(layer, 1, 3)
    for each, expected in zip(x, stepped(layer.stream(), x), strict=True):
        time.sleep(0.01)
        torch.testing.assert_close(stepper.step(each), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_steps_alone() -> None:
    layer = made("gru", 3, 70)
    stepper, x = with_threads(layer, 1, 2), np.ones((1, 3), "f")
    right = layer.stream().step(x)
    child = os.fork()
    if child == 0:
        good = np.allclose(stepper.step(x), right)
        del stepper
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_are_for_weights_that_take_time_to_read() -> None:
    device = plan.Device(cpu=plan.CpuFacts(threads=4))
    sizes = (1, 200_000, 300_000, 1 << 20)
    assert [plan.step_threads(size, device) for size in sizes] == [1, 1, 2, 4]
    assert fastrnn.GRU(64, 64).stream(threads=2).threads == 1
    assert fastrnn.GRU(256, 256).stream(threads=2).threads == 2


@for_other_instruction_sets(15)
def test_other_instruction_sets(isa: str) -> None:
    """Runs the tests of numbers again with the code for an older processor, frozen modules too."""
    freezing = str(ROOT / "tests/nn/test_freeze.py")
    run_again(isa, __file__, freezing, "-k", "sequence and 67 or accurate or results")
