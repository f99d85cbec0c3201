"""Functions that cells may call, in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastrnn import cells
from fastrnn.kernels.gpu.triton import launch
from tests.support.interpreter import interpreted
from tests.support.kernels import check
from tests.support.operands import operands

pytestmark = pytest.mark.interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)


@cells.cell(gates="abcd", states="hcm")
def every_function(u, v, h, c, m):
    """Calls every function that a cell may call."""
    a, b = u.a + v.a, u.b - v.b
    c = 0.5 * c + torch.sin(a) * torch.cos(b) - torch.erf(u.c * v.c)
    m = torch.maximum(0.9 * m, torch.minimum(torch.expm1(torch.tanh(a)), torch.log1p(b * b)))
    n = torch.sqrt(1 + c * c) + torch.rsqrt(2 + m * m) + torch.log(1.5 + torch.abs(u.d))
    h = torch.where((v.d > 0) & (a <= b), n**3, torch.sigmoid(n)) + (1 + b * b) ** -1.7
    return torch.tanh(h) * torch.exp(-torch.relu(c)) + torch.sign(u.a) * 1e-3, c, m


@interpreted
def test_functions_a_cell_may_call() -> None:
    for dtype in (torch.float64, torch.float32):
        check(every_function, operands(every_function, 3, 2, 4, 5, dtype=dtype), "triton")


@interpreted
def test_functions_are_accurate_near_zero_and_far_away() -> None:
    import triton

    source = launch._cell_module  # a module with a source file, like those of cells
    scale = torch.logspace(-30, 2.5, 4096, dtype=torch.float64)
    points = torch.cat([-scale, scale, torch.tensor([0.0, -0.0], dtype=torch.float64)])
    for name in ("tanh", "expm1", "sigmoid", "log1p", "exp"):
        text = f"""import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.math import {name}


@triton.jit
def function(x, y, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, {name}(tl.load(x + at, mask=at < n, other=0.5)), mask=at < n)
"""
        function = source(text, name).function
        for dtype, limit in ((torch.float32, 4), (torch.float64, 6)):
            x = points.to(dtype)
            x = x[x > -0.9] if name == "log1p" else x[x.abs() < 80]
            y = torch.empty_like(x)
            function[(1,)](x, y, x.numel(), N=triton.next_power_of_2(x.numel()))
            right = getattr(torch, name)(x.double())
            error = ((y.double() - right) / right.abs().clamp_min(1e-300)).abs()
            assert error[right != 0].max() < limit * torch.finfo(dtype).eps, (name, dtype)
