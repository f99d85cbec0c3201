"""The tolerance rule of `fastrnn.tools.tolerance`, as assertions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastrnn.tools.tolerance import FLOORS, largest_error, limit, rms_error

# The relative error of fewer numbers than this is luck, so several tensors share one rms.
ENOUGH = 64


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in floors, plans and ids of tests."""
    return str(dtype).removeprefix("torch.")


def assert_matches(
    ours: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    gradients: bool = False,
) -> None:
    """The tolerance rule: the error against the float64 reference `exact` is at most twice that of
    torch.nn in the same dtype plus a floor. It holds for the largest error and for the relative
    root mean square of every tensor; small tensors share one."""
    assert list(ours) == list(torchs) == list(exact)
    for what in ours:
        assert ours[what].shape == torchs[what].shape == exact[what].shape, what
        assert ours[what].dtype == torchs[what].dtype, what
        error, reference = (largest_error(r[what], exact[what]) for r in (ours, torchs))
        _limit(f"largest error of {what}", error, reference, ours[what].dtype, gradients)
    large = [[what] for what in exact if exact[what].numel() >= ENOUGH]
    for group in (*large, list(exact)):
        results = [[r[what] for what in group] for r in (ours, torchs, exact)]
        error, reference = (rms_error(r, results[2]) for r in results[:2])
        dtype = ours[group[0]].dtype
        _limit(f"rms error of {', '.join(group)}", error, reference, dtype, gradients)


def assert_near(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    precision: str,
) -> None:
    """The tolerance rule for values and gradients of a kernel that multiplies in this precision.
    `theirs` are the results of the reference in a dtype of as many digits."""
    assert ours.keys() == exact.keys()
    for what, right in exact.items():
        assert ours[what].dtype == dtype
        assert ours[what].shape == right.shape, what
        for error in (largest_error, lambda a, b: rms_error([a], [b])):
            most = limit(error(theirs[what], right), precision, gradients=True)
            assert error(ours[what], right) <= most, what  # also fails for NaN


def _limit(what: str, error: float, reference: float, dtype: torch.dtype, gradients: bool) -> None:
    precision = name_of(dtype)
    most = limit(reference, precision, gradients=gradients)
    # A NaN fails this comparison.
    assert error <= most, (
        f"{what}: {error:.3g} exceeds {most:.3g}, "
        f"twice torch.nn's {reference:.3g} plus {FLOORS[precision]}"
    )
