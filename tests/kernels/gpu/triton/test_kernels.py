"""The Triton kernels against the reference, in Triton's interpreter: values, gradients, tapes.

The import of Triton decides whether it interprets, so these tests run in a process of their own,
which the first test starts. They leave bfloat16 out, because the interpreter computes it wrongly.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import cells, kernels, ops, plan
from fastrnn.cells.noise import seeded
from fastrnn.compiler.derive import derive
from fastrnn.extension import _C
from fastrnn.kernels import launched
from fastrnn.kernels.gpu.triton import launch
from fastrnn.kernels.prepare import prepare
from fastrnn.tools.tolerance import largest_error
from tests.support.interpreter import (
    INTERPRETED,
    LAYOUTS,
    WAYS,
    in_layout,
    interpreted,
    residency,
)
from tests.support.kernels import check, check_tapes, planned
from tests.support.names import BUILT_IN
from tests.support.operands import (
    PLAIN,
    ROWS,
    Shape,
    by_reference,
    linear,
    linear_projectable,
    operands,
    positional,
    run,
    whole,
    with_every_step,
    with_every_step_by_reference,
)
from tests.support.selection import pairwise
from tests.support.shared import noisy
from tests.support.tensors import batches, flatten, sum_of

pytestmark = pytest.mark.interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)


FILES = [
    str(Path(__file__).with_name(f"test_{name}.py"))
    for name in ("kernels", "launch", "math", "stages")
]
PARTS = {  # they run side by side
    "resident": "resident",
    "streamed": "streamed and not project",
    "projected": "project",
    "rest": "not resident and not streamed and not project",
}


@pytest.mark.skipif(INTERPRETED, reason="this is such a run")
@pytest.mark.takes(50)
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    """Runs the tests below, and those of the files beside this one."""
    chosen = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    result = subprocess.run(
        [*command, *FILES],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


SHAPES = [  # T, B, I, H, P
    (1, 1, 1, 1, 1),
    (2, 3, 1, 5, 2),
    (7, 1, 3, 17, 1),
    (2, 17, 2, 5, 1),
    (2, 3, 4, 64, 1),
    (3, 2, 2, 100, 1),
]


@interpreted
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*BUILT_IN, "linear", *ROWS])
def test_shapes(name: str, shape: Shape, way: str) -> None:
    large = shape[3] > 17
    for dtype in (torch.float32,) if large else (torch.float64, torch.float32, torch.float16):
        given = operands(cells.get(name), *shape, dtype=dtype)
        with planned(**residency(way, shape[3], shape[1], dtype)):
            check(cells.get(name), given, "triton")


@interpreted
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "linear_projectable"])
def test_shapes_projected_and_streamed(name: str) -> None:
    cell = cells.get(name)
    for shape in ((1, 1, 1, 1, 1), (2, 3, 1, 5, 2), (3, 1, 3, 17, 1), (2, 17, 2, 33, 1)):
        hidden, batch = shape[3], shape[1]
        for projected, dtype in (
            ((hidden + 1) // 2, torch.float64),
            ((hidden + 1) // 3, torch.float32),  # a single unit is projected to width 0
            (hidden + 18, torch.float16),
        ):
            given = operands(cell, *shape, dtype=dtype, projected=projected)
            with planned(**residency("streamed", hidden, batch, dtype)):
                check(cell, given, "triton")


RAGGED = [(1, 2, 3, 1), (5, 7, 17, 2)]  # T, B, H, P
WITH_PARAMETERS = "linear_projectable"


@interpreted
@pytest.mark.parametrize(
    ("name", "way", "projected", "layout"),
    [
        *pairwise(("gru", "lstm", "linear", WITH_PARAMETERS, noisy.name), WAYS, [None], LAYOUTS),
        *pairwise(ROWS, WAYS, [None], LAYOUTS),
        *pairwise([WITH_PARAMETERS], ["streamed"], (11, 19), LAYOUTS),
    ],
)
def test_ragged_batches_resets_and_chunks(
    name: str, way: str, projected: int | None, layout: str
) -> None:
    cell = cells.get(name).noisy
    for steps, batch, hidden, recurrences in RAGGED:
        given, exact, flags = in_layout(layout, cell, steps, batch, hidden, recurrences, projected)
        for resets, chunk in ((None, 2 * batch), (flags, 1), ("given", 99)):
            if isinstance(resets, str):  # those of before, to given states
                begins = [torch.randn_like(s) for s in given["s0"]]
                given["reset_states"] = exact["reset_states"] = begins
            else:
                given["resets"] = exact["resets"] = resets
            fields = residency(way, hidden, 1, torch.float64) | {"chunk_rows": chunk}
            with planned(**fields | {"batch_tile": 4}), kernels.use("triton"):
                ours = run(with_every_step, cell, given)
            for what, right in run(with_every_step_by_reference, cell, exact).items():
                assert largest_error(ours[what], right) < 1e-12, (what, resets, chunk)


@cells.cell(gates="a", states="hcd")
def drawn(u, v, h, c, d):
    """Its states are the numbers that it draws."""
    ones = u.a * 0 + 1
    once = fastrnn.dropout(ones, 0.7, per="sequence")
    return fastrnn.dropout(ones, 0.3), once, fastrnn.bernoulli(0.5) + 0 * v.a


@interpreted
@pytest.mark.parametrize("way", WAYS)
def test_every_kernel_draws_the_same_bits(way: str) -> None:
    cell, (steps, batch, hidden) = drawn.noisy, (3, 5, 150)  # units of three blocks of 64
    for dtype in (torch.float32, torch.float64):
        given = operands(cell, steps, batch, 2, hidden, 2, dtype=dtype)
        sizes = torch.tensor([5, 3, 2])
        given |= {"x": torch.randn(10, 2, dtype=dtype), "batch_sizes": sizes}
        for order in (None, torch.tensor([3, 1, 4, 0, 2])):
            given["noise"] = seeded(cell.draws, given["x"], order)
            arguments = positional(prepare(cell), given)
            found = {}
            for kernel in ("reference", "cpu", "triton"):
                rows = {"batch_tile": 4} if kernel == "triton" else {}
                fields = {**residency(way, hidden, 1, dtype), **rows} if rows else {}
                with planned(**fields), kernels.use(kernel):
                    found[kernel] = flatten(torch.ops.fastrnn.scan(*arguments, tape=True))
            for kernel in ("cpu", "triton"):
                for ours, right in zip(found[kernel], found["reference"], strict=True):
                    assert torch.equal(ours, right), kernel
            assert 0.5 < found["triton"][0].count_nonzero() / found["triton"][0].numel() < 0.9


@interpreted
@pytest.mark.parametrize(
    ("way", "projected"), [("resident", None), ("streamed", None), ("streamed", 21)]
)
def test_linear_cell_is_exact(way: str, projected: int | None) -> None:
    cell = linear if projected is None else linear_projectable
    given = operands(cell, 5, 18, 6, 37, 2, torch.float32, projected=projected)
    given = {k: whole(v) for k, v in given.items()}
    given["resets"] = torch.rand(5, 18) < 0.1
    with planned(**residency(way, 37, 18, torch.float32), chunk_rows=36), kernels.use("triton"):
        ours = run(ops.scan, cell, given)
    for what, right in run(by_reference, cell, given).items():
        assert torch.equal(ours[what], right), what


@interpreted
@pytest.mark.parametrize(("name", "projected"), [*PLAIN, ("lstm", 11), ("linear_projectable", 11)])
def test_a_kernel_takes_the_tape_of_another(name: str, projected: int | None) -> None:
    check_tapes(cells.get(name), projected, "cpu", "triton", steps=4, batch=3)


@interpreted
def test_only_wanted_gradients_and_none_that_is_absent() -> None:
    cell = cells.get("lstm")
    given = operands(cell, 3, 2, 3, 5, bias=False)
    given["s0"] = []
    arguments = positional(cell.name, given)
    with kernels.use("triton"):
        y, *states, tape = torch.ops.fastrnn.scan(*arguments, tape=True)
    for needs in ([True] + [False] * 7, [False] * 2 + [True] * 6):
        for dy, dstates in ((y, [None, None]), (None, [None, states[1]])):
            found = {}
            for kernel in ("triton", "cpu"):
                with kernels.use(kernel):
                    found[kernel] = torch.ops.fastrnn.scan_backward(
                        cell.name, dy, dstates, None, *arguments[1:], y, tape, needs
                    )
            assert len(found["triton"]) == len(found["cpu"]) == 1
            torch.testing.assert_close(found["triton"][0], found["cpu"][0])


@interpreted
def test_the_states_of_every_step_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fastrnn.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(4, 3, 3, dtype=torch.float64), torch.tensor([2, 4, 0])
    found = []
    for kernel in ("triton", "reference"):
        with kernels.use(kernel), monkeypatch.context() as patch:
            if kernel == "triton":  # and nothing else
                patch.delattr(launched, "reference_backward")
            every = layer(x, lengths=lengths, return_states=True)[2]
            total = sum_of(state.square().sum() for states in every for state in states)
            found.append([every, torch.autograd.grad(total, list(layer.parameters()))])
    for one, other in zip(*map(flatten, found), strict=True):
        assert largest_error(one, other) < 1e-12


@interpreted
def test_strided_empty_or_without_bias() -> None:
    cell = cells.get("gru")
    given = operands(cell, 3, 2, 4, 9)
    given["x"] = torch.randn(4, 2, 3, 2, dtype=torch.float64).permute(2, 1, 0, 3)[..., 1]
    given["w_hh"] = [w.t().contiguous().t() for w in given["w_hh"]]
    check(cell, given, "triton")
    check(cell, {**operands(cell, 3, 2, 4, 9, 2, bias=False), "s0": []}, "triton")
    check(cell, operands(cell, 3, 0, 4, 9), "triton")
    check(cell, operands(cell, 3, 2, 0, 9), "triton")
    step = operands(cell, 1, 2, 4, 9)
    check(cell, {**step, "x": step["x"][0], "s0": [s[0] for s in step["s0"]]}, "triton")


@interpreted
def test_modules_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_KERNEL", "triton")
    for layer, x in (
        (fastrnn.LSTM(5, 6, num_layers=2, bidirectional=True), torch.randn(4, 3, 5)),
        (fastrnn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=2), torch.randn(4, 3, 5)),
        (fastrnn.GRU(5, 6, batch_first=True), torch.randn(4, 3, 5)),
        # Its norms begin with zeros, whose gradients would amplify float32's rounding by 300.
        (
            fastrnn.LayerNormLSTM(5, 6, bidirectional=True, proj_size=2, dtype=torch.float64),
            torch.randn(4, 3, 5, dtype=torch.float64),
        ),
        (fastrnn.Recurrent(linear, 5, 6), torch.randn(4, 3, 5)),
        (fastrnn.LSTM(5, 12, heads=3, bidirectional=True), torch.randn(4, 17, 5)),
        (fastrnn.LSTM(5, 6, 2, recompute=True), torch.randn(4, 3, 5)),
        (
            fastrnn.GRU(5, 8, 2, heads=2, bidirectional=True),
            pack_sequence(batches([3, 5, 1], 5, torch.float32), enforce_sorted=False),
        ),
    ):
        _C.forget_plans()
        ours = flatten(layer(x))
        ours += torch.autograd.grad(ours[0].sin().sum(), list(layer.parameters()))
        with kernels.use("cpu"):
            right = flatten(layer(x))
            right += torch.autograd.grad(right[0].sin().sum(), list(layer.parameters()))
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(plan.KernelRefused, match="computes bfloat16 wrongly"):
        fastrnn.LSTM(5, 6, dtype=torch.bfloat16)(torch.zeros(4, 3, 5, dtype=torch.bfloat16))
    monkeypatch.undo()
    _C.forget_plans()


class Pointer:
    """Stands for a tensor of any size, without memory."""

    def __init__(self, base: int, dtype: torch.dtype, count: int) -> None:
        self.base, self.dtype, self.count = base, dtype, count

    def data_ptr(self) -> int:
        return self.base


class NoMemory:
    """Takes the place of the interpreter's memory; records which elements are accessed."""

    def __init__(self) -> None:
        self.pointers: dict[str, Pointer] = {}
        self.touched: dict[str, tuple[int, int]] = {}
        self.batch = 0

    def new(self, name: str, dtype: torch.dtype, *size: int) -> Pointer:
        base = (1 + len(self.pointers)) << 48
        self.pointers[name] = Pointer(base, dtype, math.prod(size))
        return self.pointers[name]

    def touch(self, addresses: Any, mask: Any) -> str:
        """Records an access; returns the name of the tensor that has the addresses."""
        addresses, mask = numpy.broadcast_arrays(addresses, mask)
        inside = addresses[mask].astype(numpy.int64)
        number = int(addresses.flat[0]) >> 48
        name = list(self.pointers)[number - 1]
        if inside.size:
            pointer = self.pointers[name]
            offsets = (inside - pointer.base) // pointer.dtype.itemsize
            low, high = self.touched.get(name, (1 << 60, 0))
            self.touched[name] = min(low, int(offsets.min())), max(high, int(offsets.max()))
        return name

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        if self.touch(addresses, mask) == "first":
            return (addresses.astype(numpy.int64) - self.pointers["first"].base) // 8 * self.batch
        return numpy.zeros(addresses.shape, dtype)

    def store(self, addresses: Any, values: Any, mask: Any) -> None:
        self.touch(addresses, mask)


def number(value: int, annotation: Any) -> Any:
    """A number of the width in the kernel's annotation; the interpreter would drop the width."""
    import triton.language as tl
    from triton.runtime import interpreter

    if annotation is not tl.int64:
        return value
    handle = interpreter.TensorHandle(numpy.array([value], dtype=numpy.int64), tl.int64)
    return tl.tensor(handle, tl.int64)


def run_last_program(
    patch: pytest.MonkeyPatch,
    kernel: Any,
    arguments: dict[str, Any],
    memory: NoMemory,
    grid: tuple[int, int, int],
) -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_dimensions, set_index = builder.set_grid_dim, builder.set_grid_idx
    patch.setattr(interpreter, "_interpreter", memory)
    patch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda _, *given: given)
    patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    patch.setattr(builder, "set_grid_dim", lambda *_: set_dimensions(*grid))
    patch.setattr(builder, "set_grid_idx", lambda *_: set_index(*(n - 1 for n in grid)))
    kernel[(1,)](**arguments)


@interpreted
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("projected", [None, 7])
@pytest.mark.parametrize("backward", [False, True])
def test_tensors_of_more_elements_than_32_bits_count(
    backward: bool, projected: int | None, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program of a grid accesses the last element of every tensor, and none past it."""
    from fastrnn.kernels.gpu.triton.common import RUN_TIME

    derived = derive(cells.get("lstm"))
    steps, batch, recurrences, hidden = 6, (1 << 29) - 3, 2, 5
    recurrent, depth, rows = projected or hidden, 4 * hidden, steps * batch
    tape_width = 1 + len(derived.saved) + (projected is not None)
    widest = max(hidden, recurrent)
    stored, summed = torch.float16, torch.float32
    for way in ("resident", "streamed") if projected is None else ("streamed",):
        for begin in (0, steps - 1):
            memory = NoMemory()
            memory.batch = batch
            new, chunk = memory.new, (recurrences, rows)
            for name, dtype, *size in (
                ("u", stored, *chunk, depth), ("dy", stored, rows, recurrences, recurrent),
                ("dsteps", stored, rows, recurrences, 1, hidden),
                ("w_hh", stored, recurrences, depth, recurrent),
                ("b_hh", stored, recurrences, depth),
                ("carry", summed, 3, recurrences, batch, widest),
                ("s0", summed, 2, recurrences, batch, widest),
                ("ds", summed, 2, recurrences, batch, widest),
                ("y", stored, rows, recurrences, recurrent),
                ("tape", stored, rows, recurrences, tape_width, hidden),
                ("du", stored, *chunk, depth), ("dv", stored, *chunk, depth),
                ("h_prev", stored, *chunk, recurrent), ("dh", stored, *chunk, recurrent),
                ("w_hr", stored, recurrences, recurrent, hidden),
                ("unprojected", summed, recurrences, batch, hidden),
                ("parameters", stored, recurrences, 0, hidden), ("dp", summed, *chunk, 0),
                ("noise", torch.int64, 1 + batch),
                ("operands", stored, *chunk, 0),
                ("begins", summed, 2, recurrences, batch, widest),
                ("dbegins", summed, 2, recurrences, batch, widest),
                ("first", torch.int64, steps + 1), ("length", torch.int64, batch),
                ("resets", torch.uint8, rows),
            ):  # fmt: skip
                new(name, dtype, *size)
            chosen = plan.TritonConfig(**residency(way, hidden, 16, torch.float32))
            kernel = launch.kernel(chosen, backward)
            values = (steps, batch, begin, begin + 1, 0, 0, rows, 0, hidden, recurrent)
            given = memory.pointers | {
                name: number(value, kernel.fn.__annotations__.get(name))
                for name, value in zip(RUN_TIME, values, strict=True)
            }
            flags = {} if backward else {"tape": True}
            given |= launch.meta_arguments(
                derived, chosen, hidden, backward=backward, packed=packed,
                projected=projected, resets=packed, given=packed, **flags,
            )  # fmt: skip
            arguments = {name: given[name] for name in kernel.arg_names}
            with monkeypatch.context() as patch:
                run_last_program(
                    patch, kernel, arguments, memory, (-(-batch // 16), recurrences, 1)
                )
            for name, (low, high) in memory.touched.items():
                assert 0 <= low <= high < memory.pointers[name].count, (way, name)
            to_the_end = {"y", "tape", "dv" if backward else "u"} if begin else set()
            to_the_end |= {"ds"} if backward else set() if projected else {"carry"}
            to_the_end |= {"s0"} if backward and not begin else set()
            to_the_end |= {"resets"} if packed and begin else set()
            if backward and projected:
                to_the_end.discard("y")  # it reads only the previous step of y
            for name in to_the_end:
                count = memory.pointers[name].count
                if name == "carry" and way == "resident":
                    count = count // 3 * 2
                if name in ("ds", "s0"):  # their last state has width H
                    count -= widest - hidden
                assert memory.touched[name][1] == count - 1 > 1 << 31, (way, name)
