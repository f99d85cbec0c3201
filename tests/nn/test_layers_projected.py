"""Layers of any cell whose steps end in a projection (`proj_size`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cells, kernels
from fastrnn.cells.published import MODULES
from fastrnn.compiler.derive import derive
from fastrnn.tools.tolerance import largest_error
from tests.support.names import BUILT_IN


@fastrnn.cell(gates="a", states="h", params={"gain": fastrnn.Param("unit", init=1.0)})
def normed_rnn(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    """One gate, and a norm over it."""
    a = u.a + v.a
    return torch.tanh(torch.nn.functional.rms_norm(a, a.shape[-1:], eps=1e-5) * p.gain)


H, Q = 70, 24
LAYERS: dict[str, Callable[..., Any]] = {
    "LayerNormLSTM": fastrnn.LayerNormLSTM,
    "PeepholeLSTM": fastrnn.PeepholeLSTM,
    "one state": lambda *sizes, **options: fastrnn.Recurrent(normed_rnn, *sizes, **options),
    "built in": lambda *sizes, **options: fastrnn.Recurrent(cells.rnn_tanh, *sizes, **options),
}


def of(states: Any) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def by_hand(layer: Any, x: Tensor, hx: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The first layer of one direction, as a loop of torch operations."""
    w_ih, w_hh, w_hr = (getattr(layer, f"weight_{name}_l0") for name in ("ih", "hh", "hr"))
    b_ih, b_hh = layer.bias_ih_l0, layer.bias_hh_l0
    params = [getattr(layer, f"weight_{name}_l0") for name in layer.cell.params]
    count = len(layer.cell.gates)
    outputs = []
    for row in x:
        u = (row @ w_ih.T + b_ih).chunk(count, -1)
        v = (hx[0] @ w_hh.T + b_hh).chunk(count, -1)
        m, *rest = layer.cell.step(u, v, hx, params)
        hx = [m @ w_hr.T, *rest]
        outputs.append(hx[0])
    return torch.stack(outputs), hx


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_loop_with_a_product_at_the_end(name: str) -> None:
    layer = LAYERS[name](5, H, proj_size=Q, dtype=torch.float64)
    x = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    widths = [Q, *[H] * (len(layer.cell.states) - 1)]
    hx = [torch.randn(1, 3, n, dtype=torch.float64, requires_grad=True) for n in widths]
    ours, last = layer(x, hx[0] if len(hx) == 1 else tuple(hx))
    right, right_last = by_hand(layer, x, [s[0] for s in hx])
    assert ours.shape == (7, 3, Q) and layer.weight_hh_l0.size(1) == Q
    leaves = [x, *hx, *layer.parameters()]
    for a, b in zip([ours, *of(last)], [right, *right_last], strict=True):
        assert largest_error(a.reshape(b.shape), b) < 1e-13
    weigh = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * weigh).sum() + of(last)[-1].sum(), leaves)
    theirs = torch.autograd.grad((right * weigh).sum() + right_last[-1].sum(), leaves)
    for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert largest_error(a, b) < 1e-12, k


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("weights", [None, "int8", "bfloat16"])
def test_a_stream_gives_the_bits_of_a_call(name: str, weights: str | None) -> None:
    layer = LAYERS[name](5, H, num_layers=2, proj_size=Q).eval()
    for parameter in layer.parameters():  # the bound of errors is for weights as torch.nn's
        if parameter.shape[-1] in (5, Q):
            torch.nn.init.uniform_(parameter, -(H**-0.5), H**-0.5)
    exact = layer(x := torch.randn(9, 3, 5))[0].detach()
    if weights is not None:
        fastrnn.quantize_(layer, weights=weights)
    with torch.no_grad():
        whole = layer(x)[0]
        stepper = layer.stream(3)
        steps = torch.stack([torch.as_tensor(stepper.step(row)).clone() for row in x])
        assert torch.equal(steps, whole)
        first, hx = layer(x[:4])
        assert torch.equal(torch.cat([first, layer(x[4:], hx)[0]]), whole)
    assert largest_error(whole, exact) < (0.05 if weights else 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_stacked_in_both_directions_and_bfloat16(name: str) -> None:
    layer = LAYERS[name](5, H, num_layers=2, bidirectional=True, proj_size=Q)
    x = torch.randn(6, 4, 5)
    lengths = torch.tensor([6, 2, 5, 1])
    with torch.no_grad():
        right = layer(x, lengths=lengths)[0]
        with kernels.use("reference"):
            assert largest_error(right, layer(x, lengths=lengths)[0]) < 1e-5
        frozen = copy.deepcopy(layer)
        fastrnn.freeze(frozen)
        assert torch.equal(frozen(x, lengths=lengths)[0], right)
    half = copy.deepcopy(layer).bfloat16()
    out = half(x.bfloat16(), lengths=lengths)[0]
    out.float().square().sum().backward()
    assert largest_error(out.float(), right) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "indrnn", "layer_norm_gru"])
def test_cells_that_use_their_output_unit_by_unit_are_refused(cell: str) -> None:
    with pytest.raises(ValueError, match=rf"cell '{cell}' cannot be projected: .*proj_size"):
        fastrnn.Recurrent(cells.get(cell), 3, 8, proj_size=4)


def mean_of_output(u: Any, v: Any, h: Tensor) -> Tensor:
    return torch.tanh(u.a + v.a + h.mean(-1, keepdim=True))


def hands_output_on(u: Any, v: Any, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(u.a + v.a), h


def is_the_output_before(u: Any, v: Any, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return h, torch.tanh(u.a + v.a)


def asserts(u: Any, v: Any, h: Tensor) -> Tensor:
    assert h.shape == u.a.shape
    return torch.tanh(u.a + v.a)


@pytest.mark.parametrize(
    ("function", "states"),
    [(mean_of_output, "h"), (asserts, "h"), (hands_output_on, "hg"), (is_the_output_before, "hg")],
)
def test_any_other_use_of_the_output_is_refused(function: Any, states: str) -> None:
    cell = cells.Cell(function.__name__, ("a",), tuple(states), function)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"(?s)cannot be projected: .* through the recurrent"):
        fastrnn.Recurrent(cell, 4, 8, proj_size=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_published_cell_is_projected_or_refused_as_it_is_derived() -> None:
    for name in [*BUILT_IN, *MODULES]:
        cell = cells.get(name)
        try:
            fastrnn.Recurrent(cell, 4, 8, proj_size=3)
        except ValueError as error:
            assert "cannot be projected" in str(error)
            assert not derive(cell).projectable, name
        else:
            assert derive(cell).projectable, name


def test_heads_and_noise_are_not_projected() -> None:
    with pytest.raises(ValueError, match="heads are not projected"):
        fastrnn.LayerNormLSTM(3, 8, proj_size=2, heads=2)
    with pytest.raises(ValueError, match="zoneout is for states that are not projected"):
        fastrnn.LayerNormLSTM(3, 8, proj_size=2, zoneout=0.1)
