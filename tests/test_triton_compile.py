"""Triton kernels are compiled for the GPUs they are meant for, without one: they must fit into
shared memory and spill no registers in the sweep, but for the few of `_STACK` and `_RELOADS`.

The tests take a selection: both ways of the plan, in both directions. With `--full` it is every
cell, type and size below, which takes many minutes.
`python -m tests.test_triton_compile` prints what each needs: registers, shared memory, the matrix
instructions in it and the size of its code.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrnn import cells, codegen, plan, triton_scan

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

KIB = 1 << 10


@dataclass(frozen=True)
class Target:
    """A GPU: Triton's name for it, and what a block may have of shared memory there."""

    backend: str
    arch: int | str
    shared_bytes: int
    warp: int = 32

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def device(self) -> plan.Device:
        return plan.Device(kind="cuda", triton=None, shared_bytes=self.shared_bytes, warp=self.warp)


TARGETS = [
    Target("cuda", 80, 163 * KIB),
    Target("cuda", 86, 99 * KIB),
    Target("cuda", 89, 99 * KIB),
    Target("cuda", 90, 227 * KIB),
    Target("cuda", 100, 227 * KIB),
    Target("cuda", 120, 99 * KIB),
    Target("hip", "gfx942", 64 * KIB, 64),
]
POINTERS = {
    "float32": "*fp32",
    "float64": "*fp64",
    "bfloat16": "*bf16",
    "float16": "*fp16",
}


@dataclass(frozen=True)
class Report:
    problem: plan.Problem
    plan: plan.Plan
    packed: bool
    shared: int
    registers: int
    spilled: int  # instructions or registers
    mix: dict[str, int]

    @property
    def row(self) -> str:
        p, q = self.problem, self.plan
        way = "resident" if q.resident else f"streamed {q.unit_tile}x{q.depth_tile}/{q.stages}"
        direction = "backward" if p.backward else "forward"
        mix = " ".join(f"{name} {n}" for name, n in self.mix.items())
        return (
            f"{p.cell:8} {direction:8} H {p.hidden:4} {p.dtype:8} rows {q.batch_tile:2} "
            f"{way:18} {'packed ' * self.packed}warps {q.warps:2}  shared {self.shared:6}  "
            f"registers {self.registers:3}  spilled {self.spilled}  {mix}"
        )


def compiled(target: Target, problem: plan.Problem, packed: bool = False) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastrnn.triton_sweep import RUN_TIME

    derived = codegen.derive(cells.get(problem.cell))
    chosen = plan.choose(problem, target.device)
    assert chosen.kernel == "triton"
    precision = triton_scan.precision(getattr(torch, problem.dtype), target.backend == "cuda")
    kernel = triton_scan.kernel(chosen, problem.backward)
    only = {} if problem.backward else {"bias": not all(derived.tied), "tape": problem.tape}
    meta = triton_scan.meta_arguments(
        derived, chosen, problem.hidden, precision, problem.backward,
        packed=packed, ragged=packed, resets=packed,
        projected=problem.hidden // 2 if problem.projected else None, **only,
    )  # fmt: skip
    stored = POINTERS[problem.dtype]
    computed = "*fp64" if problem.dtype == "float64" else "*fp32"
    types: dict[str, str] = dict.fromkeys(kernel.arg_names, stored)
    types |= dict.fromkeys(("carry", "unprojected", "s0", "ds"), computed)
    types |= {"first": "*i64", "length": "*i64", "resets": "*u8"}
    types |= dict.fromkeys(RUN_TIME, "i64")
    types |= dict.fromkeys(("steps", "begin", "end"), "i32") | dict.fromkeys(meta, "constexpr")
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
        options=triton_scan.compile_options(chosen, target.backend == "cuda"),
    )
    shared = made.metadata.shared
    if target.backend == "hip":
        return Report(problem, chosen, packed, shared, *_amd(made.asm["amdgcn"]))
    return Report(problem, chosen, packed, shared, *_nvidia(made.asm["cubin"]))


def _nvidia(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers, spills and instructions. Spills show in the stack and in STL, not in REG; a few
    registers that are put aside once, before the sweep, are none."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    spilled = max(int(found[2]) - _STACK, 0) + _in_loops(code, r"\b(STL|LDL)\b")
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)", code, re.M)
    counts = Counter(names)
    mix = {name: n for name, n in counts.items() if "MMA" in name or name in ("FFMA", "DFMA")}
    mix["all"] = len(names)
    return int(found[1]), spilled, mix


_STACK = 32  # bytes of a thread
_RELOADS = 2  # of a spilled register in a step, of a thousand instructions: the allocator's noise


def _in_loops(code: str, instruction: str) -> int:
    """How many lines between a label and a jump back to it have the instruction."""
    lines = code.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i) < i - 1:
            inside.update(range(labels[jump[1]], i))
    return sum(bool(re.search(instruction, lines[i])) for i in inside)


def _amd(assembly: str) -> tuple[int, int, dict[str, int]]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found, name
        return int(found[1])

    names = Counter(re.findall(r"^\s+(v_mfma|v_fmac?|ds_|global_)", assembly, re.M))
    return number("vgpr_count"), number("vgpr_spill_count"), dict(names)


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def problems(target: Target, full: bool) -> Iterator[tuple[plan.Problem, bool]]:
    """A problem for every kernel that the plan can choose, and whether it is packed, with resets;
    `full`: more cells, types and sizes."""
    some = {
        "lstm": {"bfloat16": (64, 128, 256), "float32": (64, 256)},
        "gru": {"bfloat16": (128,), "float32": (64,)},
    }
    if full:
        sizes = (1, 32, 64, 100, 128, 256, 512, 1000)
        some = {cell: dict.fromkeys(POINTERS, sizes) for cell in ("lstm", "gru", "rnn_tanh")}
    for cell, dtypes in some.items():
        made, seen = cells.get(cell), set()
        for dtype, sizes in dtypes.items():
            for hidden, batch, backward in itertools.product(sizes, (1, 64), (False, True)):
                problem = plan.Problem(
                    cell, 100, batch, 64, hidden, len(made.gates), len(made.states),
                    dtype=dtype, tape=True, backward=backward,
                )  # fmt: skip
                kernel = (dtype, hidden, backward, plan.choose(problem, target.device))
                if kernel not in seen:
                    seen.add(kernel)
                    yield problem, False
                    if hidden == 64 and (full or dtype == "bfloat16"):
                        yield problem, True


def verdict(target: Target, report: Report) -> str:
    if report.shared > target.shared_bytes:
        return f"needs {report.shared} bytes of shared memory, of {target.shared_bytes}"
    return f"spills ({report.spilled})" if report.spilled > _RELOADS else ""


def main(names: list[str], full: bool) -> int:
    bad = 0
    for target in TARGETS:
        if names and target.name not in names:
            continue
        print(target.name)
        for problem, packed in problems(target, full):
            report = compiled(target, problem, packed)
            wrong = verdict(target, report)
            bad += bool(wrong)
            print(f"  {report.row}  {wrong}", flush=True)
    return bad


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_kernels_fit_and_spill_nothing(target: Target) -> None:
    """In a process of its own, where Triton is not the interpreter that other tests need."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_triton_compile", target.name],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_what_a_batch_decides_is_no_constant_of_a_kernel() -> None:
    from fastrnn.triton_sweep import RUN_TIME

    if triton_scan.interpreted():
        pytest.skip("needs Triton's compiler")
    for backward, resident in itertools.product((False, True), repeat=2):
        kernel = triton_scan.kernel(plan.Plan("triton", resident=resident), backward)
        free = {p.name for p in kernel.params if p.do_not_specialize}
        assert free == set(RUN_TIME)
        constants = {p.name for p in kernel.params if p.is_constexpr}
        assert not constants & {"T", "B", "I", "P", *RUN_TIME}


if __name__ == "__main__":
    sys.exit(main([a for a in sys.argv[1:] if a != "--full"], "--full" in sys.argv) > 0)
