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
        assert ours[what].dtype == torchs[what].dtype, what
    precisions = {what: name_of(value.dtype) for what, value in ours.items()}
    _check(ours, torchs, exact, precisions, gradients)


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
    assert all(value.dtype == dtype for value in ours.values())
    _check(ours, theirs, exact, dict.fromkeys(exact, precision), gradients=True)


def _check(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    precisions: Mapping[str, str],
    gradients: bool,
) -> None:
    for what in exact:
        assert ours[what].shape == theirs[what].shape == exact[what].shape, what
        error, reference = (largest_error(r[what], exact[what]) for r in (ours, theirs))
        _limit(f"largest error of {what}", error, reference, precisions[what], gradients)
    large = [[what] for what in exact if exact[what].numel() >= ENOUGH]
    for group in (*large, list(exact)):
        results = [[r[what] for what in group] for r in (ours, theirs, exact)]
        error, reference = (rms_error(r, results[2]) for r in results[:2])
        names = ", ".join(group)
        _limit(f"rms error of {names}", error, reference, precisions[group[0]], gradients)


def _limit(what: str, error: float, reference: float, precision: str, gradients: bool) -> None:
    most = limit(reference, precision, gradients=gradients)
    # A NaN fails this comparison.
    assert error <= most, (
        f"{what}: {error:.3g} exceeds {most:.3g}, twice the {reference:.3g} of the other plus "
        f"{FLOORS[precision]}"
    )
