"""The machine code of compiled kernels: how many instructions the loop over time steps has.

A step takes a microsecond or less, so each of them counts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from building import cuda as building

__all__ = ["disassembled", "disassembler", "step_loop"]

INSTRUCTION = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<guard>@\S+\s+)?(?P<name>[\w.]+)(?P<rest>[^;]*);",
    re.MULTILINE,
)
PRODUCTS = ("HMMA.", "IMMA.", "QMMA.")
JUMPS = ("BRA", "CALL")  # a call may be a mere jump
ENDS = ("BRA", "EXIT", "RET")


@cache
def disassembler() -> str | None:
    """The path of cuobjdump, which calls the nvdisasm beside it. The toolkit has both, and so has
    Triton."""
    nvcc, triton = building.nvcc(), importlib.util.find_spec("triton")
    homes = (triton and triton.submodule_search_locations) or []
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    folders += [f"{home}/backends/nvidia/bin" for home in homes]
    for folder in [*folders, *os.get_exec_path()]:
        both = [shutil.which(name, path=folder) for name in ("cuobjdump", "nvdisasm")]
        if None not in both:
            return both[0]
    return None


def disassembled(binary: Path) -> dict[str, str]:
    """The text of each kernel in an object file, by its mangled name."""
    program = disassembler()
    assert program is not None, "there is no disassembler"
    path = os.pathsep.join([str(Path(program).parent), *os.get_exec_path()])
    environment = {**os.environ, "PATH": path}
    command = [program, "-sass", str(binary)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    parts = done.stdout.split("\t\tFunction : ")[1:]
    return {name: text for name, _, text in (part.partition("\n") for part in parts)}


def step_loop(text: str) -> int:
    """The number of instructions in the largest loop around a matrix product; 0 if there is none.

    They are those from which a way leads to the product and back, wherever they lie: the compiler
    moves what is rare behind the end of the kernel.
    """
    after, products = _flow(text)
    before = defaultdict(set)
    for one, others in after.items():
        for other in others:
            before[other].add(one)
    largest: set[int] = set()
    seen: set[int] = set()
    for product in products:
        if product not in seen:
            loop = _reached(after, after[product]) & _reached(before, before[product])
            seen |= loop
            largest = max(largest, loop, key=len)
    return len(largest)


def _flow(text: str) -> tuple[dict[int, set[int]], list[int]]:
    """The addresses to which control passes from each address, and those of matrix products."""
    code = list(INSTRUCTION.finditer(text))
    after: dict[int, set[int]] = {}
    meetings: dict[str, int] = {}  # of the threads that part at a BSSY, by its barrier
    for found, following in zip(code, [*code[1:], None], strict=True):
        at, name, kind = int(found["at"], 16), found["name"], found["name"].split(".")[0]
        operands = [part.strip() for part in found["rest"].split(",")]
        leads = {int(following["at"], 16)} if following else set()
        if kind == "BSSY":
            meetings[operands[0]] = int(operands[1], 16)
        elif kind == "BSYNC":
            leads = {meetings[operands[0]]}
        elif kind in ENDS and found["guard"] is None and len(operands) == 1:
            leads = set()
        if kind in JUMPS or name == "WARPSYNC.COLLECTIVE":
            leads.add(int(operands[-1], 16))
        after[at] = leads
    return after, [int(found["at"], 16) for found in code if found["name"].startswith(PRODUCTS)]


def _reached(leads: Mapping[int, set[int]], begin: Iterable[int]) -> set[int]:
    """All that can be reached from some addresses, these included."""
    found: set[int] = set()
    left = list(begin)
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += leads[one]
    return found
