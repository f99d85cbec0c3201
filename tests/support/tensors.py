"""Nested results, and input tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def flatten(value: Any) -> list[Tensor]:
    """All tensors of a nested result, in order; a packed sequence gives its data."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    if value is None:
        return []
    return [t for v in value for t in flatten(v)]


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor, and to the data of packed sequences."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))
    if value is None:
        return None
    return tuple(mapped(v, function) for v in value)


def sum_of(values: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor; the builtin's type would allow the number 0."""
    return cast(Tensor, sum(values))


def weights_like(y: Tensor) -> Tensor:
    """Random weights for a sum to which every element of `y` counts; equal in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)


def batches(lengths: Sequence[int], width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Sequences of those lengths with `width` features."""
    return [torch.randn(n, width, dtype=dtype) for n in lengths]
