"""The digest of a function is that of what it does."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from fastrnn.cells.digest import digest_of

BASE = """
RATE = 0.5
OTHER = 1
def helper(x, by=3): return x * by
def make(kept):
    def cell(u, v, h):
        '''What it does.'''
        inner = lambda x: x * RATE
        return inner(h) + helper(u.a) * kept + 7 * v.a
    return cell
"""


def digest(source: str, kept: float = 2.0) -> str:
    module = types.ModuleType("written")
    exec(source, vars(module))
    return digest_of(module.make(kept))


def test_the_digest_is_that_of_behaviour() -> None:
    assert digest(BASE) == digest(BASE) != digest(BASE, kept=3.0)
    for old, new in (
        ("What it does.", "What it really does."),
        ("\n", "\n\n"),
        ("OTHER = 1", "OTHER = 2"),
        ("inner", "within"),
    ):
        assert digest(BASE.replace(old, new)) == digest(BASE), new
    for old, new in (
        ("RATE = 0.5", "RATE = 0.25"),
        ("x * by", "x + by"),
        ("by=3", "by=4"),
        ("7 *", "8 *"),
        ("u.a", "u.b"),
        ("x * RATE", "x / RATE"),
    ):
        assert digest(BASE.replace(old, new)) != digest(BASE), new


def test_the_digest_sees_captured_tensors_and_settings() -> None:
    def capturing(value: Any) -> str:
        def step(u: Any, v: Any, h: Tensor) -> Tensor:
            return value * h + u.a

        return digest_of(step)

    def settings(rate: float) -> types.SimpleNamespace:
        return types.SimpleNamespace(rate=rate)

    for make in (torch.tensor, settings, lambda rate: {"rate": rate}):
        assert capturing(make(0.5)) == capturing(make(0.5)) != capturing(make(0.25)), make
