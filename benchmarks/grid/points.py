"""The points of the grid, the case of each, and the points that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.tools.bench.comparison import TORCH
from fastrnn.tools.bench.implementation import Case, TorchLayer
from fastrnn.tools.bench.workload import CELLS, Workload

KINDS = (*CELLS, *(f"{cell}_cell" for cell in CELLS))
MODES = ("inference", "training")
CELL_STEPS = 4  # calls of a cell in a row
MOST_WORK = 20e9  # floating-point operations of a call


def title(kind: str) -> str:
    """The name of a kind's class."""
    cell = kind.removesuffix("_cell")
    return cell.upper() + "Cell" * (kind != cell)


@dataclass(frozen=True)
class Sizes:
    """The numbers of steps T, of rows B and of units H. The input is as wide as the layer."""

    steps: tuple[int, ...]
    batches: tuple[int, ...]
    hidden: tuple[int, ...]


ALL = Sizes((1, 2, 4, 16, 64), (1, 2, 4, 8, 16, 32, 128), (16, 64, 256, 512, 1024))
QUICK = Sizes((1, 16), (1, 16), (16, 256))


@dataclass(frozen=True)
class Point:
    """One layer or cell at one size.

    Attributes:
        kind: one of `KINDS`.
        mode: one of `MODES`.
    """

    kind: str
    mode: str
    steps: int
    batch: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.mode}-T{self.steps}-B{self.batch}-H{self.hidden}"

    @property
    def cell(self) -> str:
        return self.kind.removesuffix("_cell")

    @property
    def title(self) -> str:
        return f"{title(self.kind)}, {self.mode}, ({self.steps}, {self.batch}, {self.hidden})"

    @property
    def workload(self) -> Workload:
        return Workload(self.name, self.steps, self.batch, self.hidden, self.hidden)

    @property
    def work(self) -> int:
        """Floating-point operations of the matrix products of a call."""
        return self.workload.flops(self.cell, self.mode)

    def case(self, threads: int) -> Case:
        case = Case.build(self.workload, self.cell, self.mode, threads)
        if self.kind == self.cell:
            return case
        module = Case.build(self.workload, self.cell, "cell", threads).module
        return replace(case, module=Loop(module), gradient=case.gradient[-1])


class Loop(nn.Module):
    """A cell, called once for each step. The output is the last state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        state: Any = None
        for row in x.unbind():
            state = self.cell(row, state)
        return (state[0] if isinstance(state, tuple) else state), state


def _ours(module: nn.Module) -> nn.Module:
    if isinstance(module, Loop):
        return Loop(fastrnn.from_torch(module.cell))
    return fastrnn.from_torch(module)


OURS = TorchLayer("fastrnn", _ours, inference=torch.no_grad)
THEIRS = TorchLayer(TORCH, inference=torch.no_grad)


def points(
    kinds: Sequence[str] = KINDS, modes: Sequence[str] = MODES, sizes: Sizes = ALL
) -> list[Point]:
    """All points of these kinds, modes and sizes, those that are left out included."""
    return [
        Point(kind, mode, steps, batch, hidden)
        for kind in kinds
        for mode in modes
        for hidden in sizes.hidden
        for steps in ((CELL_STEPS,) if kind.endswith("_cell") else sizes.steps)
        for batch in sizes.batches
    ]


def is_left_out(point: Point) -> bool:
    """Whether a call has more work than `MOST_WORK`: the grid would take too long with it."""
    return point.work > MOST_WORK
