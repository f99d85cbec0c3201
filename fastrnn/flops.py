"""Formulas of the operator for `torch.utils.flop_counter.FlopCounterMode`.

By its convention a matrix product counts `2·m·n·k` and all else counts nothing, so a layer counts
as much as torch.nn's layer of the same sizes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

__all__ = ["backward", "forward", "register_when_imported"]

_COUNTER = "torch.utils.flop_counter"


def forward(named: dict[str, Any]) -> int:
    """Floating point operations of `scan`, from its arguments by name.

    Every row of the input counts, even past the end of a sequence, because shapes do not tell
    `lengths`.
    """
    return 2 * _rows(named) * _numel(named, "w_ih", "w_hh", "w_hr")


def backward(named: dict[str, Any]) -> int:
    """Floating point operations of `scan_backward`, from its arguments by name.

    The first step needs no product for the initial states, unless those need a gradient. Without a
    tape, the forward pass counts again.
    """
    needs_x, needs_w_ih, needs_w_hh, _, needs_w_hr, _, needs_states, _ = named["needs"]
    rows, states = _rows(named), named["s0"]
    batch = states[0].shape[-2] if states else named["x"].shape[-2]
    w_ih, w_hh, w_hr = (_numel(named, name) for name in ("w_ih", "w_hh", "w_hr"))
    total = 2 * rows * (w_ih * (needs_x + needs_w_ih) + w_hh * needs_w_hh + w_hr * (1 + needs_w_hr))
    total += 2 * (rows if needs_states else rows - batch) * w_hh
    return total if named["tape"].shape[0] else total + forward(named)


def register_when_imported() -> None:
    """Register the formulas with FlopCounterMode, now or when it is imported.

    An import here would import Triton in every process.
    """
    if (counter := sys.modules.get(_COUNTER)) is not None:
        _register(counter)
    else:
        sys.meta_path.insert(0, _Finder())


def _rows(named: dict[str, Any]) -> int:
    return prod(named["x"].shape[:-1])


def _numel(named: dict[str, Any], *names: str) -> int:
    return sum(prod(weight.shape) for name in names for weight in named[name] or ())


def _register(counter: ModuleType) -> None:
    for name, count in (("scan", forward), ("scan_packed", forward), ("scan_backward", backward)):
        _register_one(counter, getattr(torch.ops.fastrnn, name), count)


def _register_one(counter: ModuleType, op: Any, count: Any) -> None:
    names = [argument.name for argument in op.default._schema.arguments]

    @counter.register_flop_formula(op, get_raw=True)
    def formula(*arguments: Any, out_val: Any = None, **keywords: Any) -> int:
        return count(dict(zip(names, arguments, strict=False)) | keywords)


class _Finder(MetaPathFinder):
    """The first finder until the counter is imported; it lets the others find the module, and
    registers the formulas after its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
