"""Compiles the CUDA kernels for their GPUs, without a GPU. No register may spill, ptxas may give no
warning, and a step may take no more instructions than it did.

The tests compile for the oldest GPUs and Hopper, with a cell of each number of gates. Each target,
cell and precision is in COVERING at least once; FASTRNN_TESTS=all compiles their whole product.
`python -m tests.csrc.cuda.test_compile [sm_90a ...]` compiles all cells, for all targets or the
named ones, and prints their needs. `--save` writes the table to benchmarks/results/cuda-compile.md.
Objects are in build/cuda-compile and are compiled again only if their sources change.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from building import cuda as building
from building import ninja

from fastrnn import cells
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import derive
from fastrnn.kernels.gpu import cuda
from tests.csrc.cuda.machine_code import disassembled, disassembler, step_loop
from tests.support.paths import ROOT
from tests.support.selection import ALL_TESTS
from tests.support.simulated import only

pytestmark = pytest.mark.compiles

FOLDER = ROOT / "build" / "cuda-compile"  # it has a folder for each selection of cells
RESULTS = ROOT / "benchmarks" / "results" / "cuda-compile.md"
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100f", "sm_120"]
SECONDS = 900
NINJA_FILE = """\
rule nvcc
  command = {nvcc} --generate-dependencies-with-compile --dependency-output $out.d {flags} $
    -Xptxas -v,-warn-spills,-Werror -gencode=arch=$virtual,code=$target -c $in -o $out $
    > $out.log 2>&1 || {{ cat $out.log; exit 1; }}
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = {nvcc} -shared -cudart static -Xlinker --exclude-libs,ALL $in -o $out
  description = $out
{builds}
"""


SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
needs_nvcc = pytest.mark.skipif(
    building.nvcc() is None and "CI" not in os.environ, reason="needs nvcc"
)


@dataclass(frozen=True)
class Selection:
    """The kernels of these cells in these precisions."""

    cells: tuple[str, ...]
    precisions: tuple[str, ...] = tuple(cuda.PRECISIONS)

    @property
    def folder(self) -> Path:
        some = self.precisions if len(self.precisions) < len(cuda.PRECISIONS) else ()
        return FOLDER / "-".join(self.cells + some)

    def log(self, target: str, source: Path) -> Path:
        return self.folder / target / f"{ninja.object_of(source)}.log"


ALL = Selection(("rnn_tanh", "rnn_relu", "lstm", "gru"))
SOME = Selection(("rnn_tanh", "lstm", "gru"))
# The most gates need the most registers, and so do products in three parts.
COVERING = {
    "sm_80": Selection(("lstm",), ("float64", "tf32", "tf32x3", "float16")),
    "sm_90a": Selection(("rnn_tanh", "gru"), ("float32", "bfloat16")),
}
TESTED = dict.fromkeys(COVERING, SOME) if ALL_TESTS else COVERING
LOADED = TESTED["sm_90a"]

# Instructions in the loop over time steps of persistent kernels with the smallest row groups, for
# batch tiles of 8, 16 and 32 rows. They may grow by ROOM.
ROOM = 1.03
STEPS = {
    ("sm_80", "forward_block", "Lstm", "float16"): (514, 839, 1482),
    ("sm_80", "forward_grid", "Lstm", "float16"): (647, 954, 1660),
    ("sm_80", "backward_block", "Lstm", "float16"): (1139, 1256, 1354),
    ("sm_80", "backward_grid", "Lstm", "float16"): (1561, 1675, 1681),
    ("sm_90a", "forward_block", "Gru", "bfloat16"): (566, 894, 1620),
    ("sm_90a", "forward_cluster", "Gru", "bfloat16"): (646, 1020, 1880),
    ("sm_90a", "forward_grid", "Gru", "bfloat16"): (733, 1153, 1937),
    ("sm_90a", "backward_block", "Gru", "bfloat16"): (1001, 1106, 1159),
    ("sm_90a", "backward_cluster", "Gru", "bfloat16"): (1339, 1400, 1459),
    ("sm_90a", "backward_grid", "Gru", "bfloat16"): (1554, 1706, 1745),
}


def make(selection: Selection, *outputs: str) -> subprocess.CompletedProcess[str]:
    """Compiles and links the files that are not up to date; goes on after a failure. One process
    at a time does so."""
    folder = selection.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _make(selection, *outputs)


def _make(selection: Selection, *outputs: str) -> subprocess.CompletedProcess[str]:
    folder = selection.folder
    builds = []
    for target in TARGETS:
        virtual = target.replace("sm", "compute")
        for source in SOURCES:
            builds.append(
                f"build {target}/{ninja.object_of(source)}: nvcc {ninja.escape(source)}\n"
                f"  target = {target}\n  virtual = {virtual}"
            )
        objects = " ".join(f"{target}/{ninja.object_of(source)}" for source in SOURCES)
        builds.append(f"build {target}/_cuda.so: link {objects}")
    nvcc = building.nvcc()
    assert nvcc is not None, "there is no nvcc"
    text = NINJA_FILE.format(
        nvcc=ninja.quote(nvcc),
        flags=" ".join([*building.flags_of(folder), only(selection.precisions)]),
        builds="\n".join(builds),
    )
    (folder / "build.ninja").write_text(text)
    header = emit_cpp.header([derive(cells.get(name)) for name in selection.cells])
    there = folder / "cells.gen.h"
    if not there.exists() or there.read_text() != header:
        there.write_text(header)
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-k", "0"]
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    return subprocess.run(
        [*command, *jobs, *outputs], capture_output=True, text=True, timeout=SECONDS
    )


@dataclass(frozen=True)
class Kernel:
    """Facts from ptxas: registers of a thread; bytes of static shared memory, stack and spills."""

    mangled: str
    name: str
    registers: int
    shared: int
    stack: int
    spilled: int


def kernels(selection: Selection, target: str, source: Path) -> list[Kernel]:
    """The kernels of a source, from the log of its last compilation."""
    log = selection.log(target, source).read_text()
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers", part)
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        assert used and stack, part
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Kernel(
                mangled=part.split("'")[0],
                name=_plain(part.split("'")[0]),
                registers=int(used[1]),
                shared=int(shared[1]) if shared else 0,
                stack=int(stack[1]),
                spilled=int(stack[2]) + int(stack[3]),
            )
        )
    return found


@cache
def _plain(mangled: str) -> str:
    """The last of the nested names in a mangled name, such as `persistent_forward`."""
    names, rest = [], mangled.removeprefix("_Z").removeprefix("N")
    while length := re.match(r"\d+", rest):
        begin, size = length.end(), int(length[0])
        names.append(rest[begin : begin + size])
        rest = rest[begin + size :]
    return names[-1] if names else mangled


@dataclass(frozen=True)
class Instance:
    """The template arguments of a persistent kernel."""

    cell: str  # the name of its struct
    precision: int
    row_group: int  # in units of Traits
    batch_tile: int

    @staticmethod
    def parse(mangled: str) -> Instance | None:
        found = re.search(
            r"6TraitsINS_4cuda\d+(\w+?)ELNS_9PrecisionE(\d)ELi(\d+)ELi(\d+)E", mangled
        )
        return found and Instance(found[1], int(found[2]), int(found[3]), 8 * int(found[4]))


def step_loops(selection: Selection, target: str, source: Path) -> dict[str, int]:
    """The instructions of a time step in each persistent kernel of a source, by mangled name."""
    if source.parent.name != "persistent":
        return {}
    binary = selection.log(target, source).with_suffix("")
    # A kernel that does nothing on this GPU has no loop.
    loops = {name: step_loop(text) for name, text in disassembled(binary).items()}
    return {name: size for name, size in loops.items() if size}


def smallest(loops: Mapping[str, int], cell: str, precision: str) -> list[int]:
    """The loops of the kernels of a cell with the smallest row groups, by batch tile."""
    wanted: dict[int, tuple[int, int]] = {}
    for name, size in loops.items():
        one = Instance.parse(name)
        if one and (one.cell, one.precision) == (cell, cuda.PRECISIONS[precision]):
            tile = one.batch_tile
            wanted[tile] = min((one.row_group, size), wanted.get(tile, (999, 0)))
    return [wanted[tile][1] for tile in sorted(wanted)]


def seconds(selection: Selection, target: str, source: Path) -> float:
    """Seconds of its last compilation."""
    taken = 0.0
    for line in (selection.folder / ".ninja_log").read_text().splitlines()[1:]:
        begin, end, _, output, _ = line.split("\t")
        if output == f"{target}/{ninja.object_of(source)}":
            taken = (int(end) - int(begin)) / 1000
    return taken


def table(selection: Selection, targets: list[str]) -> str:
    """One row for every template of a kernel, with the maxima over its instances."""
    lines = [
        "| file | kernel | GPU | compiled for | registers | step | shared memory | stack | spilled "
        "| file took |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for source in SOURCES:
        for target in targets:
            if not selection.log(target, source).with_suffix("").exists():
                lines.append(f"| {source.name} | | {target} | *is not compiled* | | | | | | |")
                continue
            made = kernels(selection, target, source)
            loops = step_loops(selection, target, source)
            took = f"{seconds(selection, target, source):.0f} s"
            for name in sorted({kernel.name for kernel in made}):
                same = [kernel for kernel in made if kernel.name == name]
                registers = sorted(kernel.registers for kernel in same)
                steps = sorted(loops[k.mangled] for k in same if k.mangled in loops)
                lines.append(
                    f"| {source.name} | {name} | {target} | {len(same)} | "
                    f"{registers[0]}–{registers[-1]} | "
                    f"{f'{steps[0]}–{steps[-1]}' if steps else ''} | "
                    f"{max(k.shared for k in same)} | {max(k.stack for k in same)} | "
                    f"{max(k.spilled for k in same)} | {took} |"
                )
    return "\n".join(lines)


def test_the_selection_covers_each_cell_and_precision() -> None:
    assert set(SOME.cells) == {cell for some in COVERING.values() for cell in some.cells}
    assert set(SOME.precisions) == {name for some in COVERING.values() for name in some.precisions}


@needs_nvcc
@pytest.mark.timeout(SECONDS)
@pytest.mark.takes(70)
@pytest.mark.parametrize("target", TESTED)
def test_kernels_compile_and_spill_nothing(target: str) -> None:
    selection = TESTED[target]
    done = make(selection, *(f"{target}/{ninja.object_of(source)}" for source in SOURCES))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    made = [kernel for source in SOURCES for kernel in kernels(selection, target, source)]
    assert {kernel.name for kernel in made} >= {"persistent_forward", "persistent_backward"}
    for kernel in made:
        assert kernel.spilled == 0, kernel
        assert kernel.stack == 0, kernel


@needs_nvcc
@pytest.mark.timeout(SECONDS)
@pytest.mark.takes(20)
@pytest.mark.skipif(
    disassembler() is None and "CI" not in os.environ, reason="needs cuobjdump and nvdisasm"
)
@pytest.mark.parametrize(("target", "name", "cell", "precision"), STEPS)
def test_a_step_takes_no_more_instructions(
    target: str, name: str, cell: str, precision: str
) -> None:
    selection, source = TESTED[target], ROOT / "csrc" / "cuda" / "persistent" / f"{name}.cu"
    done = make(selection, f"{target}/{ninja.object_of(source)}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = smallest(step_loops(selection, target, source), cell, precision)
    limits = STEPS[target, name, cell, precision]
    assert len(found) == len(limits)
    for size, limit in zip(found, limits, strict=True):
        assert 0 < size <= ROOM * limit, (found, limits)


@needs_nvcc
@pytest.mark.timeout(SECONDS)
def test_the_library_loads_where_no_gpu_is() -> None:
    """Runs in a process of its own that sees no GPU."""
    done = make(LOADED, "sm_90a/_cuda.so")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    library = LOADED.folder / "sm_90a" / "_cuda.so"
    script = f"""
from fastrnn.kernels.gpu import cuda
from fastrnn.kernels.gpu.cuda import CudaPlan, Sweep
found = cuda.Library({str(library)!r})
assert not found.simulated
assert found.cells == {LOADED.cells!r}, found.cells
assert found.resident_clusters(8, 256, 1 << 16) == 0
assert "(error" in found.usable()
sweep = Sweep(steps=3, batch=2, hidden=8, recurrences=1, end=3)
for residency in range(4):
    for precision in range(6):
        plan = CudaPlan(precision=precision, residency=residency, batch_tile=8, blocks=1, warps=8)
        for kind in ("forward", "backward", "h_prev", "recompute"):
            found.workspace_bytes({LOADED.cells[-1]!r}, sweep, plan, kind == "backward")
            try:
                found.launch(kind, {LOADED.cells[-1]!r}.encode(), sweep, plan, None)
            except RuntimeError as error:
                assert "error" in str(error) and "no text" not in str(error), error
            else:
                raise AssertionError(f"ran where no GPU is: {{precision}} {{residency}}")
try:
    found.launch("forward", b"no such cell", sweep, CudaPlan(), None)
except RuntimeError as error:
    assert "invalid argument" in str(error), error
else:
    raise AssertionError("ran a cell that it does not know")
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    environment.pop("FASTRNN_CUDA_LIBRARY", None)
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_nvcc
@pytest.mark.timeout(SECONDS)
def test_the_library_keeps_to_itself() -> None:
    """It exports only its C interface, and links neither torch nor the CUDA runtime."""
    done = make(LOADED, "sm_90a/_cuda.so")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    library = str(LOADED.folder / "sm_90a" / "_cuda.so")
    if shutil.which("nm") is None or shutil.which("ldd") is None:
        pytest.skip("needs nm and ldd")

    def says(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    exported = {line.split()[-1] for line in says("nm", "-D", "--defined-only", library).split("\n")
                if line}  # fmt: skip
    contract = (ROOT / "csrc/cuda/contract.h").read_text()
    declared = set(re.findall(r"\b(fastrnn_cuda_\w+)\(", contract))
    assert exported == declared
    assert not re.search(r"torch|c10|libcud", says("ldd", library))
    assert isinstance(ctypes.CDLL(library), ctypes.CDLL)
    assert isinstance(cuda.Library(library), cuda.Library)


def main(arguments: list[str]) -> int:
    targets = [name for name in arguments if name != "--save"] or TARGETS
    unknown = set(targets) - set(TARGETS)
    if unknown:
        print(f"no target {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
        return 2
    # One call per source, because each call has a time limit.
    objects = [ninja.object_of(source) for source in SOURCES]
    done = [make(ALL, *(f"{target}/{each}" for each in objects)) for target in targets]
    text = table(ALL, targets)
    print(*(each.stdout[-5000:] for each in done if each.returncode), text, sep="\n")
    if "--save" in arguments:
        nvcc = str(building.nvcc())
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release ([\d.]+, V[\d.]+)", version)
        head = (
            "# What the CUDA kernels need\n\n`python -m tests.csrc.cuda.test_compile --save`, nvcc "
            f"{release[1] if release else ''}. Of all instances of a kernel the fewest and most "
            "registers of a thread and instructions of a time step, and the largest of the others, "
            "in bytes.\n\n"
        )
        RESULTS.write_text(head + text + "\n")
    return max(each.returncode for each in done)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
