# mypy: ignore-errors
# Triton's functions have no types: they are compiled, not run.
"""The product in which a step ends if state 0 is projected, h = m * w_hr^T, where the cell gives m,
and its gradients. Every sweep with streamed weights ends its steps with it; see `common.py`."""

import triton
import triton.language as tl

from fastrnn.kernels.gpu.triton.common import clipped, state_0_before, times


@triton.jit
def project(
    m, w_hr, h_before, h_after, y, rows, alive, b, batch, p, recurrences, hidden,
    H: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the product of the rows `m` to the rows `h_after` and to y. Rows that are not `alive`
    [BB, 1] keep state 0."""
    dtype = h_after.dtype.element_ty
    for q0 in tl.range(0, Q, BN, num_stages=1):
        q = q0 + tl.arange(0, BN)
        total = tl.zeros((BB, BN), dtype)
        for n0 in tl.range(0, hidden, BK):
            n = n0 + tl.arange(0, BK)
            own = tl.load(m + n[None, :], mask=alive & (n < H)[None, :], other=0.0)
            w_at = w_hr + (p * Q + q[None, :]) * H + n[:, None]
            w = tl.load(w_at, mask=(n < H)[:, None] & (q < Q)[None, :], other=0.0)
            total += times(own, w, DOT, PRECISION)
        in_batch = (b < batch)[:, None] & (q < Q)[None, :]
        here = alive & (q < Q)[None, :]
        old = tl.load(h_before + q[None, :], mask=in_batch, other=0.0)
        new = tl.where(here, total, old)
        tl.store(h_after + q[None, :], new, mask=in_batch)
        y_at = y + (rows[:, None] * recurrences + p) * Q + q[None, :]
        tl.store(y_at, new.to(y.dtype.element_ty), mask=here)
    tl.debug_barrier()


@triton.jit
def gather(
    dy, y, start, begins, own, ds, h_prev, dh, rows, rows_before, from_row, from_start, cut, alive,
    out_rows, p, recurrences, Q: tl.constexpr, DY: tl.constexpr, LIMIT: tl.constexpr,
    GIVEN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the gradient of state 0 after a step, all of which goes on to m, to `dh` and over the
    rows `ds`; and state 0 before the step to `h_prev`."""
    dtype = start.dtype.element_ty
    for q0 in tl.range(0, Q, BN, num_stages=1):
        q = q0 + tl.arange(0, BN)
        here = alive & (q < Q)[None, :]
        d = tl.load(ds + q[None, :], mask=here, other=0.0)
        if DY:
            at_y = dy + (rows[:, None] * recurrences + p) * Q + q[None, :]
            d += tl.load(at_y, mask=here, other=0.0).to(dtype)
        d = clipped(d, LIMIT)
        h = state_0_before(
            y, start, begins, own, rows_before, from_row, from_start, cut, q, p, recurrences,
            dtype, Q, GIVEN,
        )  # fmt: skip
        at = out_rows * Q + q[None, :]
        tl.store(h_prev + at, h.to(h_prev.dtype.element_ty), mask=here)
        tl.store(dh + at, d.to(dh.dtype.element_ty), mask=here)
        tl.debug_barrier()  # all threads have read the tile before any writes it
        tl.store(ds + q[None, :], d, mask=here)
    tl.debug_barrier()


@triton.jit
def gradient_of_m(
    ds, w_hr, p, n, alive, width, H: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ds * w_hr [BB, N] for the units n, from the rows that `gather` wrote."""
    total = tl.zeros((BB, BN), ds.dtype.element_ty)
    for k0 in tl.range(0, width, BK):
        k = k0 + tl.arange(0, BK)
        d = tl.load(ds + k[None, :], mask=alive & (k < Q)[None, :], other=0.0)
        at_w = w_hr + (p * Q + k[:, None]) * H + n[None, :]
        w = tl.load(at_w, mask=(k < Q)[:, None] & (n < H)[None, :], other=0.0)
        total += times(d, w, DOT, PRECISION)
    return total
