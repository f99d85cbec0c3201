"""The evaluation of expressions in torch."""

from __future__ import annotations

import pytest
import torch

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
