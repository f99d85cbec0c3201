"""Compiler flags of the CPU kernels, at build time for `setup.py` and at run time for `jit`.

A custom cell is compiled like the built-in cells, for the same instruction set: it gives the same
numbers, and its library runs wherever that instruction set is in use.
"""

from __future__ import annotations

__all__ = ["CXX", "ISA", "OPTIMISED", "shared_with"]

OPTIMISED = "-O3 -g0 -DNDEBUG"
CXX = "-fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math"
# Flags by instruction set. All but "baseline" belong to x86-64.
ISA = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512",
}
# "avx512" and the instructions for products of int8 and bfloat16. The macro says that the kernels
# use them: a compiler may be told to know them, by -march=native, for another instruction set.
ISA["avx512_vnni"] = ISA["avx512"] + " -mavx512vnni -mavx512bf16 -DFASTRNN_VNNI"


def shared_with(isa: str, format: str) -> str:
    """The instruction set from whose code in the library a custom cell in a format takes what all
    cells share; `isa` is the one in use. In floats, "avx512_vnni" has nothing of its own."""
    return "avx512" if isa == "avx512_vnni" and format in ("float32", "float64") else isa
