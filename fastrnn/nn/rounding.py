"""Rounds matrices of weights to int8 or bfloat16, restores them, and packs them for the CPU kernel.

int8 has one scale for each row (output channel): the row is about `scale * numbers`, and the
largest number of a row is 127 or -127. All numbers are public in a `state_dict`, so they are in
torch's order and not in the kernel's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn import ops
from fastrnn.cells import Cell
from fastrnn.extension import _C
from fastrnn.kernels.operands import Weights

__all__ = [
    "Precision",
    "Quantised",
    "Scales",
    "has_kernel",
    "pack",
    "quantised",
    "restored",
    "scales_of",
    "to_floats",
]

Scales = tuple[Tensor, Tensor, Tensor | None]


class Precision(NamedTuple):
    """How a layer is quantised.

    Attributes:
        weights: "int8" or "bfloat16".
        format: that of the kernel: "int8", "int16" (int8 weights, activations of two digits) or
            "bfloat16".
        keep_float: whether the layer holds the matrices in floats, and rounds them for the kernel
            only. Otherwise it holds them rounded.
        dtype: that of input, biases and results.
    """

    weights: str
    format: str
    keep_float: bool
    dtype: torch.dtype


class Quantised(NamedTuple):
    """The weights of one recurrence.

    Attributes:
        weights: matrices in int8 or bfloat16, biases in the layer's dtype.
        scales: float32 [rows] for `w_ih`, `w_hh` and `w_hr` in int8; none in bfloat16.
    """

    weights: Weights
    scales: Scales | tuple[()] = ()


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` [*, rows, columns] in int8, and its scales [*, rows] in float32."""
    values = matrix.detach().float()
    scale = values.abs().amax(-1) / 127 if values.size(-1) else values.new_zeros(values.shape[:-1])
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale


def restored(matrix: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The floats for a matrix in int8 with its scale, or for one in bfloat16."""
    return matrix.to(dtype) if scale is None else (matrix.float() * scale.unsqueeze(-1)).to(dtype)


def to_floats(recurrence: Quantised, dtype: torch.dtype) -> Weights:
    """The weights of one recurrence, with matrices in `dtype`."""
    weights = recurrence.weights
    of_ih, of_hh, of_hr = recurrence.scales or (None, None, None)
    return weights._replace(
        w_ih=restored(weights.w_ih, of_ih, dtype),
        w_hh=restored(weights.w_hh, of_hh, dtype),
        w_hr=None if weights.w_hr is None else restored(weights.w_hr, of_hr, dtype),
    )


def scales_of(recurrence: Quantised) -> ops.Scales:
    """The scales of the matrices that there are; none in bfloat16."""
    return tuple(scale for scale in recurrence.scales if scale is not None)


def has_kernel(precision: Precision) -> bool:
    """Whether the extension computes in this format on this processor. If it does not, the kernel
    for floats runs with restored weights."""
    return precision.format in _C.formats() and precision.dtype != torch.float64


def pack(cell: Cell, layer: Sequence[Quantised], precision: Precision) -> ops.Prepacked | None:
    """Prepack the recurrences of one layer; None if the CPU kernel would not run it."""
    if not has_kernel(precision):
        return ops.pack(cell, [to_floats(recurrence, precision.dtype) for recurrence in layer])
    weights = [recurrence.weights for recurrence in layer]
    scales = [scales_of(recurrence) for recurrence in layer]
    return ops.pack(cell, weights, precision.format, scales, precision.dtype)
