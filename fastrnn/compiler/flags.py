"""How the C++ of the CPU kernels is compiled, at build time by `setup.py` and at run time by `jit`.

A custom cell is compiled as the cells of the package are, for the same instruction set: it gives
the same numbers, and its library runs wherever that instruction set is in use.
"""

from __future__ import annotations

__all__ = ["CXX", "ISA", "OPTIMISED"]

OPTIMISED = "-O3 -g0 -DNDEBUG"
CXX = "-fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math"
# Instruction set -> its flags; those of x86-64 but for the first.
ISA = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512",
}
