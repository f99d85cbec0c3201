"""The machine code of the large tiles of products: registers hold all that their loops multiply.

A compiler that runs out of registers keeps weights in memory instead. Results are the same then,
and a tile takes 15 to 35 % longer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastrnn

LIBRARY = Path(fastrnn.__file__).with_name("libfastrnn_cpu.so")
TILES = re.compile(
    r"<.*\b(avx512\w*)::"
    r"(Forward<[^>]*>? ?.*(Plain<\w+>|Bfloat16)[ >]*::(tile<[456]>|project)"
    r"|(product|add_gradient_tile)<[456], [24], .*(Plain<\w+>|Bfloat16))"
)
MULTIPLY_ADD = re.compile(r"\b(vfn?m(add|sub)\w+p[sd]|vdpbf16ps)\s.*zmm")
FROM_STACK = re.compile(r"\(%r[bs]p\)")


def tiles() -> dict[str, list[str]]:
    """The multiply-adds of each large tile, by the line that names it."""
    program = shutil.which("objdump")
    if program is None:
        pytest.skip("there is no objdump")
    command = [program, "--disassemble", "--no-show-raw-insn", "--demangle", str(LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    functions = (text.partition("\n") for text in done.stdout.split("\n\n"))
    return {
        name: [line for line in body.splitlines() if MULTIPLY_ADD.search(line)]
        for name, _, body in functions
        if TILES.search(name)
    }


def test_no_multiply_add_of_a_large_tile_reads_the_stack() -> None:
    found = tiles()
    if not found:
        pytest.skip("the library has no code for AVX-512, or no symbols")
    assert all(found.values())
    spilled = {
        name: lines for name in found if (lines := list(filter(FROM_STACK.search, found[name])))
    }
    assert not spilled
