"""Quantised layers to test, and float copies of them with rounded weights."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.extension import _C
from fastrnn.tools import tolerance
from tests.support.shared import peepholes, staged
from tests.support.tensors import flatten

__all__ = [
    "CASES",
    "CHANGED",
    "FORMATS",
    "LIMITS",
    "SOME",
    "Case",
    "assert_equal",
    "assert_like",
    "by_hand",
    "format_of",
    "has_kernel",
    "in_int8",
    "saved",
]

CHANGED = "changed or replaced after"
FORMATS: list[dict[str, Any]] = [
    {"weights": "int8"},
    {"weights": "int8", "activations": "int16"},
    {"weights": "bfloat16"},
]
# Of h in float32 layers with torch's initial weights, where the kernel rounds activations too.
LIMITS = tolerance.FORMATS


class Case(NamedTuple):
    kind: str
    arguments: Mapping[str, Any] = MappingProxyType({})

    def layer(self, inputs: int = 7, hidden: int = 33, **more: Any) -> Any:
        arguments = {**self.arguments, **more}
        if self.kind == "Recurrent":
            return fastrnn.Recurrent(peepholes, inputs, hidden, **arguments)
        if self.kind == "Staged":
            return fastrnn.Recurrent(staged, inputs, hidden, **arguments)
        return getattr(fastrnn, self.kind)(inputs, hidden, **arguments)


CASES = [
    Case("RNN"),
    Case("RNN", {"nonlinearity": "relu", "bias": False}),
    Case("GRU", {"num_layers": 2, "bidirectional": True}),
    Case("LSTM", {"num_layers": 3, "batch_first": True}),
    Case("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 5}),
    Case("LSTM", {"heads": 3, "bidirectional": True}),
    Case("Recurrent", {"num_layers": 2}),
    Case("GRUResetBefore", {"num_layers": 2, "bidirectional": True}),
    Case("Staged", {"heads": 3}),
]
SOME = [CASES[1], CASES[2], CASES[4], CASES[5], CASES[8]]


def has_kernel(format: str) -> bool:
    return format in _C.formats()


def format_of(how: Mapping[str, str]) -> str:
    return how.get("activations", how["weights"])


def assert_like(ours: Any, theirs: Any, format: str = "int8") -> None:
    """Equality with float layers of rounded weights. Where the kernel rounds activations as well,
    h differs by up to LIMITS."""
    limit = LIMITS[format] if has_kernel(format) else 0.0
    for one, other in zip(flatten(ours), flatten(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=limit)


def assert_equal(ours: Any, theirs: Any) -> None:
    for one, other in zip(flatten(ours), flatten(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def in_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales, written out for one row at a time."""
    numbers, scales = torch.empty(matrix.shape), torch.empty(matrix.shape[:-1])
    for index in numpy.ndindex(*scales.shape):
        row = matrix[index].float()
        scales[index] = scale = row.abs().max() / 127 if row.any() else torch.tensor(1.0)
        numbers[index] = torch.round(row / scale)
    return numbers.to(torch.int8), scales


def by_hand(module: Any, weights: str = "int8") -> Any:
    """A float copy of a layer with rounded matrices."""
    other = copy.deepcopy(module).requires_grad_(False)
    for name, p in other.named_parameters():
        if not re.search("weight_(ih|hh|hr)", name):
            continue
        if weights == "bfloat16":
            p.copy_(p.bfloat16())
        else:
            numbers, scales = in_int8(p)
            p.copy_(numbers * scales.unsqueeze(-1))
    return other


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
