"""Triton's interpreter: a process uses it for all kernels or for none. Its plans and operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrnn import cells
from fastrnn.cells.noise import seeded
from fastrnn.kernels.gpu.triton import launch
from tests.support.operands import operands

INTERPRETED = launch.interpreted()


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")

TILES = {"batch_tile": 16, "matrix_units": True}
ONE_ROW = {"batch_tile": 1, "matrix_units": False}
WAYS = ("resident", "streamed")
LAYOUTS = ("dense", "lengths", "packed")


def residency(name: str, hidden: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of a plan, regardless of a device's own plan for so small a problem."""
    rows = TILES if batch > 1 and dtype != torch.float64 else ONE_ROW
    if name == "streamed":
        return {**rows, "resident": False, "unit_tile": 16, "depth_tile": 32}
    padded = max(16, 1 << (hidden - 1).bit_length())
    return {**rows, "resident": True, "unit_tile": padded, "depth_tile": padded}


def in_layout(
    layout: str,
    cell: cells.Cell,
    steps: int,
    batch: int,
    hidden: int,
    recurrences: int,
    projected: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor]:
    """Operands in a layout, the same for the reference, and flags of resets."""
    given = operands(cell, steps, batch, 4, hidden, recurrences, projected=projected)
    order = torch.randperm(batch) if layout == "packed" else None
    given["noise"] = seeded(cell.draws, given["x"], order) if cell.draws else None
    lengths = torch.randint(0, steps + 1, (batch,))
    lengths[torch.randint(0, batch, ())] = steps
    shape: tuple[int, ...] = (steps, batch)
    exact = given
    if layout == "lengths":
        given["lengths"] = lengths
        given["x"][torch.arange(steps)[:, None] >= lengths] = torch.nan  # must not be read
        exact = {**given, "x": given["x"].nan_to_num()}
    elif layout == "packed":
        lengths = lengths.clamp_min(1).sort(descending=True).values
        given["batch_sizes"] = (lengths > torch.arange(steps)[:, None]).sum(1)
        given["x"] = torch.randn(int(lengths.sum()), 4, dtype=torch.float64)
        shape = given["x"].shape[:1]
    return given, exact, torch.rand(shape) < 0.3
