"""C++ launches the CUDA kernels as Python did before, on a library that echoes its operands."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import _C, cells, kernels, ops
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import derive
from fastrnn.kernels import device, launched
from fastrnn.kernels.gpu import cuda
from tests.cudasim.build import build, missing
from tests.support import stub
from tests.support.operands import operands, run
from tests.support.simulated import agrees, only, running
from tests.support.tensors import flatten

if "FASTRNN_CUDA_LIBRARY" not in os.environ and missing():
    pytest.skip(str(missing()), allow_module_level=True)

SIMULATED = "FASTRNN_CUDA_LIBRARY" in os.environ
plainly = pytest.mark.skipif(SIMULATED, reason="this is a run with the simulator")
KINDS = {"RNN": fastrnn.RNN, "GRU": fastrnn.GRU, "LSTM": fastrnn.LSTM}


def twice(call: Callable[[], Any]) -> None:
    """By Python and by C++."""
    first, second = list(flatten(call())), list(flatten(call()))
    assert len(first) == len(second) > 1
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous() and other.is_contiguous()
        assert torch.equal(one, other) and one.any() and one.isfinite().all()
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


def with_layout(x: Tensor, layout: str) -> Any:
    """[4, 3, I] as it is, or packed: sequences of 4, 4 and 1 steps."""
    if layout == "dense":
        return x
    sizes = torch.tensor([3, 2, 2, 2])
    rows = torch.cat([x[t, :size] for t, size in enumerate(sizes.tolist())])
    return PackedSequence(rows, sizes)


everywhere = pytest.mark.parametrize("layout", ["dense", "packed"])
directions = pytest.mark.parametrize("directions", [1, 2])


@plainly
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@everywhere
@directions
@pytest.mark.parametrize("kind", KINDS)
def test_calls_after_the_first(
    library: Any,
    in_python: list[str],
    kind: str,
    directions: int,
    layout: str,
    dtype: torch.dtype,
    bias: bool,
    states: bool,
    mode: Any,
) -> None:
    layer = KINDS[kind](5, 7, bias=bias, dtype=dtype, bidirectional=directions == 2)
    x = with_layout(torch.randn(4, 3, 5, dtype=dtype), layout)
    given = torch.randn(directions, 3, 7, dtype=dtype)
    hx: Any = None if not states else (given, given + 1) if kind == "LSTM" else given
    with mode():
        twice(lambda: layer(x, hx))
    assert in_python == ["forward"] and library.fastrnn_stub_launches() == 2


@plainly
def test_a_plan_made_before_plans_were_forgotten_is_not_kept(
    library: Any, in_python: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another thread chose a kernel by name during the call."""
    hand_over = cuda.hand_over

    def late(*arguments: Any) -> None:
        _C.forget_plans()
        hand_over(*arguments)

    monkeypatch.setattr(cuda, "hand_over", late)
    layer, x = fastrnn.LSTM(5, 7), torch.randn(4, 3, 5)
    with torch.no_grad():
        layer(x)
        layer(x)
    assert in_python == ["forward", "forward"]


ROOTS = ["output", "states", "both"]


@plainly
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("wanted", ["all", "input", "weights"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@everywhere
@directions
@pytest.mark.parametrize("kind", KINDS)
def test_training(
    library: Any,
    in_python: list[str],
    kind: str,
    directions: int,
    layout: str,
    dtype: torch.dtype,
    bias: bool,
    wanted: str,
    root: str,
) -> None:
    layer = KINDS[kind](5, 7, bias=bias, dtype=dtype, bidirectional=directions == 2)
    layer.requires_grad_(wanted != "input")
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=wanted != "weights")
    h0 = torch.randn(directions, 3, 7, dtype=dtype, requires_grad=wanted == "all")
    hx: Any = (h0, h0 + 1) if kind == "LSTM" else h0
    leaves = [x] * (wanted != "weights") + list(layer.parameters()) * (wanted != "input")
    leaves += [h0] * (wanted == "all")
    random = torch.randn(4 * 3 * 14, dtype=dtype)

    def call() -> Any:
        out, hidden = layer(with_layout(x, layout), hx)
        y = out.data if isinstance(out, PackedSequence) else out
        last = list(flatten(hidden))
        roots = {"output": [y], "states": last, "both": [y, *last]}[root]
        grads = [random[: r.numel()].view(r.shape) for r in roots]
        return [y.detach(), *torch.autograd.grad(roots, leaves, grads)]

    twice(call)
    assert in_python == ["forward with tape", "backward"]
    assert library.fastrnn_stub_launches() == 4


@plainly
def test_operands_that_vectors_cannot_read(library: Any, in_python: list[str]) -> None:
    """In the middle of memory, and transposed."""
    cell, width = cells.gru, 4 * 3
    memory = torch.randn(1 + 6 * width * 3)

    def inside(*size: int) -> Tensor:
        return memory[1 : 1 + torch.Size(size).numel()].view(size)

    weights: Any = {"w_ih": [inside(width, 2)], "w_hh": [torch.randn(4, width).t()]}
    biases: Any = {"b_ih": [inside(width)], "b_hh": [inside(width)]}
    x = torch.randn(3, 5, 2).transpose(0, 1)
    with torch.no_grad():
        twice(lambda: ops.scan(cell, x, **weights, **biases, s0=[inside(1, 3, 4)], reverse=1))
    assert in_python == ["forward"]


@plainly
@pytest.mark.parametrize("reverse", [0b000, 0b100, 0b010, 0b110])
@pytest.mark.parametrize("resets", [False, True], ids=["whole", "resets"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_recurrences_side_by_side(
    library: Any, in_python: list[str], name: str, bias: bool, resets: bool, reverse: int
) -> None:
    """Runs of one direction, of one recurrence and of several."""
    cell = cells.get(name)
    given = operands(cell, 4, 3, 5, 7, 3, torch.float32, bias)
    given["reverse"] = reverse
    given["resets"] = torch.rand(4, 3) < 0.5 if resets else None
    twice(lambda: list(run(ops.scan, cell, given).values()))
    assert in_python == ["forward with tape", "backward"]


@plainly
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_a_cell(library: Any, in_python: list[str], kind: str) -> None:
    cell = cells.get({"RNN": "rnn_tanh"}.get(kind, kind.lower()))
    given = operands(cell, 1, 3, 5, 7, dtype=torch.float32)
    given["x"], given["s0"] = given["x"][0], [s[0] for s in given["s0"]]
    twice(lambda: list(run(ops.scan, cell, given).values()))
    assert in_python == ["forward with tape", "backward"]


@plainly
@pytest.mark.parametrize("sizes", [[1], [2, 1], [3, 3, 1]], ids=str)
def test_packed_sequences_without_steps(
    library: Any, in_python: list[str], sizes: list[int]
) -> None:
    """More states than sequences at the first step."""
    cell = cells.get("lstm")
    given = operands(cell, 1, 4, 5, 7, 2, torch.float32)
    given["batch_sizes"] = torch.tensor(sizes)
    given["x"] = torch.randn(sum(sizes), 5)
    twice(lambda: list(run(ops.scan, cell, given).values()))
    assert in_python == ["forward with tape", "backward"]


@plainly
def test_lengths_share_a_plan(library: Any, in_python: list[str]) -> None:
    """Except those of one or two steps, which have their own."""
    layer = fastrnn.LSTM(5, 7)

    def launched(x: Any) -> int:
        in_python.clear()
        with torch.no_grad():
            layer(x)
        return len(in_python)

    x = torch.randn(40, 3, 5)
    assert launched(x[:4]) == 1
    assert [launched(x[:steps]) for steps in (3, 9, 40, 1, 1, 2, 2)] == [0, 0, 0, 1, 0, 1, 0]
    assert launched(with_layout(x[:4], "packed")) == 0


@plainly
def test_tables_of_packed_batches(
    library: Any, in_python: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python makes them once; all calls of that batch share them, but for those in a capture."""
    asked: list[Any] = []
    tables = launched.tables

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return tables(*arguments)

    monkeypatch.setattr(launched, "tables", counted)
    layer = fastrnn.LSTM(5, 7, num_layers=3, bidirectional=True)
    # The first call is Python's.
    with torch.no_grad():
        layer(with_layout(torch.randn(4, 3, 5), "packed"))
        in_python.clear()
        asked.clear()

        def call(sizes: Tensor) -> list[Tensor]:
            x = torch.ones(int(sizes.sum()), 5)
            return list(flatten(layer(PackedSequence(x, sizes))))

        sizes = torch.tensor([3, 3, 1])
        first = call(sizes)
        call(sizes.clone())
        assert len(asked) == 1
        sizes.numpy()[1] = 2  # torch notices no such change
        assert not torch.equal(call(sizes)[0][2], first[0][2])
        assert len(asked) == 2
        library.fastrnn_stub_capturing(1)
        call(sizes)
        assert len(asked) == 5
        library.fastrnn_stub_capturing(0)
        call(sizes)
        assert len(asked) == 5
        for n in range(4, 50):  # ever new batches: old ones are forgotten
            call(torch.full((n,), 3))
        assert len(asked) == 51
        call(torch.full((49,), 3))
        call(sizes)
        assert len(asked) == 52
    assert not in_python


@plainly
def test_what_python_keeps(library: Any, in_python: list[str]) -> None:
    """Tapes, and calls of which C++ knows no plan or cannot launch."""
    library.fastrnn_stub_answer(0, 90, 0)  # no echo of such calls
    layer, x = fastrnn.LSTM(5, 7), torch.randn(4, 3, 5)

    def calls(function: Callable[[], Any]) -> list[str]:
        in_python.clear()
        function()
        return in_python.copy()

    with torch.no_grad():
        assert calls(lambda: layer(x)) == ["forward"] and not calls(lambda: layer(x))
        for each in (layer, fastrnn.LSTM(5, 7, bidirectional=True)):
            call = functools.partial(each, x, lengths=torch.tensor([4, 1, 2]))
            assert calls(call) == ["forward"] and calls(call) == ["forward"]
        assert not calls(lambda: layer(x))
        _C.forget_plans()
        assert calls(lambda: layer(x)) == ["forward"] and not calls(lambda: layer(x))

    def trained(**options: Any) -> None:
        layer(x, **options)[0].sum().backward()

    # The forward pass has the plan of those without a tape.
    assert calls(trained) == ["backward"] and not calls(trained)
    lengths = torch.tensor([4, 1, 2])
    assert calls(lambda: trained(lengths=lengths)) == ["forward with tape", "backward"]
    layer.recompute = True  # an output without a tape, which the backward pass computes again
    assert calls(trained) == ["backward"]
    layer.recompute = False
    assert not calls(trained)


@plainly
def test_a_switch_of_torch_means_another_plan(library: Any, in_python: list[str]) -> None:
    layer, x = fastrnn.GRU(5, 7), torch.randn(4, 3, 5)
    switch: Any = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    try:
        with torch.no_grad():
            for precision in ("tf32", "ieee", "tf32", "ieee"):
                switch.fp32_precision = precision
                layer(x)
                layer(x)
    finally:
        switch.fp32_precision = before
    assert in_python == ["forward", "forward"]


@plainly
def test_errors_of_a_launch(in_python: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_refused", set())
    layer = fastrnn.LSTM(8, 1024, dtype=torch.bfloat16)
    x = torch.zeros(8, 64, 8, dtype=torch.bfloat16)
    with stub.answering() as library, kernels.use("cuda"), torch.no_grad():
        layer(x)
        layer(x)
        assert in_python == ["forward"] and library.fastrnn_stub_launches() == 2
        library.fastrnn_stub_answer(0, 90, 209)
        with pytest.raises(RuntimeError, match=r"fastrnn failed: no kernel image .*\(error 209\)"):
            layer(x)
        assert in_python == ["forward"]
        library.fastrnn_stub_answer(0, 90, 720)  # this device runs no grid: it is planned again
        layer(x)
        assert library.fastrnn_stub_launches() == 3 and in_python[:2] == ["forward"] * 2
        layer(x)
        layer(x)
        assert library.fastrnn_stub_launches() == 5
    monkeypatch.undo()
    _C.forget_plans()


@pytest.mark.simulator
@pytest.mark.takes(60)
@plainly
def test_in_the_simulator() -> None:
    """Runs the test below on the real kernels."""
    made = [cells.get(name) for name in ("lstm", "gru")]
    names = [emit_cpp.key(cell) for cell in made]
    header = emit_cpp.header([derive(cell) for cell in made], names)
    path = build(cells=header, flags=only(["float32", "tf32x3"]))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "FASTRNN_CUDA_LIBRARY": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.skipif(not SIMULATED, reason="runs in a process of its own")
@everywhere
@directions
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_kernels_compute_the_same(
    kind: str, directions: int, layout: str, in_python: list[str]
) -> None:
    layer = KINDS[kind](5, 19, num_layers=2, bidirectional=directions == 2)
    x = torch.randn(4, 3, 5, requires_grad=True)

    def gradients() -> Any:
        out = layer(with_layout(x, layout))[0]
        y = out.data if isinstance(out, PackedSequence) else out
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    with running("step", 1, "float32"):
        twice(gradients)
        # Of both layers share a plan, forward and backward; the first call of each is Python's.
        assert in_python == ["forward with tape", "backward"]
        ours = gradients()
        in_python.clear()
        with torch.no_grad():
            layer(with_layout(x, layout))
        assert not in_python
    for one, other in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not SIMULATED, reason="runs in a process of its own")
@pytest.mark.parametrize("residency", ["step", "block", "cluster", "grid"])
@pytest.mark.parametrize("layout", ["dense", "packed", "resets"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_every_residency(name: str, layout: str, residency: str, in_python: list[str]) -> None:
    """Three recurrences in two directions."""
    cell = cells.get(name)
    given = operands(cell, 4, 5, 3, 19, 3, torch.float32)
    given["reverse"] = 0b100
    if layout == "packed":
        given["batch_sizes"] = torch.tensor([5, 4, 2, 1])
        given["x"] = torch.randn(12, 3)
    elif layout == "resets":
        given["resets"] = torch.rand(4, 5) < 0.3
    with running(residency, 1 if residency in ("step", "block") else 2, "tf32x3"):
        twice(lambda: list(run(ops.scan, cell, given).values()))
        assert in_python == ["forward with tape", "backward"]
        ours = run(ops.scan, cell, given)
    agrees(cell, given, "tf32x3", ours)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that nothing may be read that was not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not SIMULATED, reason="runs in a process of its own")
@pytest.mark.parametrize("chunk", [99, 2], ids=["whole", "chunks"])
@pytest.mark.parametrize("residency", ["step", "block", "cluster", "grid"])
@pytest.mark.parametrize("layout", ["dense", "packed", "lengths"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_states(name: str, layout: str, residency: str, chunk: int, poisoned: None) -> None:
    """None are as zeros, given and as gradients, also in a tile of the batch without steps and in
    chunks in which a tile has none."""
    cell = cells.get(name)
    given = operands(cell, 5, 9, 3, 19, 2, torch.float32)
    if layout == "packed":
        given["batch_sizes"] = torch.tensor([9, 8, 8, 8, 2])
        given["x"] = torch.randn(35, 3)
    elif layout == "lengths":
        given["lengths"] = torch.tensor([5, 0, 4, 3, 5, 1, 2, 5, 0])
        given["x"] = given["x"].clone()
    zeros = {**given, "s0": [torch.zeros_like(s) for s in given["s0"]]}
    nothing = zeros if layout == "packed" else {**given, "s0": []}
    blocks = 1 if residency in ("step", "block") else 2
    with running(residency, blocks, "tf32x3", chunk_rows=chunk * 9):
        for _ in range(2):  # by Python, and by C++ what it launches
            ours = run(ops.scan, cell, given)
            of_zeros, of_nothing = run(ops.scan, cell, zeros), run(ops.scan, cell, nothing)
        agrees(cell, given, "tf32x3", ours)
        for key, value in of_nothing.items():
            assert torch.equal(value, of_zeros[key]), key
        # Without gradients of final states, and of initial ones.
        grads = []
        for s0 in (zeros["s0"], given["s0"]):
            x = given["x"].clone().requires_grad_()
            y, last = ops.scan(cell, **{**given, "x": x, "s0": s0})
            grads.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0])
            total = torch.stack([y.sum(), *(0 * state.sum() for state in last)]).sum()
            assert torch.equal(torch.autograd.grad(total, x)[0], grads[-1])
        assert not torch.equal(*grads)
