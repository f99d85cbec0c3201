"""Products in bfloat16, int8 and int16, against the same arithmetic in float64."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cells
from fastrnn.extension import _C
from fastrnn.kernels.operands import Weights
from fastrnn.nn.rounding import quantised
from tests.support.kernels import planned
from tests.support.reruns import for_other_instruction_sets, run_again
from tests.support.shared import staged
from tests.support.weights import as_torch_draws

LEVELS = {"int8": 127, "int16": 32639}
HOW: dict[str, dict[str, Any]] = {
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int16": {"weights": "int8", "activations": "int16"},
}
FORMATS = [format for format in HOW if format in _C.formats()]
# [B, I, H] with words, vectors and tiles that are whole, and that are not.
SIZES = [(1, 1, 1), (2, 3, 5), (3, 16, 16), (7, 64, 48), (13, 17, 33), (5, 31, 70), (26, 100, 130)]

pytestmark = pytest.mark.skipif(not FORMATS, reason="this processor lacks the instructions")


def own(u: Any, v: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Reads h unit by unit, does not sum a gate, and has no bound."""
    c = torch.sigmoid(u.f + v.f) * c + 2 * u.g * torch.tanh(v.g)
    return c + 0.25 * h, c


OWN = cells.Cell("own_in_words", ("f", "g"), ("h", "c"), own)
LAYERS: dict[str, Callable[..., Any]] = {
    "rnn": fastrnn.RNN,
    "relu": lambda i, h, **more: fastrnn.RNN(i, h, nonlinearity="relu", **more),
    "lstm": fastrnn.LSTM,
    "projected": lambda i, h, **more: fastrnn.LSTM(i, h, proj_size=h // 2, **more),
    "gru": fastrnn.GRU,
    "own": lambda i, h, **more: fastrnn.Recurrent(OWN, i, h, **more),
    "reset before": fastrnn.GRUResetBefore,
    "staged": lambda i, h, **more: fastrnn.Recurrent(staged, i, h, **more),
}
# Cells with a norm over the units of a row. To compile them for every format takes minutes.
NORMS = ("layer_norm_lstm", "rms_norm_lstm", "dreamer_gru", "layer_norm_gru")
each_norm = [pytest.param(name, marks=pytest.mark.compiles) for name in NORMS]
KINDS = [*LAYERS, *each_norm]
LAYERS |= {name: functools.partial(fastrnn.Recurrent, cells.get(name)) for name in NORMS}
# A product reads what was computed in the same step.
WITHIN = ("projected", "reset before", "staged")


def rounded_rows(x: Tensor, format: str) -> Tensor:
    """The numbers that a kernel multiplies for the rows of x."""
    if format == "bfloat16":
        return x.float().bfloat16().double()
    # A tensor, because torch divides a number by a tensor in two steps, and rounds twice.
    levels = torch.tensor(float(LEVELS[format]))
    largest = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return torch.round(x.float() * (levels / largest)).double() * (largest / levels).double()


def rounded_weights(w: Tensor, format: str) -> Tensor:
    if format == "bfloat16":
        return w.bfloat16().double()
    numbers, scales = quantised(w)
    return numbers.double() * scales.double().unsqueeze(-1)


def one_step(
    cell: cells.Cell, x: Tensor, states: Sequence[Tensor], weights: Weights, format: str
) -> list[Tensor]:
    """A step in float64 on rounded weights and rows."""
    w_ih, w_hh, b_ih, b_hh, w_hr, params = weights

    def product(rows: Tensor, w: Tensor) -> Tensor:
        return rounded_rows(rows, format) @ rounded_weights(w, format).T

    def recurrent(rows: Tensor) -> tuple[Tensor, ...]:
        assert b_hh is not None
        return (product(rows, w_hh) + b_hh.double()).chunk(len(cell.gates), -1)

    assert b_ih is not None
    u = (product(x, w_ih) + b_ih.double()).chunk(len(cell.gates), -1)
    before = list(states) if w_hr is None else [torch.zeros_like(states[1]), *states[1:]]
    learned = [param.double() for param in params]
    h, *others = cell.step(u, recurrent(states[0]), before, learned, recurrent)
    return [h if w_hr is None else product(h, w_hr), *others]


def tensors(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_one_step_is_the_arithmetic_of_the_format(
    format: str, kind: str, sizes: tuple[int, int, int]
) -> None:
    batch, inputs, hidden = sizes
    if kind == "projected" and hidden < 4:
        hidden = 4
    torch.manual_seed(hidden)
    layer = LAYERS[kind](inputs, hidden).requires_grad_(False)
    x = torch.randn(1, batch, inputs)
    states = [torch.randn(s.shape[1:]) for s in tensors(layer(x)[1])]
    (weights,) = layer._weights()
    expected = one_step(layer._cell(), x[0], [s.double() for s in states], weights, format)
    fastrnn.quantize_(layer, **HOW[format])
    given = tuple(s[None] for s in states)
    y, after = layer(x, given if len(given) > 1 else given[0])
    # Rounding of what was computed in the step may fall on the other side of a tie.
    bound = 2e-2 if kind in WITHIN else 1e-6
    for ours, theirs in zip([y, *tensors(after)], [expected[0], *expected], strict=True):
        error = (ours[0].double() - theirs).abs()
        assert error.max() < bound * theirs.abs().max().clamp_min(1)
        assert error.mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_number_that_is_not_finite_spoils_its_sequence_from_there_on(
    format: str, kind: str
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind](20, 24)
    fastrnn.quantize_(layer, **HOW[format])
    x = torch.randn(6, 5, 20)
    right = layer(x)[0]
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[2, 1, 17] = value
        y = layer(spoilt)[0]
        others = [0, 2, 3, 4]
        assert torch.equal(y[:, others], right[:, others])
        assert torch.equal(y[:2], right[:2])
        if format == "bfloat16":  # where the gate of an infinite product is a number, as in float
            in_float = fastrnn.dequantize_(layer)(spoilt)[0]
            fastrnn.quantize_(layer, **HOW[format])
            assert torch.equal(y.isnan(), in_float.isnan())
        else:  # infinity has no scale
            assert y[2:, 1].isnan().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_magnitude(format: str, scale: float) -> None:
    """Each row has a scale of its own, so a number loses digits only beside larger ones."""
    torch.manual_seed(0)
    layer = fastrnn.RNN(32, 16, nonlinearity="relu", bias=False)
    x = torch.randn(4, 6, 32)
    fastrnn.quantize_(layer, **HOW[format])
    y = layer(x)[0]
    x[:, ::2] *= scale
    scaled = layer(x)[0]
    assert torch.equal(scaled[:, 1::2], y[:, 1::2])
    if scale > 1e-37:
        torch.testing.assert_close(scaled[:, ::2] / scale, y[:, ::2], rtol=0.05, atol=0.05)
    else:
        assert scaled[:, ::2].abs().max() < 1e-36


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", [*WITHIN, *each_norm])
def test_layers_with_everything_agree_with_single_steps(kind: str, format: str) -> None:
    """Lengths, resets and both directions, against one step at a time by the same kernels."""
    torch.manual_seed(0)
    layer = LAYERS[kind](9, 21, bidirectional=True)
    ahead, back = LAYERS[kind](9, 21), LAYERS[kind](9, 21)
    for name, parameter in layer.named_parameters():
        single = back if name.endswith("_reverse") else ahead
        single.get_parameter(name.removesuffix("_reverse")).data.copy_(parameter.data)
    for each in (layer, ahead, back):
        fastrnn.quantize_(each, **HOW[format])
    x, lengths = torch.randn(11, 4, 9), torch.tensor([11, 3, 7, 10])
    resets = torch.rand(11, 4) < 0.2
    whole = layer(x, lengths=lengths, resets=resets)[0]
    width = whole.size(-1) // 2
    for b, n in enumerate(lengths.tolist()):
        for single, times, part in (
            (ahead, range(n), slice(width)),
            (back, range(n)[::-1], slice(width, None)),
        ):
            state = None
            for t in times:
                before = t if single is ahead else t + 1
                if before < n and resets[before, b]:
                    state = None
                y, state = single(x[t : t + 1, b : b + 1], state)
                assert torch.equal(y[0, 0], whole[t, b, part])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 2, 3, 5), (9, 7, 17, 33), (40, 5, 31, 70)], ids=str
)
def test_gradients_in_bfloat16(kind: str, sizes: tuple[int, int, int, int]) -> None:
    """All gradients of a layer in bfloat16, against float64 with the same weights."""
    steps, batch, inputs, hidden = sizes
    # The norm of one or two units hardly changes with them: its gradients are what rounding leaves.
    if kind in ("projected", *NORMS):
        hidden = max(hidden, 4)
    torch.manual_seed(hidden)
    # The norm and the maximum of a second layer would amplify by ten what the first rounds.
    amplifies = kind in ("staged", "layer_norm_lstm")
    options = {"bidirectional": True, "num_layers": 1 if amplifies else 2}
    exact = as_torch_draws(LAYERS[kind](inputs, hidden, **options))
    exact.bfloat16().double()
    ours = LAYERS[kind](inputs, hidden, **options)
    ours.load_state_dict(exact.state_dict())
    ours.bfloat16()
    x = torch.randn(steps, batch, inputs).bfloat16()
    lengths = torch.randint(1, steps + 1, (batch,))
    gradient: Tensor | None = None

    def run(layer: Any, dtype: torch.dtype) -> list[Tensor]:
        nonlocal gradient
        leaf = x.to(dtype).requires_grad_()
        y, last = layer(leaf, lengths=lengths)
        if gradient is None:
            gradient = torch.randn(y.shape).bfloat16()
        roots = [y, *tensors(last)]
        grads = [gradient.to(dtype), *(torch.ones_like(s) for s in tensors(last))]
        return list(torch.autograd.grad(roots, [leaf, *layer.parameters()], grads))

    for one, right in zip(run(ours, torch.bfloat16), run(exact, torch.float64), strict=True):
        error = (one.double() - right).norm() / right.norm().clamp_min(1e-3)
        # Errors of few numbers do not average, and a unit of ReLU may be on the other side of zero.
        assert error < (0.25 if hidden < 16 or kind == "relu" else 3e-2)


@pytest.mark.parametrize("kind", ["rnn", "relu", *WITHIN])
def test_what_a_call_leaves_in_memory_does_not_reach_the_next(kind: str) -> None:
    """The last word of a row with an odd number of gradients has half a number of room."""
    torch.manual_seed(0)
    layer = LAYERS[kind](5, 14 if kind == "projected" else 33).bfloat16()  # 7 or 33 columns
    x = torch.randn(9, 3, 5, dtype=torch.bfloat16, requires_grad=True)

    def gradients(scale: float) -> list[Tensor]:
        y, _ = layer(x)
        return list(torch.autograd.grad((y * scale).sum(), [x, *layer.parameters()]))

    right = gradients(1)
    wide = fastrnn.LSTM(64, 64, proj_size=32, dtype=torch.bfloat16)
    spoilt = wide(torch.randn(9, 3, 64, dtype=torch.bfloat16))[0]
    (spoilt * float("nan")).sum().backward()
    for one, other in zip(gradients(1), right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weights", ["unpacked", "panels", "prepacked"])
def test_every_layout_that_a_plan_asks_for(weights: str) -> None:
    """Formats other than float and double have kernels for packed weights only."""
    torch.manual_seed(0)
    layer = fastrnn.LSTM(19, 33, proj_size=10, dtype=torch.bfloat16)
    x = torch.randn(5, 3, 19, dtype=torch.bfloat16, requires_grad=True)

    def run() -> list[Tensor]:
        y, _ = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    whole = run()
    with planned(weights=weights, split_units=2):
        for one, other in zip(run(), whole, strict=True):
            assert torch.equal(one, other)
    assert all(bool(g.any()) for g in whole)


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "bfloat16"])
@pytest.mark.parametrize("inputs", [3, 512, 516, 1030, 2100, 65_536])
def test_the_least_number_of_8_bits_is_a_weight_like_others(format: str, inputs: int) -> None:
    """A checkpoint may have -128. With it, all products are as large as they can be."""
    layer = fastrnn.RNN(inputs, 1, nonlinearity="relu", bias=False)
    fastrnn.quantize_(layer, **HOW[format], keep_float=False)
    state = layer.state_dict()
    state["weight_ih_l0"].fill_(-128)
    state["weight_ih_l0_scale"].fill_(2.0)
    layer.load_state_dict(state)
    for sign in (1, -1):
        y = layer(torch.full((1, 1, inputs), -3.0 * sign))[0]
        torch.testing.assert_close(y.item(), max(0.0, 768.0 * inputs * sign), rtol=1e-6, atol=0)


# Depths whose sums leave 24 bits, and 32 bits in 16-bit rows; widths that are no whole vectors.
ON_EVERY_PROCESSOR = """
import sys, torch, fastrnn
from fastrnn.extension import _C
torch.manual_seed(0)
found = []
for inputs, hidden in ((5, 3), (64, 48), (131, 67), (519, 40), (2100, 9), (16, 530)):
    for make in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN):
        layer = make(inputs, hidden, bidirectional=True)
        stepped = make(inputs, hidden)
        x = 3 * torch.randn(6, 5, inputs)
        for activations in ("int8", "int16"):
            for each in (layer, stepped):
                report = fastrnn.quantize_(each, activations=activations)
                assert report.quantised[0].kernel == _C.isa()  # no weights restored
            found.append(layer(x)[0])
            stepper = stepped.stream(5)
            found.append(torch.stack([torch.as_tensor(stepper.step(frame)) for frame in x]))
    layer = fastrnn.LSTM(inputs, 40, proj_size=21)
    for activations in ("int8", "int16"):
        fastrnn.quantize_(layer, activations=activations)
        found.append(layer(torch.randn(4, 3, inputs))[0])
layer = fastrnn.GRUResetBefore(13, 37)
for activations in ("int8", "int16"):
    fastrnn.quantize_(layer, activations=activations)
    found.append(layer(torch.randn(4, 3, 13))[0])
torch.save(found, sys.argv[1])
"""


def test_integers_give_the_same_numbers_with_every_instruction_set(tmp_path: Path) -> None:
    """Sums are exact, so the numbers do not depend on the instructions that compute them."""
    isas = [isa for isa in _C.isas() if isa != "baseline"]
    if "int8" not in FORMATS or len(isas) < 2:
        pytest.skip("this processor has the kernels of one instruction set")
    found = {}
    for isa in isas:
        file = tmp_path / f"{isa}.pt"
        command = [sys.executable, "-c", ON_EVERY_PROCESSOR, str(file)]
        own = {"FASTRNN_ISA": isa}
        if isa == "avx512" and "avx512_vnni" in isas:
            # As -march=native may: what the compiler knows is not what the kernels use.
            flags = f"{os.environ.get('FASTRNN_CXXFLAGS', '')} -mavx512vnni -mavx512bf16"
            own["FASTRNN_CXXFLAGS"] = flags
        subprocess.run(command, env={**os.environ, **own}, check=True)
        found[isa] = torch.load(file)
    first = found.pop(isas[0])
    assert all(tensor.isfinite().all() and tensor.any() for tensor in first)
    for tensors_of_isa in found.values():
        for one, other in zip(tensors_of_isa, first, strict=True):
            assert torch.equal(one, other)


@for_other_instruction_sets(120, floats=False)
def test_other_instruction_sets(isa: str) -> None:
    """Runs the tests above, and those of quantised layers, with the code for an older processor."""
    if isa == "baseline":
        pytest.skip("it has no formats of integers")
    quantised = Path(__file__).parents[2] / "nn" / "test_quantize_numbers.py"
    run_again(isa, __file__, str(quantised))
