"""Every Triton kernel that the plan can choose is compiled for the GPUs it is meant for, without
one: it must fit into shared memory and spill no registers.

`python -m tests.test_triton_compile` prints what each needs: registers, shared memory, the matrix
instructions in it and the size of its code.
"""

from __future__ import annotations

import importlib.util
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
        return plan.Device(
            kind="cuda", triton=None, shared_bytes=self.shared_bytes, warp=self.warp
        )


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
            f"{way:18} warps {q.warps:2}  shared {self.shared:6}  registers {self.registers:3}  "
            f"spilled {self.spilled}  {mix}"
        )


def compiled(target: Target, problem: plan.Problem, packed: bool = False) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastrnn import triton_sweep

    derived = codegen.derive(cells.get(problem.cell))
    chosen = plan.choose(problem, target.device)
    assert chosen.kernel == "triton"
    precision = triton_scan.precision(getattr(torch, problem.dtype), target.backend == "cuda")
    direction = "backward" if problem.backward else "forward"
    kernel = getattr(
        triton_sweep, f"{direction}_{'resident' if chosen.resident else 'streamed'}"
    )
    only = {} if problem.backward else {"bias": not all(derived.tied), "tape": problem.tape}
    meta = triton_scan.meta_arguments(
        derived, chosen, problem.hidden, precision, problem.backward,
        packed=packed, ragged=packed, resets=packed, **only,
    )  # fmt: skip
    stored = POINTERS[problem.dtype]
    computed = "*fp64" if problem.dtype == "float64" else "*fp32"
    types: dict[str, str] = dict.fromkeys(kernel.arg_names, stored)
    types |= dict.fromkeys(("carry", "s0", "ds"), computed)
    types |= {"first": "*i64", "length": "*i64", "resets": "*u8"}
    types |= dict.fromkeys(triton_sweep._RUN_TIME, "i64")
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
        options={
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
            "enable_fp_fusion": True,
        },
    )
    shared = made.metadata.shared
    if target.backend == "hip":
        return Report(problem, chosen, shared, *_amd(made.asm["amdgcn"]))
    return Report(problem, chosen, shared, *_nvidia(made.asm["cubin"]))


def _nvidia(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers, spills and instructions. Spills show in the stack and in STL, not in REG."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)", code, re.M)
    counts = Counter(names)
    mix = {name: n for name, n in counts.items() if "MMA" in name or name in ("FFMA", "DFMA")}
    mix["all"] = len(names)
    return int(found[1]), max(int(found[2]), counts["STL"]), mix


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


def problems(full: bool) -> Iterator[plan.Problem]:
    """A problem for every kernel the plan can choose; `full`: more sizes and cells."""
    dtypes = ["bfloat16", "float32"]
    sizes = [64, 128, 256]
    for cell in ["lstm", "gru", "rnn_tanh"] if full else ["lstm", "gru"]:
        made = cells.get(cell)
        for dtype in [*dtypes, "float64", "float16"] if full else dtypes:
            for hidden in [16, 32, *sizes, 100, 512, 1000] if full else sizes:
                for batch in (1, 64):
                    for backward in (False, True):
                        yield plan.Problem(
                            cell, 100, batch, 64, hidden, len(made.gates), len(made.states),
                            dtype=dtype, tape=True, backward=backward,
                        )  # fmt: skip


def verdict(target: Target, report: Report) -> str:
    if report.shared > target.shared_bytes:
        return f"needs {report.shared} bytes of shared memory, of {target.shared_bytes}"
    return f"spills ({report.spilled})" if report.spilled else ""


def main(names: list[str], full: bool) -> int:
    bad = 0
    for target in TARGETS:
        if names and target.name not in names:
            continue
        print(target.name)
        for problem in problems(full):
            report = compiled(target, problem)
            wrong = verdict(target, report)
            bad += bool(wrong)
            print(f"  {report.row}  {wrong}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main([a for a in sys.argv[1:] if a != "--full"], "--full" in sys.argv) > 0)
