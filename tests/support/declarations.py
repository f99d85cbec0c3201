"""Cells that tests declare in several forms, and a step of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastrnn
from fastrnn.cells import Cell

__all__ = ["gated", "leaky", "scaled", "step", "with_params", "with_rows"]


def leaky(u: Any, v: Any, h: Tensor, rate: float = 0.5) -> Tensor:
    return rate * h + torch.tanh(u.a + v.a)


def gated(u: Any, v: Any, h: Tensor) -> Tensor:
    return torch.sigmoid(u.a) * h + torch.tanh(v.b)


def with_rows(name: str = "with_rows", **rows: Any) -> Cell:
    return fastrnn.cell(gates="ab", states="h", name=name, **rows)(gated)


def scaled(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    return p.rate * h + u.a


def with_params(name: str = "learning", **params: Any) -> Cell:
    return fastrnn.cell(gates="a", states="h", name=name, params=params)(scaled)


def step(cell: Cell, value: float = 0.25) -> Tensor:
    """State 0 after a step of two units, in which all numbers are `value`."""
    x = torch.full((1, 2), value)
    return cell.step([x] * len(cell.gates), [x] * len(cell.gates), [x] * len(cell.states))[0]
