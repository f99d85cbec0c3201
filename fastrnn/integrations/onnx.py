"""Prepares programs of `torch.export` for ONNX, which has no node for `fastrnn.scan`.

`torch.onnx.export` of a model needs none of this: layers record nodes of ONNX then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastrnn.kernels import onnx
from fastrnn.kernels.operands import Operands
from fastrnn.kernels.prepare import cell_of, find

__all__ = ["decompositions"]


def decompositions() -> dict[OpOverload, Callable[..., list[Tensor]]]:
    """What `fastrnn.scan` consists of, as a table for `ExportedProgram.run_decompositions`.

    After `program = program.run_decompositions(decompositions())`, `torch.onnx.export(program)`
    takes the program of a model with layers, dynamic sizes included.
    """
    return {torch.ops.fastrnn.scan.default: _scan}


def _scan(key: str, *arguments: Any) -> list[Tensor]:
    """The results of the operator in nodes of ONNX, with an empty tape."""
    count = len(Operands._fields)
    given = Operands(*arguments[:count])
    lists: Any = [() if group is None else group for group in given.lists()]
    operands = Operands(given.x, *lists, *given[1 + len(lists) :])
    _, _, steps, *_ = *arguments[count:], False, False, False
    find(key, "cpu", "float32")  # the program may be of another process
    y, last, every = onnx.scan(cell_of(key), operands, steps)
    return [y, *last, *([] if every is None else [every]), operands.x.new_empty(0)]
