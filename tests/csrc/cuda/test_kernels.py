"""The CUDA kernels against the reference, in the simulator: values, gradients, tapes.

A process loads one library of kernels, at their first use. So these tests run in processes of their
own, which the first test starts.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import _C, cells, kernels, ops, plan
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import derive
from fastrnn.kernels.gpu import cuda
from fastrnn.kernels.prepare import prepare
from fastrnn.tools.tolerance import largest_error
from tests.cudasim.build import build, missing
from tests.support.names import BUILT_IN
from tests.support.operands import (
    EVERY_GRADIENT,
    Shape,
    by_reference,
    doubled,
    linear,
    operands,
    positional,
    run,
    whole,
)
from tests.support.simulated import (
    PARTS,
    PRECISIONS,
    RESIDENT,
    WAYS,
    agrees,
    decided,
    precisions,
    ragged,
    running,
    ways,
)
from tests.support.tensors import flatten

pytestmark = pytest.mark.simulator

if "FASTRNN_CUDA_LIBRARY" not in os.environ and missing():
    pytest.skip(str(missing()), allow_module_level=True)

SIMULATED = "FASTRNN_CUDA_LIBRARY" in os.environ
simulated = pytest.mark.skipif(not SIMULATED, reason="runs in a process of its own")


def library() -> Path:
    """The simulated kernels of the built-in cells and the linear cell."""
    made = [cells.get(name) for name in BUILT_IN] + [linear]
    names = [emit_cpp.key(cell) for cell in made]
    return build(cells=emit_cpp.header([derive(cell) for cell in made], names))


@pytest.mark.skipif(SIMULATED, reason="this is such a run")
@pytest.mark.parametrize(
    "part",
    # The first also compiles the library.
    [pytest.param(p, marks=pytest.mark.takes(110 if p == PARTS[0] else 15)) for p in PARTS]
    + [pytest.param("rest", marks=pytest.mark.takes(5))],
)
def test_in_the_simulator(part: str) -> None:
    """Runs the tests below."""
    chosen = " and ".join(f"not {p}" for p in PARTS) if part == "rest" else part
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    result = subprocess.run(
        [*command, __file__],
        env={**os.environ, "FASTRNN_CUDA_LIBRARY": str(library()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


SHAPES = [  # T, B, I, H, P
    (1, 1, 1, 1, 1),
    (2, 3, 1, 5, 2),
    (5, 1, 3, 17, 1),
    (2, 9, 2, 8, 1),
    (3, 7, 2, 15, 1),
    (1, 8, 3, 16, 2),
    (4, 3, 2, 33, 2),
]


@simulated
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*BUILT_IN, "linear"])
def test_shapes(name: str, shape: Shape, part: str) -> None:
    cell = cells.get(name)
    for residency, blocks in ways(part, shape[3]):
        for precision in precisions(part):
            given = operands(cell, *shape, dtype=PRECISIONS[precision])
            with running(residency, blocks, precision):
                ours = run(ops.scan, cell, given)
            agrees(cell, given, precision, ours)


LARGE = [  # T, B, I, H, P, rows of a batch tile
    (3, 17, 2, 64, 1, 16),
    (3, 2, 2, 100, 1, 8),
    (2, 31, 2, 40, 1, 32),
    (2, 15, 2, 65, 1, 16),
    (2, 1, 1, 130, 2, 8),
    (2, 17, 1, 200, 1, 32),  # a slice of weights has more k-blocks than are in flight at a time
]


@simulated
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("name", [*BUILT_IN, "linear"])
def test_tiles(name: str, shape: tuple[int, int, int, int, int, int], part: str) -> None:
    cell = cells.get(name)
    residency, blocks = ways(part, shape[3])[-1]
    if shape[3] > {"block": 100, "cluster": 190}.get(part, 999):
        pytest.skip("more than a block can hold")
    for precision in precisions(part):
        given = operands(cell, *shape[:5], dtype=PRECISIONS[precision])
        if name == "rnn_relu":
            decided(given)
        tile = min(shape[5], 16) if precision == "tf32x3" else shape[5]  # tf32x3 has no wider tiles
        with running(residency, blocks, precision, batch_tile=tile):
            ours = run(ops.scan, cell, given)
        agrees(cell, given, precision, ours)
        if name == "rnn_relu":
            on = [(bias > 0).expand(shape[:2] + bias.shape) for bias in given["b_ih"]]
            assert (ours["y"] > 0.5).equal(torch.cat(on, -1)), "a unit came near its kink"


@simulated
@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm", "linear"])
def test_tiles_of_a_step(name: str, tile: int) -> None:
    """The tiles of csrc/cuda/step/, with a partial tile at each edge; rows that can be copied in
    vectors and rows that cannot."""
    cell = cells.get(name)
    for precision in PRECISIONS:
        for hidden in (44, 72):
            given = operands(cell, 3, 70, 2, hidden, dtype=PRECISIONS[precision])
            with running("step", 1, precision, batch_tile=tile):
                ours = run(ops.scan, cell, given)
            agrees(cell, given, precision, ours)


@simulated
@pytest.mark.parametrize("part", PARTS)
def test_many_steps(part: str) -> None:
    """Buffers and epochs wrap around, in chunks of many steps and of few."""
    cell = cells.get("gru")
    precision = "float64" if part == "step" else "tf32x3"
    for (residency, blocks), chunk in itertools.product(WAYS[part][:2], (9999, 2 * 7)):
        given = operands(cell, 50, 2, 2, 25, 2, PRECISIONS[precision])
        with running(residency, blocks, precision, chunk_rows=chunk):
            ours = run(ops.scan, cell, given)
        agrees(cell, given, precision, ours)


RAGGED = [(1, 2, 3, 1), (5, 9, 17, 2)]  # T, B, H, P


@simulated
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", ["gru", "lstm", "linear"])
def test_ragged_batches_resets_and_chunks(name: str, layout: str, part: str) -> None:
    cell = cells.get(name)
    precision = "float64" if part == "step" else "tf32x3"
    for steps, batch, hidden, recurrences in RAGGED:
        given = operands(cell, steps, batch, 4, hidden, recurrences, PRECISIONS[precision])
        exact = ragged(given, layout)
        residency, blocks = ways(part, hidden)[0]
        some = torch.rand(given["x"].shape[:-1]) < 0.3
        for resets, chunk in ((None, 2 * batch), (some, 1), (None, 99)):
            given["resets"] = exact["resets"] = resets
            with running(residency, blocks, precision, chunk_rows=chunk):
                ours = run(ops.scan, cell, given)
            agrees(cell, given, precision, ours, exact)


@simulated
@pytest.mark.parametrize("part", ["step", "grid"])
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", [*BUILT_IN, "linear"])
def test_recomputed_tapes(
    name: str, layout: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the output was saved: the tape of a chunk is recomputed from it, without a sweep."""
    launched: list[str] = []
    launch = cuda.Library.launch

    def counted(self: cuda.Library, kind: str, *rest: Any) -> None:
        launched.append(kind)
        launch(self, kind, *rest)

    monkeypatch.setattr(cuda.Library, "launch", counted)
    cell = cells.get(name)
    for steps, batch, hidden, recurrences in RAGGED:
        for precision in precisions(part):
            if steps == 1 and "float16" in precision:
                continue  # so few numbers are no sample of the error
            given = operands(cell, steps, batch, 4, hidden, recurrences, PRECISIONS[precision])
            if name == "rnn_relu":
                decided(given)
            exact = ragged(given, layout)
            residency, blocks = ways(part, hidden)[-1]
            some = torch.rand(given["x"].shape[:-1]) < 0.3
            for resets, chunk in ((None, 2 * batch), (some, 1), (some, 99)):
                given["resets"] = exact["resets"] = resets
                with running(residency, blocks, precision, chunk_rows=chunk):
                    ours = run(partial(ops.scan, recompute=True), cell, given)
                agrees(cell, given, precision, ours, exact)
    # A second sweep would give the same tape, with more memory; rnn_* have empty tapes.
    assert launched.count("forward") == launched.count("backward")
    assert ("recompute" in launched) == (name not in ("rnn_tanh", "rnn_relu"))


@simulated
@pytest.mark.parametrize("part", PARTS)
def test_linear_cell_is_exact(part: str) -> None:
    for residency, blocks in WAYS[part]:
        for precision in precisions(part):
            given = operands(linear, 5, 18, 6, 37, 2, PRECISIONS[precision])
            given = {k: whole(v) for k, v in given.items()}
            given["resets"] = torch.rand(5, 18) < 0.2
            # bfloat16 has one chunk, because sums over chunks are rounded there.
            rows = 90 if precision == "bfloat16" else 36
            exact = run(by_reference, linear, doubled(given))
            for scan in (ops.scan, partial(ops.scan, recompute=True)):
                with running(residency, blocks, precision, chunk_rows=rows, batch_tile=16):
                    ours = run(scan, linear, given)
                for what, right in exact.items():
                    # States and their gradients are whole numbers in bfloat16 too. Gradients of
                    # weights, which sum over all steps, are rounded at the end.
                    assert right.abs().max() < 256 or " w_" in what or " b_" in what, what
                    same = torch.equal(ours[what], right.to(ours[what].dtype))
                    assert same, (what, blocks, precision)


@simulated
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [*BUILT_IN, "linear"])
def test_a_kernel_takes_the_tape_of_another(name: str, part: str) -> None:
    cell = cells.get(name)
    precision = "float64" if part == "step" else "tf32x3"
    tolerance = 1e-12 if part == "step" else 2e-5
    for extra in ({}, {"resets": torch.rand(4, 3) < 0.3}, {"lengths": torch.tensor([3, 0, 4])}):
        given = {**operands(cell, 4, 3, 3, 19, 2, PRECISIONS[precision]), **extra}
        arguments = positional(emit_cpp.key(cell), given)

        def using(kernel: str) -> Any:
            residency, blocks = ways(part, 19)[0]
            return (
                running(residency, blocks, precision) if kernel == "cuda" else kernels.use(kernel)
            )

        results = {}
        for kernel in ("cpu", "cuda"):
            with using(kernel):
                prepare(cell)
                results[kernel] = torch.ops.fastrnn.scan(*arguments, tape=True)
        for a, b in zip(flatten(results["cpu"]), flatten(results["cuda"]), strict=True):
            assert largest_error(a, b) < tolerance
        y, *states, _ = results["cpu"]
        output_grads = (torch.randn_like(y), [torch.randn_like(s) for s in states])
        gradients = {}
        for writer, (y, *_, tape) in results.items():
            for reader in ("cpu", "cuda"):
                with using(reader):
                    gradients[writer, reader] = torch.ops.fastrnn.scan_backward(
                        arguments[0], *output_grads, None, *arguments[1:], y, tape, EVERY_GRADIENT
                    )
        right = gradients.pop(("cpu", "cpu"))
        for pair, ours in gradients.items():
            for k, (a, b) in enumerate(zip(ours, right, strict=True)):
                assert largest_error(a, b) < tolerance, (pair, k)


@simulated
@pytest.mark.parametrize("part", PARTS)
def test_every_schedule_gives_the_same_bits(part: str) -> None:
    found = cuda.library()
    assert isinstance(found, cuda.Library)
    seed = ctypes.CDLL(str(found.path)).fastrnn_cudasim_seed
    seed.argtypes = [ctypes.c_uint64]
    cell = cells.get("lstm")
    given = operands(cell, 4, 9, 3, 50, 2, torch.bfloat16)
    given["resets"] = torch.rand(4, 9) < 0.2
    residency, blocks = WAYS[part][-1]
    results = []
    try:
        for number in range(4):
            seed(number)
            with running(residency, blocks, "bfloat16"):
                results.append(run(ops.scan, cell, given))
    finally:
        seed(0)
    for other in results[1:]:
        for what, value in results[0].items():
            assert torch.equal(value, other[what]), what


@simulated
@pytest.mark.parametrize("part", PARTS)
def test_only_wanted_gradients_and_none_that_is_absent(part: str) -> None:
    cell = cells.get("lstm")
    precision = "float64" if part == "step" else "tf32x3"
    given = operands(cell, 3, 2, 3, 5, bias=False, dtype=PRECISIONS[precision])
    given["s0"] = []
    arguments = positional(cell.name, given)
    residency, blocks = ways(part, 5)[0]
    with running(residency, blocks, precision):
        y, *states, tape = torch.ops.fastrnn.scan(*arguments, tape=True)
    for needs in ([True] + [False] * 7, [False] * 2 + [True] * 6):
        for dy, dstates in ((y, [None, None]), (None, [None, states[1]])):
            found = {}
            for kernel in (running(residency, blocks, precision), kernels.use("cpu")):
                with kernel:
                    found[kernel] = torch.ops.fastrnn.scan_backward(
                        cell.name, dy, dstates, None, *arguments[1:], y, tape, needs
                    )
            ours, right = found.values()
            assert len(ours) == len(right) == 1
            torch.testing.assert_close(ours[0], right[0], rtol=1e-5, atol=1e-6)


@simulated
@pytest.mark.parametrize("part", PARTS)
def test_strided_misaligned_empty_or_without_bias(part: str) -> None:
    cell = cells.get("gru")
    precision = "float64" if part == "step" else "tf32x3"
    dtype = PRECISIONS[precision]
    given = operands(cell, 3, 2, 4, 9, dtype=dtype)
    strided = {
        **given,
        "x": torch.randn(4, 2, 3, 2, dtype=dtype).permute(2, 1, 0, 3)[..., 1],
        "w_hh": [w.t().contiguous().t() for w in given["w_hh"]],
    }
    flat = torch.empty(1 + given["w_hh"][0].numel(), dtype=dtype)  # one flat vector of weights
    flat[1:] = given["w_hh"][0].flatten()
    misaligned = {**given, "w_hh": [flat[1:].view_as(given["w_hh"][0])]}
    step = operands(cell, 1, 2, 4, 9, dtype=dtype)
    residency, blocks = ways(part, 9)[0]
    for case in (
        strided,
        misaligned,
        {**operands(cell, 3, 2, 4, 9, 2, dtype, bias=False), "s0": []},
        operands(cell, 3, 0, 4, 9, dtype=dtype),
        operands(cell, 3, 2, 0, 9, dtype=dtype),
        {**step, "x": step["x"][0], "s0": [s[0] for s in step["s0"]]},
    ):
        with running(residency, blocks, precision):
            ours = run(ops.scan, cell, case)
        agrees(cell, case, precision, ours)


@simulated
def test_modules_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the plans for a device like an H100, unchanged."""
    x = torch.randn(4, 3, 5)
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1], x[:1, 2]])
    layers: list[tuple[torch.nn.Module, Any]] = [
        (fastrnn.LSTM(5, 6, num_layers=2, bidirectional=True), x),
        (fastrnn.GRU(5, 6, batch_first=True), x),
        (fastrnn.RNN(5, 6), packed),
        (fastrnn.LSTM(5, 12, heads=3, bidirectional=True), x),
        (fastrnn.GRU(5, 80), x),
    ]
    monkeypatch.setenv("FASTRNN_KERNEL", "cuda")
    for precision, tolerance in (("ieee", 2e-5), ("tf32", 5e-3)):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        for layer, given in layers:
            _C.forget_plans()
            ours = flatten(layer(given))
            ours += torch.autograd.grad(ours[0].sin().sum(), list(layer.parameters()))
            with kernels.use("cpu"):
                right = flatten(layer(given))
                right += torch.autograd.grad(right[0].sin().sum(), list(layer.parameters()))
            for a, b in zip(ours, right, strict=True):
                assert largest_error(a, b) < tolerance
    for layer, reason in (
        (fastrnn.LSTM(5, 6, proj_size=2), "does not project the output"),
        (fastrnn.Recurrent(unknown, 5, 6), "no code for cell"),
    ):
        with pytest.raises(plan.KernelRefused, match=reason):
            layer(x)
    monkeypatch.undo()
    _C.forget_plans()


@cells.cell(gates="a", states="h")
def unknown(u, v, h):
    return torch.tanh(u.a + v.a) * 0.5 + h


@simulated
def test_an_error_of_the_library_is_raised() -> None:
    cell = cells.get("lstm")
    with running("cluster", 3, "float64"), pytest.raises(RuntimeError, match=r"failed: .*error 9"):
        run(ops.scan, cell, operands(cell, 2, 2, 3, 40))


@simulated
@pytest.mark.parametrize("part", PARTS)
def test_what_lies_around_outputs_is_not_written(part: str) -> None:
    cell = cells.get("gru")
    precision = "float64" if part == "step" else "tf32x3"
    given = operands(cell, 3, 5, 4, 13, 2, PRECISIONS[precision])
    made: list[torch.Tensor] = []
    empty = torch.empty

    def guarded(*shape: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is None or not options["dtype"].is_floating_point:
            return empty(*shape, **options)
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        size = torch.Size(shape).numel()
        around = empty(size + 32, **options).fill_(7)
        made.append(around)
        return around[16 : 16 + size].fill_(torch.nan).view(*shape)

    residency, blocks = ways(part, 13)[0]
    with pytest.MonkeyPatch.context() as patch, running(residency, blocks, precision):
        patch.setattr(torch, "empty", guarded)
        ours = run(ops.scan, cell, given)
    agrees(cell, given, precision, ours)
    assert made
    for around in made:
        assert (around[:16] == 7).all() and (around[-16:] == 7).all()


@simulated
def test_plans_know_what_a_block_holds() -> None:
    """`plan.cuda.lay_out` against the library, for all configurations that a plan may compare."""
    found = cuda.library()
    assert isinstance(found, cuda.Library)
    known = 0
    for name, hidden, precision, tile, (residency, blocks) in itertools.product(
        BUILT_IN,
        (1, 17, 64, 100, 128, 256, 512, 768, 1000, 1024, 2048),
        RESIDENT,
        (8, 16, 32),
        [("block", 1), *(("cluster", n) for n in (2, 8)), *(("grid", n) for n in (5, 32, 128))],
    ):
        cell = cells.get(name)
        dtype = str(PRECISIONS[precision]).removeprefix("torch.")
        made = plan.CudaConfig(
            precision=precision, residency=residency, batch_tile=tile, blocks=blocks, warps=8
        )
        sweep = cuda.Sweep(steps=5, batch=70, hidden=hidden, recurrences=1, end=5)
        for backward in (False, True):
            problem = plan.Problem(
                *(name, 5, 70, 1, hidden, len(cell.gates), len(cell.states)),
                dtype=dtype,
                backward=backward,
            )
            for units in found.tables.units(backward, len(cell.gates), tile):
                named = replace(made, row_group=units)
                layout = plan.cuda.lay_out(problem, named, found.tables)
                ours = -1 if layout is None else layout.shared_bytes
                theirs = found.shared_bytes(name, sweep, cuda.cuda_plan(named), backward)
                assert ours == theirs, (name, hidden, named, backward)
                known += layout is not None
    assert known > 1000


@simulated
def test_row_groups_of_a_plan() -> None:
    """The library takes exactly the row groups in its tables."""
    found = cuda.library()
    assert isinstance(found, cuda.Library)
    tables = found.tables
    assert tables == replace(tables) and hash(tables) == hash(replace(tables))
    assert tables.units(False, 4, 8) == (8, 16) and tables.units(True, 1, 8) == (16, 32, 64)
    named = set()
    for name, hidden, precision, tile, (residency, blocks), backward in itertools.product(
        BUILT_IN,
        (1, 17, 100, 256, 1000),
        RESIDENT,
        tables.batch_tiles,
        [("block", 1), ("cluster", 8), ("grid", 5), ("grid", 32)],
        (False, True),
    ):
        made = plan.CudaConfig(
            precision=precision, residency=residency, batch_tile=tile, blocks=blocks, warps=8
        )
        sweep = cuda.Sweep(steps=5, batch=70, hidden=hidden, recurrences=1, end=5)

        units = tables.units(backward, len(cells.get(name).gates), tile)
        sizes = {}
        for each in (*units, 0, -8, 1, 24, 128):
            given = cuda.cuda_plan(replace(made, row_group=each))
            sizes[each] = found.shared_bytes(name, sweep, given, backward)
        assert all(sizes.pop(wrong) == -1 for wrong in (0, -8, 1, 24, 128))
        there = tables.registers[backward][precision == "tf32x3"][tables.batch_tiles.index(tile)][0]
        most = blocks * tables.warps
        for each, bytes_of_it in sizes.items():
            assert (bytes_of_it > 0) == (there > 0 and -(-hidden // each) <= most), (name, each)
        named |= {(backward, each) for each, value in sizes.items() if value > 0}
    assert named == {(False, 8), (False, 16), (False, 64), (True, 16), (True, 32), (True, 64)}


@simulated
@pytest.mark.parametrize("part", PARTS[1:])
@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm", "linear"])
def test_every_row_group(name: str, part: str) -> None:
    """The results are right with every row group."""
    found = cuda.library()
    assert isinstance(found, cuda.Library)
    cell = cells.get(name)
    residency, blocks = ways(part, 40)[0]
    gates, tile = len(cell.gates), 8
    forward, backward = (found.tables.units(way, gates, tile) for way in (False, True))
    for precision in ("bfloat16", "tf32x3"):
        given = operands(cell, 3, 9, 2, 40, dtype=PRECISIONS[precision])
        for first, second in itertools.zip_longest(forward, backward):
            groups = first or forward[0], second or backward[0]
            with running(residency, blocks, precision, batch_tile=tile, row_groups=groups):
                ours = run(ops.scan, cell, given)
            agrees(cell, given, precision, ours)
