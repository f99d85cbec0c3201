# What csrc/ops.cpp shows to Python.

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

built_for: str

def scan(
    cell: str,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    s0: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: int,
) -> tuple[Tensor, list[Tensor]]: ...
def step(
    cell: str, input: Tensor, before: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...] | None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def vector_bytes() -> int: ...
def forget_plans() -> None: ...
def load_cells(path: str, symbol: str) -> None: ...
def cell_facts(name: str) -> tuple[int, int, int] | Any: ...  # None for an unknown cell
def set_callbacks(
    plan: Callable[..., Any],
    find: Callable[[str], None],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    differentiable_backward: Callable[..., Any],
) -> None: ...
