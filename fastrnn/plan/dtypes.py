"""The dtypes that kernels run: their names and sizes."""

from __future__ import annotations

__all__ = ["BYTES", "NAMES", "computed_bytes", "unsupported"]

# Bytes of a stored number. The 16-bit types are computed in float32.
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# The names in Python, by the names in C++.
NAMES = {"Float": "float32", "Double": "float64", "BFloat16": "bfloat16", "Half": "float16"}


def computed_bytes(dtype: str) -> int:
    """Bytes of a number in computation."""
    return 8 if dtype == "float64" else 4


def unsupported(dtype: str) -> str | None:
    """Why only the reference runs this dtype, or None."""
    return None if dtype in BYTES else f"it computes {', '.join(BYTES)}, not {dtype}"
