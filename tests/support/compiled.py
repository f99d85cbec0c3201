"""Steppers in C: they are compiled, loaded, and called on tensors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

__all__ = ["Stream", "compiler", "library"]

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
PAGE = "-O3", "-fno-trapping-math"  # what docs/export.md says


def compiler() -> str:
    """The C compiler; without one the test is skipped."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def library(sources: Sequence[Path], *flags: str) -> ctypes.CDLL:
    """The sources as one shared library beside the first, with the flags of the page if none are
    given."""
    target = sources[0].with_suffix(".so")
    command = [compiler(), *STRICT, *(flags or PAGE), "-fPIC", "-shared", *map(str, sources)]
    subprocess.run([*command, "-o", str(target), "-lm"], check=True, timeout=600)
    return ctypes.CDLL(str(target))


class Stream:
    """One stream of a stepper in C.

    Attributes:
        states: the members of its state, [num_layers, width] each; writes reach the stepper.
    """

    def __init__(
        self, library: ctypes.CDLL, name: str, layers: int, output: int, hidden: int, states: int
    ) -> None:
        self._reset, self._step = library[f"{name}_reset"], library[f"{name}_step"]
        self._output = output
        widths = [output] + [hidden] * (states - 1)
        # NaN, because only a reset makes a state.
        self._memory = torch.full((layers * sum(widths),), torch.nan)
        self.states = [
            part.view(layers, -1) for part in self._memory.split([layers * w for w in widths])
        ]
        self.reset()

    def reset(self) -> None:
        self._reset(ctypes.c_void_p(self._memory.data_ptr()))

    def step(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run one step from [I] to [Q], into `y` if that is given."""
        out = torch.full((self._output,), torch.nan) if y is None else y
        assert x.dtype == out.dtype == torch.float32
        assert x.is_contiguous() and out.is_contiguous()
        self._step(*(ctypes.c_void_p(t.data_ptr()) for t in (self._memory, x, out)))
        return out

    def steps(self, x: Tensor) -> Tensor:
        """Run all steps of a sequence [T, I]."""
        return torch.stack([self.step(row.contiguous()) for row in x])
