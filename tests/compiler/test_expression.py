"""The evaluation of expressions in torch."""

from __future__ import annotations

import pytest
import torch

from fastrnn.compiler.expression import Algebra, evaluate
from tests.support.derivations import by_autograd, choices, derived_step, inputs, make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_expressions_compute_in_the_dtype_they_are_given(dtype: torch.dtype) -> None:
    cell = make("abcd", "hc", choices)
    u, v, s, dnext, p = inputs(cell, dtype=dtype)
    after, grads = derived_step(cell, u, v, s, dnext, p)
    assert {x.dtype for x in (*after, *grads)} == {dtype}
    want_after, want_grads = by_autograd(cell, u, v, s, dnext, p)
    torch.testing.assert_close(after, want_after)
    torch.testing.assert_close(grads, want_grads)


def test_values_of_a_batch_of_0_have_its_shape() -> None:
    algebra = Algebra()
    root = algebra.make("mul", algebra.input("x"), algebra.input("p"))
    inputs = {"count": torch.tensor(3.0), "p": torch.ones(3), "row": torch.ones(0, 1)}
    inputs["x"] = torch.ones(0, 3)
    assert evaluate([root, algebra.const(1)], inputs)[0].shape == (0, 3)
    assert evaluate([algebra.const(1)], inputs)[0].shape == (0, 3)
