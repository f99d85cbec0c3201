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

import fastrnn
from fastrnn import _C, cells, kernels, ops
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import derive
from fastrnn.kernels import device, launched
from fastrnn.kernels.gpu import cuda
from tests.cudasim.build import build, missing
from tests.support import stub
from tests.support.simulated import only, running
from tests.support.tensors import flatten

if "FASTRNN_CUDA_LIBRARY" not in os.environ and missing():
    pytest.skip(str(missing()), allow_module_level=True)

SIMULATED = "FASTRNN_CUDA_LIBRARY" in os.environ
plainly = pytest.mark.skipif(SIMULATED, reason="this is a run with the simulator")
KINDS = {"RNN": fastrnn.RNN, "GRU": fastrnn.GRU, "LSTM": fastrnn.LSTM}


@pytest.fixture
def library() -> Iterator[Any]:
    with stub.answering() as loaded, kernels.use("cuda"):
        loaded.fastrnn_stub_echo()
        yield loaded


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that Python launched."""
    passes: list[str] = []
    forward, backward = launched.forward, launched.backward

    def forward_here(inputs: tuple[Any, ...], tape: bool) -> Any:
        passes.append("forward with tape" if tape else "forward")
        return forward(inputs, tape)

    def backward_here(*arguments: Any) -> Any:
        passes.append("backward")
        return backward(*arguments)

    monkeypatch.setattr(launched, "forward", forward_here)
    monkeypatch.setattr(launched, "backward", backward_here)
    return passes


def twice(call: Callable[[], Any]) -> None:
    """By Python and by C++."""
    first, second = list(flatten(call())), list(flatten(call()))
    assert len(first) == len(second) > 1
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous() and other.is_contiguous()
        assert torch.equal(one, other) and one.any() and one.isfinite().all()
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


@plainly
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_calls_after_the_first(
    library: Any,
    in_python: list[str],
    kind: str,
    dtype: torch.dtype,
    bias: bool,
    states: bool,
    mode: Any,
) -> None:
    layer = KINDS[kind](5, 7, bias=bias, dtype=dtype)
    x = torch.randn(4, 3, 5, dtype=dtype)
    given = torch.randn(1, 3, 7, dtype=dtype)
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
@pytest.mark.parametrize("kind", KINDS)
def test_training(
    library: Any,
    in_python: list[str],
    kind: str,
    dtype: torch.dtype,
    bias: bool,
    wanted: str,
    root: str,
) -> None:
    layer = KINDS[kind](5, 7, bias=bias, dtype=dtype).requires_grad_(wanted != "input")
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=wanted != "weights")
    h0 = torch.randn(1, 3, 7, dtype=dtype, requires_grad=wanted == "all")
    hx: Any = (h0, h0 + 1) if kind == "LSTM" else h0
    leaves = [x] * (wanted != "weights") + list(layer.parameters()) * (wanted != "input")
    leaves += [h0] * (wanted == "all")
    random = torch.randn(4, 3, 7, dtype=dtype)

    def call() -> Any:
        y, *last = flatten(layer(x, hx))
        roots = {"output": [y], "states": last, "both": [y, *last]}[root]
        grads = [random[: len(r)] for r in roots]
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
        assert calls(lambda: layer(x[:3])) == ["forward"] and not calls(lambda: layer(x[:3]))
        two = fastrnn.LSTM(5, 7, bidirectional=True)
        for each in (layer, two):
            for options in ({"lengths": torch.tensor([4, 1, 2])}, {"resets": x[..., 0] > 0}):
                call = functools.partial(each, x, **options)
                assert calls(call) == ["forward"] and calls(call) == ["forward"]
        assert not calls(lambda: layer(x))
        _C.forget_plans()
        assert calls(lambda: layer(x)) == ["forward"] and not calls(lambda: layer(x))

    def trained(**options: Any) -> None:
        layer(x, **options)[0].sum().backward()

    both = ["forward with tape", "backward"]
    assert calls(trained) == both and not calls(trained)
    lengths = torch.tensor([4, 1, 2])
    assert calls(lambda: trained(lengths=lengths)) == both
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
    path = build(cells=header, flags=only(["float32"]))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "FASTRNN_CUDA_LIBRARY": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.skipif(not SIMULATED, reason="runs in a process of its own")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_kernels_compute_the_same(kind: str, in_python: list[str]) -> None:
    layer = KINDS[kind](5, 19, num_layers=2)
    x = torch.randn(6, 9, 5, requires_grad=True)

    def gradients() -> Any:
        y = layer(x)[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    with running("step", 1, "float32"):
        twice(gradients)
        # Of both layers, for the first call.
        assert in_python == ["forward with tape"] * 2 + ["backward"] * 2
        ours = gradients()
        in_python.clear()
        with torch.no_grad():
            twice(lambda: layer(x))
        assert in_python == ["forward"] * 2
    for one, other in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
