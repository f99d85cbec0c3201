"""Compiles the Triton kernels for their GPUs, without a GPU. They must fit into shared memory and
spill no registers.

There is one kernel for every plan of every dtype, forward and backward. The tests compile each for
one of the targets whose plan it is, and those that may take all registers for each of these
targets; FASTRNN_TESTS=all compiles each for all its targets, as the command does. Of the published
cells they compile, for each plan, the one that holds most; FASTRNN_TESTS=all compiles every cell.
`python -m tests.kernels.gpu.triton.test_compile [--covering] [--full] [--published] [--no-counts]
[name...]` prints the needs of each kernel: registers, shared memory, matrix instructions and size
of the code. The names are those of targets or back ends. Without counts of instructions it takes
two thirds of the time; `--full` compiles every cell, with and without packed rows, and sizes that
are no multiple of a tile; `--published` compiles the published cells instead.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrnn import cells, plan
from fastrnn.cells.published import MODULES
from fastrnn.compiler import layout
from fastrnn.compiler.derive import derive
from fastrnn.kernels.gpu.triton import launch
from tests.support import selection
from tests.support.paths import ROOT
from tests.support.selection import pairs
from tests.support.shared import peepholes

pytestmark = pytest.mark.compiles

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

KIB = 1 << 10


@dataclass(frozen=True)
class Target:
    """A GPU: Triton's name for it, and its limit of shared memory per block."""

    backend: str
    arch: int | str
    shared_bytes: int
    warp: int = 32

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def device(self) -> plan.Device:
        facts = plan.TritonFacts(
            nvidia=self.backend == "cuda", shared_bytes=self.shared_bytes, warp=self.warp
        )
        return plan.Device(kind="cuda", triton=facts)


TARGETS = [
    Target("cuda", 80, 163 * KIB),
    Target("cuda", 86, 99 * KIB),
    Target("cuda", 89, 99 * KIB),
    Target("cuda", 90, 227 * KIB),
    Target("cuda", 100, 227 * KIB),
    Target("cuda", 120, 99 * KIB),
    Target("hip", "gfx942", 64 * KIB, 64),
]
BACKENDS = ("cuda", "hip")
POINTERS = {
    "float32": "*fp32",
    "float64": "*fp64",
    "bfloat16": "*bf16",
    "float16": "*fp16",
}


@cells.cell(gates="abcdef", states="hcn")
def wide(u, v, h, c, n):
    """A cell with more gates and states than others; not all gates are summed."""
    f, i = torch.sigmoid(u.a + v.a), torch.exp(-torch.relu(u.b + v.b))
    c = f * c + i * torch.tanh(u.c + v.c * torch.sigmoid(u.d + v.d))
    n = f * n + i
    return torch.sigmoid(u.e + v.e) * torch.tanh(u.f - v.f) * c / (1 + torch.abs(n)), c, n


LSTM = cells.get("lstm")
NOISY = cells.zoneout(LSTM, 0.1).noisy
CLIPPED = cells.clip_grad(LSTM, 1.0)
STAGED = [
    cells.recurrent_dropout(LSTM, 0.25).noisy,
    cells.get("gru_reset_before"),
    cells.get("layer_norm_lstm"),
]


@dataclass(frozen=True)
class Case:
    """A kernel to compile: its GPU, problem and precision."""

    target: Target
    problem: plan.Problem
    precision: str
    packed: bool  # rows of different lengths, with resets

    @property
    def plan(self) -> plan.Plan:
        device = replace(self.target.device, tf32=self.precision == "tf32")
        return plan.choose(self.problem, device)


@dataclass(frozen=True)
class Report:
    case: Case
    shared: int
    registers: int
    stack: int  # bytes per thread
    spilled: int  # instructions in a loop that move spilled registers, or registers
    mix: dict[str, int]

    @property
    def wrong(self) -> str:
        if self.shared > self.case.target.shared_bytes:
            return f"needs {self.shared} bytes of shared memory, of {self.case.target.shared_bytes}"
        return "spills" if self.spilled or self.stack else ""

    @property
    def row(self) -> str:
        p, q = self.case.problem, self.case.plan.triton
        way = "resident" if q.resident else f"streamed {q.unit_tile}x{q.depth_tile}/{q.stages}"
        way += " projected" * p.projected + " packed" * self.case.packed
        direction = "backward" if p.backward else "forward"
        mix = " ".join(f"{name} {n}" for name, n in self.mix.items())
        return (
            f"{self.case.target.name:6} {p.cell:8} {direction:8} H {p.hidden:4} {p.dtype:8} "
            f"{self.case.precision:6} rows {q.batch_tile:2} {way:34} warps {q.warps:2}  "
            f"shared {self.shared:6}  registers {self.registers:3}  stack {self.stack:3}  "
            f"spilled {self.spilled:2}  {mix}  {self.wrong}"
        )


def compiled(case: Case, counts: bool = True) -> Report:
    """The needs of the kernel; without `counts`, its instructions are read only if they can move
    spilled registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastrnn.kernels.gpu.triton.common import RUN_TIME

    target, problem, packed = case.target, case.problem, case.packed
    chosen = case.plan.triton
    assert chosen.precision == case.precision
    derived = derive(CELLS[problem.cell])
    kernel = launch.kernel(chosen, problem.backward, bool(derived.programs))
    only = {"dsteps": packed} if problem.backward else {}
    if not problem.backward:
        only = {"bias": not all(derived.summed), "tape": problem.tape}
    meta = launch.meta_arguments(
        derived, chosen, problem.hidden, backward=problem.backward,
        packed=packed, ragged=packed, resets=packed, given=packed,
        ordered=packed and problem.draws > 0, halved="16" in problem.dtype,
        projected=problem.hidden // 2 if problem.projected else None, **only,
    )  # fmt: skip
    stored = POINTERS[problem.dtype]
    computed = "*fp64" if problem.dtype == "float64" else "*fp32"
    types: dict[str, str] = dict.fromkeys(kernel.arg_names, stored)
    types |= dict.fromkeys(("carry", "unprojected", "s0", "ds", "dp", "scratch"), computed)
    types |= dict.fromkeys(("begins", "dbegins"), computed)
    types |= {"noise": "*i64", "first": "*i64", "length": "*i64", "resets": "*u8"}
    types |= dict.fromkeys(RUN_TIME, "i64")
    types |= dict.fromkeys(("steps", "begin", "end", "hidden", "width"), "i32") | dict.fromkeys(
        meta, "constexpr"
    )
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*")
    }
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names if name in types},
        constexprs=meta,
        attrs=aligned,
    )
    made = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp),
        options=launch.compile_options(chosen),
    )
    read = (
        _amd(made.asm["amdgcn"]) if target.backend == "hip" else _nvidia(made.asm["cubin"], counts)
    )
    return Report(case, made.metadata.shared, *read)


def _nvidia(cubin: bytes, counts: bool) -> tuple[int, int, int, dict[str, int]]:
    """Registers, bytes of stack, moves of spilled registers in loops, counts of instructions."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        # Registers are spilled to a thread's own memory: without any, no instruction moves them.
        if not counts and found[2] == found[3] == "0":
            return int(found[1]), 0, 0, {}
        code = _output(tools / "nvdisasm", "-c", file.name)
    spilled = _in_loops(code, r"\b(STL|LDL)\b")
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)", code, re.M)
    times = Counter(names)
    mix = {name: n for name, n in times.items() if "MMA" in name or name in ("FFMA", "DFMA")}
    mix["all"] = len(names)
    return int(found[1]), int(found[2]), spilled, mix


def _in_loops(code: str, instruction: str) -> int:
    """The number of lines with the instruction between a label and a jump back to it."""
    lines = code.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i) < i - 1:
            inside.update(range(labels[jump[1]], i))
    return sum(bool(re.search(instruction, lines[i])) for i in inside)


def _amd(assembly: str) -> tuple[int, int, int, dict[str, int]]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found, name
        return int(found[1])

    names = Counter(re.findall(r"^\s+(v_mfma|v_fmac?|ds_|global_)", assembly, re.M))
    stack = number("private_segment_fixed_size")
    return number("vgpr_count"), stack, number("vgpr_spill_count"), dict(names)


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


MOST_REGISTERS = 255  # that a thread can have
USUAL = {name: cells.get(name) for name in ("lstm", "gru", "rnn_tanh", "wide", peepholes.name)}
USUAL |= {cell.name: cell for cell in (NOISY, CLIPPED, *STAGED)}
CELLS = USUAL | {name: cells.get(name) for name in MODULES}
SIZES = (1, 32, 64, 100, 128, 256, 512, 1000)
FEW = (64, 512)  # for a projection, and for a cell with learned parameters or random numbers
PUBLISHED_SIZES = (16, 32, 64, 100, 128, 256, 512)


def is_special(name: str) -> str:
    """The name of a cell whose kernels have code that others lack; else ""."""
    derived = derive(CELLS[name])
    has = derived.params or derived.draws or derived.programs or derived.limit
    return name if has else ""


def problem(
    name: str, dtype: str, hidden: int, batch: int, projected: bool, backward: bool
) -> plan.Problem:
    cell = CELLS[name]
    derived = derive(cell)
    return plan.Problem(
        name, 100, batch, 64, hidden, len(cell.gates), len(cell.states), dtype=dtype, tape=True,
        backward=backward, projected=projected, stages=derived.stages, draws=len(derived.draws),
        values=layout.values(derived, forward=not backward), input_gates=len(cell.inputs),
        recurrent_gates=len(cell.recurrent), all_summed=derived.all_summed,
    )  # fmt: skip


def problems() -> Iterator[plan.Problem]:
    for name in USUAL:
        special, projectable = is_special(name), derive(CELLS[name]).projectable
        for dtype, hidden, batch, projected, backward in itertools.product(
            ("bfloat16", "float32", "float64"), SIZES, (1, 64), (False, True), (False, True)
        ):
            some = projected or special
            if not some or (hidden in FEW and (projectable or not projected)):
                yield problem(name, dtype, hidden, batch, projected, backward)


def precisions(target: Target, dtype: str) -> tuple[str, ...]:
    three = target.backend == "cuda" and dtype == "float32"
    return ("tf32x3", "tf32") if three else ("ieee",)


def with_rows(target: Target, own: plan.Problem, precision: str, packed: bool) -> Case:
    """Packed rows come with episodes that begin in given states, and with gradients of the states
    after every step, which the plan counts."""
    return Case(target, replace(own, reset_states=packed, every_step=packed), precision, packed)


def key_of(case: Case) -> tuple[Any, ...]:
    """What makes a kernel another one on the same GPU."""
    problem = case.problem
    return (
        *(problem.dtype, case.precision, problem.backward, problem.projected),
        *(replace(case.plan, chunk_rows=1), is_special(problem.cell)),
    )


def cases(target: Target, full: bool = False) -> Iterator[Case]:
    """One kernel for each plan, dtype and pass, every other one packed; `full`: for every cell."""
    seen: set[Any] = set()
    for own in problems():
        rare = bool(is_special(own.cell))
        alone = own.projected and own.stages == 1
        if rare and not full and (own.hidden != FEW[0] or alone):
            continue
        if own.stages > 1 and not full and (own.dtype == "float64" or own.batch == 1):
            continue
        for precision in precisions(target, own.dtype):
            first = len(seen) % 2 == 0
            for packed in (first, not first):  # whose plans may differ
                case = with_rows(target, own, precision, packed)
                key = key_of(case)
                if full:
                    key += (own.cell, own.hidden % 16 == 0, packed)
                if key not in seen:
                    seen.add(key)
                    yield case


def published(target: Target, batches: Sequence[int] = (1, 64)) -> Iterator[Case]:
    """One kernel of every published cell for each plan, dtype and pass, and for sizes that are no
    multiple of a tile: with packed rows, which take more registers, where some have this plan."""
    seen: set[Any] = set()
    for name, dtype, hidden, batch, backward in itertools.product(
        MODULES, ("bfloat16", "float32"), PUBLISHED_SIZES, batches, (False, True)
    ):
        own = problem(name, dtype, hidden, batch, False, backward)
        for precision, packed in itertools.product(precisions(target, dtype), (True, False)):
            case = with_rows(target, own, precision, packed)
            key = (name, hidden % 16 == 0, *key_of(case))
            if key not in seen:
                seen.add(key)
                yield case


def kind_of(case: Case) -> tuple[Any, ...]:
    """What a selection of published cells has of each: dtype, pass, plan and kind of kernel."""
    own = case.problem
    kernel = own.dtype, case.precision, own.backward, own.stages > 1
    return *kernel, replace(case.plan, chunk_rows=1)


def several_rows(target: Target) -> list[Case]:
    return [case for case in published(target, batches=(64,)) if case.precision != "tf32"]


def holding_most(target: Target) -> list[Case]:
    """Of the published cells with the same plan for several rows, the one whose step has most
    results; not in TF32, whose plans are much like those of bfloat16."""

    def results(case: Case) -> tuple[int, bool]:
        derived, size = derive(CELLS[case.problem.cell]), case.problem.hidden
        return len(derived.gradients if case.problem.backward else derived.step), size % 16 > 0

    same: dict[Any, list[Case]] = {}
    for case in several_rows(target):
        same.setdefault(kind_of(case), []).append(case)
    return [max(alike, key=results) for alike in same.values()]


def values(case: Case) -> tuple[Hashable, ...]:
    """What a selection pairs with each other; the first is the target."""
    problem, config = case.problem, case.plan.triton
    return (
        *(case.target.name, ("dtype", problem.dtype, case.precision), ("cell", problem.cell)),
        *(("backward", problem.backward), ("packed", case.packed)),
        *(("projected", problem.projected), ("resident", config.resident)),
    )


def covering(targets: Sequence[Target]) -> list[Case]:
    """Each kernel for one of the targets that have it. Those whose plan lets a thread have as many
    registers as there are may spill on one GPU alone: for each."""
    kernels: dict[Any, list[Case]] = {}
    for case in itertools.chain.from_iterable(map(cases, targets)):
        kernels.setdefault((case.target.backend, *key_of(case)), []).append(case)
    every = [same for same in kernels.values() if same[0].plan.triton.registers == MOST_REGISTERS]
    some = [same for same in kernels.values() if same not in every]
    chosen = [*itertools.chain(*every), *selection.covering(some, values)]
    whole = list(itertools.chain(*some))
    while missing := with_target(whole) - with_target(chosen):
        chosen.append(max(whole, key=lambda case: len(missing & with_target([case]))))
    return chosen


def with_target(some: Sequence[Case]) -> set[tuple[Hashable, Hashable]]:
    """The targets, each with every value that it occurs with."""
    return {pair for case in some for pair in pairs(values(case)) if case.target.name in pair}


def main(chosen: Sequence[Case], counts: bool) -> int:
    """The number of kernels that do not fit or that spill."""
    bad = 0
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        needs = partial(compiled, counts=counts)
        for report in pool.map(needs, chosen):
            bad += bool(report.wrong)
            print(report.row, flush=True)
    return bad


def select(names: Sequence[str]) -> list[Target]:
    """The targets that have one of these names or back ends; all without names."""
    return [t for t in TARGETS if not names or t.name in names or t.backend in names]


def check(name: str, *options: str) -> None:
    """Runs in a process of its own, without the interpreter that other tests need."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options += () if selection.ALL_TESTS else ("--covering",)
    module = "tests.kernels.gpu.triton.test_compile"
    done = subprocess.run(
        [sys.executable, "-m", module, "--no-counts", *options, name],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.takes(45)
@pytest.mark.parametrize("name", [t.name for t in TARGETS] if selection.ALL_TESTS else BACKENDS)
def test_kernels_fit_and_spill_nothing(name: str) -> None:
    check(name)


@pytest.mark.takes(60)
@pytest.mark.parametrize(
    "name", [t.name for t in TARGETS] if selection.ALL_TESTS else ("sm_90", "gfx942")
)
def test_published_cells_fit_and_spill_nothing(name: str) -> None:
    check(name, "--published")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_selection_has_each_kernel_and_all_values_for_each_target(backend: str) -> None:
    targets = select([backend])
    whole = [case for target in targets for case in cases(target)]
    chosen = covering(targets)
    assert set(chosen) <= set(whole)
    assert set(map(key_of, chosen)) == set(map(key_of, whole))

    assert with_target(chosen) == with_target(whole)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_selection_of_published_cells_has_each_plan(name: str) -> None:
    (target,) = select([name])
    whole, chosen = several_rows(target), holding_most(target)
    assert set(chosen) <= set(whole)
    assert {case.problem.cell for case in whole} == set(MODULES)
    assert set(map(kind_of, chosen)) == set(map(kind_of, whole))


def kernels() -> Iterator[tuple[Any, set[str]]]:
    """Each kernel, and its arguments in `RUN_TIME` that only some kernels have."""
    if launch.interpreted():
        pytest.skip("needs Triton's compiler")
    for backward, resident, stages in itertools.product((False, True), repeat=3):
        kernel = launch.kernel(plan.TritonConfig(resident=resident), backward, stages)
        yield kernel, set() if resident else {"hidden", "width"}


def test_triton_binds_the_arguments_of_every_kernel() -> None:
    """It does so by a function that it writes, which has variables of its own."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for kernel, _ in kernels():
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        values = {
            p.name: 1 if p.is_constexpr or p.annotation_type else torch.zeros(1)
            for p in kernel.params
        }
        bound = bind(*values.values())[0]
        assert all(bound[name] is value for name, value in values.items())


def test_what_a_batch_decides_is_no_constant_of_a_kernel() -> None:
    from fastrnn.kernels.gpu.triton.common import RUN_TIME

    for kernel, some in kernels():
        free = {p.name for p in kernel.params if p.do_not_specialize}
        assert free == set(RUN_TIME) - {"hidden", "width"} | some
        wide_numbers = {p.name for p in kernel.params if p.annotation_type == "i64"}
        assert wide_numbers == {"batch", "base", "base_reverse", "chunk_rows", "reverse"}
        constants = {p.name for p in kernel.params if p.is_constexpr}
        assert not constants & {"T", "B", "I", "P", *RUN_TIME}


if __name__ == "__main__":
    names = select([a for a in sys.argv[1:] if not a.startswith("--")])
    full, some = "--full" in sys.argv, "--covering" in sys.argv
    if "--published" in sys.argv:
        kinds = map(holding_most if some else published, names)
        every = list(itertools.chain.from_iterable(kinds))
    elif some:
        every = covering(names)
    else:
        every = [case for target in names for case in cases(target, full)]
    sys.exit(main(every, "--no-counts" not in sys.argv) > 0)
