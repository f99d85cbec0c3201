"""The dtypes that kernels run: their names and sizes."""

from __future__ import annotations

__all__ = ["BYTES", "NAMES", "computed_bytes", "unsupported"]

# Bytes of a number as stored. In float32 the 16-bit types are computed, too.
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Names by those that C++ has for them.
NAMES = {"Float": "float32", "Double": "float64", "BFloat16": "bfloat16", "Half": "float16"}


def computed_bytes(dtype: str) -> int:
    """Bytes of a number as computed."""
    return 8 if dtype == "float64" else 4


def unsupported(dtype: str) -> str | None:
    """Why no kernel but the reference runs that dtype, or None."""
    return None if dtype in BYTES else f"it computes {', '.join(BYTES)}, not {dtype}"
