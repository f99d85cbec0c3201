"""Nested results, and tensors to feed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def flatten(value: Any) -> list[Tensor]:
    """All tensors of a nested result, in order; of a packed sequence the data."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    if value is None:
        return []
    return [t for v in value for t in flatten(v)]


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` of every tensor in it; of a packed sequence, of its data."""
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
    """Random weights for a sum that every element of `y` matters in; the same for each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)


def batches(lengths: Sequence[int], width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Sequences of those lengths with `width` features."""
    return [torch.randn(n, width, dtype=dtype) for n in lengths]
