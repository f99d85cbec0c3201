"""The tolerance rule: how far a result may be from a float64 reference.

The error of a result is at most twice that of torch.nn in the same dtype, plus a floor. The
benchmark, the self-check and the tests all judge by this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FLOORS", "FORMATS", "Floor", "largest_error", "limit", "rms_error"]


@dataclass(frozen=True)
class Floor:
    """The error that is always allowed, for values and for gradients."""

    values: float
    gradients: float


_FLOAT32 = Floor(1e-6, 5e-6)
_FLOAT16 = Floor(5e-4, 2e-3)
# The names say how numbers are stored and multiplied. TF32 has as many digits as float16, and three
# TF32 parts together have as many as float32.
FLOORS = {
    "float64": Floor(1e-13, 1e-12),
    "float32": _FLOAT32,
    "tf32": _FLOAT16,
    "tf32x3": _FLOAT32,
    "bfloat16": Floor(2e-3, 1e-2),
    "float16": _FLOAT16,
}

# The largest error of a quantised layer, by the format of its activations, if its weights are those
# of torch's initialisation.
FORMATS = {"int8": 2e-2, "int16": 1e-2, "bfloat16": 8e-3}


def limit(theirs: float, precision: str, *, gradients: bool = False) -> float:
    """The largest error that a result may have if the error of torch.nn is `theirs`."""
    floor = FLOORS[precision]
    return 2 * theirs + (floor.gradients if gradients else floor.values)


def largest_error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute error, relative to the largest exact value if that exceeds one.

    If there is a NaN, the error is NaN.
    """
    if not exact.numel():
        return 0.0
    exact = exact.detach().double().cpu()
    difference = (result.detach().double().cpu() - exact).abs().amax()
    return (difference / exact.abs().amax().clamp_min(1)).item()


def rms_error(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The root mean square of all errors, relative to that of the exact values.

    If there is a NaN, the error is NaN.
    """
    expected = torch.cat([t.detach().double().cpu().flatten() for t in exact])
    if not expected.numel():
        return 0.0
    actual = torch.cat([t.detach().double().cpu().flatten() for t in result])
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
