"""Every kernel for GPUs on a GPU: values and gradients against float64, and things that only a GPU
shows: streams, captured graphs, clusters and grids that really run at the same time.

No test here runs without a GPU. `python -m benchmarks.gpu` runs this file in parts, by the marks of
the tests and by residency, so that a kernel that hangs takes only its part along.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

# Set before the first product: torch demands it if results must be the same in every run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import cells, kernels, ops, plan
from fastrnn.cells.noise import seeded
from fastrnn.compiler.derive import derive
from fastrnn.kernels.gpu import cuda
from fastrnn.tools.tolerance import largest_error, limit
from tests.support.kernels import check, planned
from tests.support.names import BUILT_IN
from tests.support.operands import Shape, by_reference, linear, operands, run, whole
from tests.support.shared import noisy, noisy_staged, staged
from tests.support.tensors import flatten

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not GPU, reason="there is no GPU")
CAPABILITY = torch.cuda.get_device_capability() if GPU else (0, 0)

KERNELS = ["cuda", "triton"]
PRECISIONS = ["float64", "float32", "tf32", "bfloat16", "float16"]
# T, B, I, H, P, and the number of blocks that share H.
SHAPES: dict[str, list[tuple[Shape, int]]] = {
    "step": [((1, 1, 1, 1, 1), 1), ((3, 9, 4, 17, 2), 1), ((2, 33, 8, 300, 1), 1)],
    "block": [((1, 1, 1, 1, 1), 1), ((5, 9, 4, 17, 2), 1), ((9, 3, 8, 64, 1), 1)],
    "cluster": [((5, 9, 4, 17, 2), 2), ((9, 3, 8, 64, 1), 4), ((40, 17, 8, 250, 2), 8)],
    "grid": [((5, 9, 4, 17, 2), 3), ((9, 3, 8, 64, 1), 2), ((40, 17, 8, 250, 2), 16)],
}


TILES = {residency: (16, 32, 64) if residency == "step" else (8, 16, 32) for residency in SHAPES}


@pytest.fixture(autouse=True)
def float32_in_full() -> Iterator[None]:
    """Turns TF32 off, which torch allows to recurrent layers by default."""
    with tf32(False):
        yield


@pytest.fixture(autouse=True)
def device_is_alive() -> Iterator[None]:
    """After a failed launch nothing runs in this process any more: ends it with one message."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the device is lost: {error}", returncode=3)


def moved(value: Any) -> Any:
    """`value` on the GPU; sizes of packed batches stay on the CPU."""
    if isinstance(value, dict):
        return {k: v if k == "batch_sizes" else moved(v) for k, v in value.items()}
    if isinstance(value, list):
        return [moved(v) for v in value]
    return value.cuda() if isinstance(value, Tensor) else value


@contextmanager
def tf32(allow: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow
    try:
        # Without `enabled` these flags would turn cuDNN off.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def dtype_of(precision: str) -> torch.dtype:
    dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    assert isinstance(dtype, torch.dtype)
    return dtype


def baseline_of(precision: str) -> torch.dtype:
    """The dtype in which the reference has as many digits. TF32 has as many as float16, but cuBLAS
    decides by itself whether it uses TF32."""
    return torch.float16 if precision == "tf32" else dtype_of(precision)


def forced(residency: str, precision: str, blocks: int, batch_tile: int) -> dict[str, Any]:
    """Fields of a plan, regardless of the device's own plan for so small a problem."""
    if residency == "cluster" and CAPABILITY < (9, 0):
        pytest.skip("there are no clusters before compute capability 9.0")
    if precision == "float64" and residency != "step":
        pytest.skip("float64 stays in the cache")
    if precision == "float32" and residency != "step":
        precision = "tf32x3"
        batch_tile = min(batch_tile, 16)  # tf32x3 has no wider tiles
    return {
        "residency": residency,
        "precision": precision,
        "batch_tile": batch_tile,
        "blocks": blocks,
        "warps": 8,
        "groups": torch.cuda.get_device_properties().multi_processor_count // blocks,
    }


def fits(name: str, shape: Shape, fields: dict[str, Any]) -> bool:
    """Whether a block has enough shared memory for such a plan, forward and backward."""
    library = cuda.library()
    assert isinstance(library, cuda.Library), library
    steps, batch, _, hidden, recurrences = shape
    sweep = cuda.Sweep(steps=steps, batch=batch, hidden=hidden, recurrences=recurrences, end=steps)
    wanted = plan.CudaConfig(**fields)
    properties: Any = torch.cuda.get_device_properties()
    most = properties.shared_memory_per_block_optin
    if wanted.residency == "step":
        return True
    cell = cells.get(name)
    for backward in (False, True):
        sizes = len(cell.gates), len(cell.states)
        problem = plan.Problem(name, steps, batch, 1, hidden, *sizes, backward=backward)
        units = plan.cuda.row_group(problem, wanted, library.tables)
        given = cuda.cuda_plan(replace(wanted, row_group=units))
        if not 0 <= library.shared_bytes(name, sweep, given, backward) <= most:
            return False
    return True


def decided_by_rounding(name: str, precision: str, hidden: int) -> bool:
    """Whether a unit may be so near to 0 that rounding turns it and its gradient on or off."""
    return name == "rnn_relu" and precision not in ("float64", "float32") and hidden > 60


def few(residency: str, precision: str) -> dict[str, Any]:
    """The smallest batch tile, and the fewest blocks."""
    return forced(
        residency, precision, 1 if residency in ("step", "block") else 2, TILES[residency][0]
    )


# The kernels, by residency


@pytest.mark.cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("residency", SHAPES)
def test_cuda_shapes(residency: str, name: str, precision: str) -> None:
    for shape, blocks in SHAPES[residency]:
        if decided_by_rounding(name, precision, shape[3]):
            continue
        given = moved(operands(cells.get(name), *shape, dtype=dtype_of(precision)))
        plans = [forced(residency, precision, blocks, tile) for tile in TILES[residency]]
        plans = [fields for fields in plans if fits(name, shape, fields)]
        assert plans, shape
        for fields in plans:
            with tf32(precision == "tf32"), planned(**fields):
                check(cells.get(name), given, "cuda", baseline_of(precision))


@pytest.mark.triton
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [*BUILT_IN, "linear"])
def test_triton_shapes(name: str, precision: str) -> None:
    for shape in ((1, 1, 1, 1, 1), (5, 9, 4, 17, 2), (9, 3, 8, 64, 1), (3, 17, 8, 130, 1)):
        if decided_by_rounding(name, precision, shape[3]):
            continue
        given = moved(operands(cells.get(name), *shape, dtype=dtype_of(precision)))
        with tf32(precision == "tf32"):
            check(cells.get(name), given, "triton", baseline_of(precision))


@pytest.mark.triton
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", [noisy.name, staged.name, noisy_staged.name])
def test_triton_stages_noise_and_resets_to_given_states(name: str, precision: str) -> None:
    cell, (steps, batch) = cells.get(name).noisy, (5, 9)
    for hidden in (17, 130):
        given = moved(operands(cell, steps, batch, 4, hidden, 2, dtype_of(precision)))
        given["noise"] = seeded(cell.draws, given["x"]) if cell.draws else None
        given["resets"] = torch.rand(steps, batch, device="cuda") < 0.3
        given["reset_states"] = [torch.randn_like(s) for s in given["s0"]]
        check(cell, given, "triton", baseline_of(precision))


def ragged(layout: str, cell: cells.Cell, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    steps, batch = 7, 11
    given = operands(cell, steps, batch, 4, hidden, 2, dtype)
    lengths = torch.randint(0, steps + 1, (batch,))
    lengths[3] = steps
    shape: tuple[int, ...] = (steps, batch)
    if layout == "lengths":
        given["lengths"] = lengths
    elif layout == "packed":
        lengths = lengths.clamp_min(1).sort(descending=True).values
        given["batch_sizes"] = (lengths > torch.arange(steps)[:, None]).sum(1)
        given["x"] = torch.randn(int(lengths.sum()), 4, dtype=torch.float64).to(dtype)
        shape = given["x"].shape[:1]
    given["resets"] = torch.rand(shape) < 0.3
    result = moved(given)
    assert isinstance(result, dict)
    return result


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.parametrize("residency", SHAPES)
def test_cuda_ragged(residency: str, name: str, layout: str, precision: str) -> None:
    cell = cells.get(name)
    for hidden, chunk in ((17, 11), (64, 22), (64, 999)):
        given = ragged(layout, cell, hidden, dtype_of(precision))
        with planned(**few(residency, precision), chunk_rows=chunk):
            check(cell, given, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.parametrize("residency", SHAPES)
def test_cuda_recomputed_tapes(residency: str, name: str, layout: str, precision: str) -> None:
    cell = cells.get(name)
    for hidden, chunk in ((17, 11), (64, 22), (64, 999)):
        given = ragged(layout, cell, hidden, dtype_of(precision))
        with planned(**few(residency, precision), chunk_rows=chunk):
            check(cell, given, "cuda", recompute=True)


@pytest.mark.cuda
def test_cuda_grid_of_groups_that_follow_each_other() -> None:
    for precision in ("tf32", "bfloat16"):
        given = moved(operands(cells.get("lstm"), 5, 50, 4, 64, 2, dtype_of(precision)))
        with planned(**few("grid", precision) | {"groups": 3}), tf32(precision == "tf32"):
            check(cells.get("lstm"), given, "cuda", baseline_of(precision))


@pytest.mark.triton
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", ["gru", "lstm", "linear"])
def test_triton_ragged(name: str, layout: str, precision: str) -> None:
    cell = cells.get(name)
    for chunk in (11, 22, 999):
        given = ragged(layout, cell, 17, dtype_of(precision))
        with planned(chunk_rows=chunk):
            check(cell, given, "triton")


@pytest.mark.triton
def test_triton_is_exact_for_a_linear_cell() -> None:
    given = {k: whole(v) for k, v in operands(linear, 5, 18, 6, 37, 2, torch.float32).items()}
    given = moved({**given, "resets": torch.rand(5, 18) < 0.1})
    with kernels.use("triton"):
        ours = run(ops.scan, linear, given)
    for what, right in run(by_reference, linear, given).items():
        assert torch.equal(ours[what], right), what


# Small enough for compute-sanitizer, which slows everything down many times


@pytest.mark.small
@pytest.mark.parametrize("way", [*SHAPES, "triton"])
def test_small(way: str) -> None:
    for name in ("lstm", "gru"):
        given = moved(operands(cells.get(name), 3, 3, 2, 17, dtype=torch.bfloat16))
        fields = {} if way == "triton" else few(way, "bfloat16")
        with planned(**fields):
            check(cells.get(name), given, "triton" if way == "triton" else "cuda")


# The public interface, with any plan


def layers(dtype: torch.dtype = torch.float32) -> list[fastrnn.LSTM | fastrnn.GRU]:
    made: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    return [
        fastrnn.LSTM(32, 96, num_layers=2, bidirectional=True, **made),
        fastrnn.GRU(32, 200, **made),
    ]


def both_ways(layer: Any, x: Tensor) -> list[Tensor]:
    """Results and gradients."""
    found = flatten(layer(x))
    return found + list(torch.autograd.grad(found[0].float().sin().sum(), list(layer.parameters())))


def close(ours: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(ours, right, strict=True):
        assert largest_error(a, b) < 1e-4


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The only kernel that may run within the test."""
    with kernels.use(request.param):
        yield request.param


@pytest.mark.first
def test_library() -> None:
    """The library loads beside torch's own copy of the CUDA runtime."""
    library = cuda.library()
    assert isinstance(library, cuda.Library), library
    assert not library.simulated
    assert set(BUILT_IN) <= set(library.cells)


@pytest.mark.first
def test_is_near_torch(kernel: str) -> None:
    theirs = nn.LSTM(32, 96, 2, bidirectional=True, device="cuda")
    x = torch.randn(20, 5, 32, device="cuda")
    exact = both_ways(theirs.double(), x.double())
    close(both_ways(fastrnn.from_torch(theirs.float()), x), exact)


@pytest.mark.first
def test_current_stream(kernel: str) -> None:
    """A kernel runs on the current stream, and waits only for the work that makes its input."""
    noise = torch.randn(4096, 4096, device="cuda")
    for layer in layers():
        x = torch.randn(20, 5, 32, device="cuda")
        right = both_ways(layer, x)
        late = torch.zeros_like(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                noise @ noise
            late.copy_(x)
            ours = both_ways(layer, late)
        torch.cuda.current_stream().wait_stream(stream)
        close(ours, right)


def captured(layer: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_ways(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = both_ways(layer, x)
    return graph, ours


@pytest.mark.first
def test_graph(kernel: str) -> None:
    """A graph is captured once, forward and backward, and replayed on other input."""
    for layer in layers():
        x = torch.randn(20, 5, 32, device="cuda")
        graph, ours = captured(layer, x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            close(ours, both_ways(layer, x))


@pytest.mark.first
def test_graph_of_packed_input(kernel: str) -> None:
    """The tables of the batch come from the call before the capture, and live as long as it."""
    sizes = torch.tensor([4, 4, 3, 1, 1])
    for layer in layers():
        x = torch.randn(13, 32, device="cuda")

        def call(layer: nn.Module = layer, x: Tensor = x) -> list[Tensor]:
            y, _ = layer(nn.utils.rnn.PackedSequence(x, sizes))
            return [y.data, *torch.autograd.grad(y.data.sin().sum(), list(layer.parameters()))]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours = call()
        for n in range(1, 40):  # other batches, which push the tables out
            sequences = torch.randn(n, 32, device="cuda")
            layer(nn.utils.rnn.PackedSequence(sequences, torch.ones(n, dtype=torch.int64)))
        x.copy_(torch.randn_like(x))
        graph.replay()
        close(ours, call())


@pytest.mark.whole
def test_compiled(kernel: str) -> None:
    for layer in layers():
        x = torch.randn(20, 5, 32, device="cuda")
        right = both_ways(layer, x)
        torch._dynamo.reset()
        close(both_ways(torch.compile(layer, fullgraph=True), x), right)


@pytest.mark.whole
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_bitwise(kernel: str, precision: str) -> None:
    """Results are equal in every run, also while another stream keeps multiprocessors busy."""
    noise = torch.randn(2048, 2048, device="cuda")
    other = torch.cuda.Stream()
    with tf32(precision == "tf32"):
        for layer in layers(dtype_of(precision)):
            x = torch.randn(64, 40, 32, device="cuda", dtype=dtype_of(precision))
            right = both_ways(layer, x)
            assert not any(t.isnan().any() for t in right)
            for _ in range(5):
                with torch.cuda.stream(other):
                    for _ in range(30):
                        noise @ noise
                for a, b in zip(both_ways(layer, x), right, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.whole
def test_two_streams(kernel: str) -> None:
    """The same layer runs on two streams at a time."""
    for layer in layers():
        inputs = [torch.randn(64, 40, 32, device="cuda") for _ in range(2)]
        right = [both_ways(layer, x) for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        for _ in range(3):
            ours: list[list[Tensor]] = []
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    ours.append(both_ways(layer, x))
            torch.cuda.synchronize()
            for mine, wanted in zip(ours, right, strict=True):
                close(mine, wanted)


@pytest.mark.whole
def test_recompute(kernel: str) -> None:
    """Less than half the memory is kept for the backward pass, and the gradients are as good."""
    for layer in layers():
        x = torch.randn(100, 20, 32, device="cuda")
        saved = []
        for recompute in (False, True):
            layer.recompute = recompute
            before = torch.cuda.memory_allocated()
            waiting = layer(x)
            saved.append(torch.cuda.memory_allocated() - before)
            del waiting
        again = both_ways(layer, x)
        layer.recompute = False
        close(again, both_ways(layer, x))
        assert saved[1] < saved[0] / 2


SIZES = [(1, 256), (16, 256), (64, 512), (64, 1024), (128, 2048)]  # B, H


@pytest.mark.whole
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "tf32", "float16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(kernel: str, size: tuple[int, int], precision: str) -> None:
    """The sizes of the benchmark, with their own plans, by the tolerance rule."""
    batch, hidden = size
    dtype = dtype_of(precision)
    for make in (fastrnn.LSTM, fastrnn.GRU):
        ours = make(64, hidden, device="cuda", dtype=dtype)
        theirs = fastrnn.to_torch(ours)
        x = torch.randn(24, batch, 64, device="cuda", dtype=dtype)
        with tf32(precision == "tf32"):
            mine, torchs = both_ways(ours, x), both_ways(theirs, x)
        exact = both_ways(theirs.double(), x.double())
        for a, b, right in zip(mine, torchs, exact, strict=True):
            most = limit(largest_error(b, right), precision, gradients=True)
            assert largest_error(a, right) <= most


@pytest.mark.whole
def test_cells_of_ones_own_go_to_triton() -> None:
    assert derive(linear)
    layer = fastrnn.Recurrent(linear, 3, 5, device="cuda")
    x = torch.randn(4, 2, 3, device="cuda")
    ours: Callable[[], list[Tensor]] = lambda: both_ways(layer, x)  # noqa: E731
    found = ours()
    with kernels.use("reference"):
        close(found, ours())
