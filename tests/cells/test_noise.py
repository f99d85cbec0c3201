"""Random numbers within a cell."""

from __future__ import annotations

import dataclasses
import re
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import cells, kernels, ops
from fastrnn.cells.noise import MAX_DRAWS, Draw, drawing, numbers, philox, seeded
from fastrnn.cells.variants import clipped
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_published_words(
    seed: int, counter: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """The known answers of Random123, the authors' library."""
    made = philox(torch.tensor(seed), *map(torch.tensor, counter))
    assert tuple(int(word) for word in made) == words


def test_numbers_follow_from_seed_sequence_step_unit_and_draw() -> None:
    draws = (Draw(0.25, "step", True), Draw(0.5, "sequence", False), Draw(0.5, "step", False))
    torch.manual_seed(0)
    noise = seeded(draws, torch.empty(0))
    large = numbers(draws, noise, 0, (7, 5, 130))
    assert [each.shape[0] for each in large] == [7, 1, 7]
    small = numbers(draws, noise, 0, (3, 2, 33))
    for big, part in zip(large, small, strict=True):
        assert torch.equal(big[: part.size(0), :2, :33], part)
    order = torch.tensor([3, 0])
    some = numbers(draws, torch.cat([noise, order]), 0, (7, 2, 130))
    for big, part in zip(large, some, strict=True):
        assert torch.equal(big[:, order], part)
    assert set(large[0].unique().tolist()) == {0.0, 4.0}
    assert not torch.equal(large[0][0], large[0][1])
    assert not torch.equal(large[2][0], large[1][0])
    assert not torch.equal(numbers(draws, noise, 1, (7, 5, 130))[0], large[0])


def test_frequencies_are_the_probabilities() -> None:
    draws = tuple(Draw(p, "step", False) for p in (0.01, 0.3, 0.5, 0.999))
    torch.manual_seed(1)
    made = numbers(draws, seeded(draws, torch.empty(0)), 0, (50, 8, 256))
    count = made[0].numel()
    for draw, each in zip(draws, made, strict=True):
        p = draw.probability
        assert abs(each.mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5
    # Neighbours, units that share a word, steps and draws are not correlated.
    half = made[2] - 0.5
    pairs = ((half[..., k:], half[..., :-k]) for k in (1, 2, 16, 32, 64))
    for a, b in (*pairs, (half[1:], half[:-1]), (half, made[1] - 0.3)):
        assert abs((a * b).mean().item()) < 5 * 0.25 / count**0.5


def test_a_rare_number_of_one_unit_says_nothing_about_others() -> None:
    """Two units share a word, and a small upper half makes one of them draw its rare number: that
    must not make the other draw it too."""
    draws = (Draw(3e-4, "step", False),)
    torch.manual_seed(2)
    (made,) = numbers(draws, seeded(draws, torch.empty(0)), 0, (200, 16, 128))
    count, p = made[0].numel() * 200, draws[0].probability
    assert abs(made.mean().item() - p) < 5 * (p / count) ** 0.5
    for k in (1, 16, 32, 33):
        assert (made[..., k:] * made[..., :-k]).sum() <= 2  # 0.04 are expected


@fastrnn.cell(gates="h", states="h", name="only_draws")
def only_draws(u: Any, v: Any, h: Tensor) -> Tensor:
    each = fastrnn.bernoulli(0.3) + 2 * fastrnn.bernoulli(0.9999, per="sequence")
    return each + 4 * fastrnn.dropout(u.h, 0.3)


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [1, 16, 31, 33, 64, 97, 130])
def test_the_cpu_kernel_draws_the_same_numbers(hidden: int, dtype: torch.dtype) -> None:
    layer: Any = fastrnn.Recurrent(
        only_draws, 1, hidden, bias=False, bidirectional=True, dtype=dtype
    )
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(1)
    x = torch.ones(4, 3, 1, dtype=dtype)
    draws = only_draws.noisy.draws
    torch.manual_seed(5)
    y = layer(x)[0]
    torch.manual_seed(5)
    noise = seeded(draws, x)
    for own, direction in enumerate(y.chunk(2, -1)):
        first, second, third = numbers(draws, noise, own, (4, 3, hidden))
        assert torch.equal(direction, (first + 2 * second + 4 * third.to(dtype)).to(dtype))


def test_a_seed_is_the_same_whatever_watches_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **kwargs or {})

    layer = fastrnn.Recurrent(cells.zoneout(cells.lstm, 0.5), 3, 9)
    x = torch.randn(4, 2, 3)
    found = []
    by_torch = Mock(wraps=seeded)
    monkeypatch.setattr(ops, "seeded", by_torch)
    for context in (nullcontext(), Watch(), torch.profiler.profile()):
        torch.manual_seed(7)
        with context:
            y, (h, c) = layer(x)
        found.append((y, h, c, torch.rand(1)))
    assert by_torch.call_count == 2  # not for the plain call
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_outside_training_they_give_the_mean() -> None:
    x = torch.randn(3)
    assert fastrnn.dropout(x, 0.3) is x
    assert fastrnn.bernoulli(0.3) == 0.3


def test_probabilities_without_chance_draw_nothing() -> None:
    def refuse(draw: Draw) -> torch.Tensor:
        raise AssertionError(draw)

    x = torch.randn(3)
    with drawing(refuse):
        assert fastrnn.dropout(x, 0) is x
        assert fastrnn.dropout(x, 1).eq(0).all()
        assert fastrnn.bernoulli(0) == 0
        assert fastrnn.bernoulli(1) == 1


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), torch.tensor(0.5)])
def test_faulty_probabilities_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="a probability from 0 to 1"):
        fastrnn.dropout(torch.zeros(1), p)
    with pytest.raises(ValueError, match="a probability from 0 to 1"):
        fastrnn.bernoulli(p)


def test_what_a_draw_is_made_for_is_step_or_sequence() -> None:
    with pytest.raises(ValueError, match="per='step' or per='sequence', got 'batch'"):
        fastrnn.dropout(torch.zeros(1), 0.5, per="batch")


@pytest.mark.compiles
def test_as_many_draws_as_the_kernels_take() -> None:
    """The limit is Python's; the kernels have a bit for each draw in masks that are wider."""
    source = (ROOT / "csrc" / "core" / "cell.h").read_text()
    masks = re.findall(r"constexpr uint(\d+)_t per_sequence = \w+", source)
    assert masks and all(int(bits) >= MAX_DRAWS for bits in masks)

    def drawing_cell(count: int) -> cells.Cell:
        def step(u: Any, v: Any, h: Tensor) -> Tensor:
            x = torch.tanh(u.h + v.h)
            for k in range(count):
                per = "sequence" if k % 3 else "step"
                x = fastrnn.dropout(x, 0.5, per) if k % 2 else x + fastrnn.bernoulli(0.5, per)
            return x

        return fastrnn.cell(gates="h", states="h", name="drawing")(step)

    layer = fastrnn.Recurrent(drawing_cell(MAX_DRAWS), 2, 33, dtype=torch.float64)
    found = []
    for kernel in ("cpu", "reference"):
        torch.manual_seed(0)
        with kernels.use(kernel):
            found.append(layer(torch.ones(9, 2, 2, dtype=torch.float64))[0])
    torch.testing.assert_close(*found)
    assert found[0].unique().numel() > 9
    with pytest.raises(ValueError, match=r"draws 17 random numbers .* at most 16"):
        fastrnn.Recurrent(drawing_cell(MAX_DRAWS + 1), 2, 3)


def test_clipped_gradients() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = clipped(x * x, 0.5)
    assert torch.equal(y, x * x)
    (dx,) = torch.autograd.grad(y, x, torch.tensor([0.1, -2.0, float("nan")]).double())
    assert torch.equal(dx[:2], torch.tensor([0.2, -2.0]).double())
    assert dx[2].isnan()
    assert torch.autograd.gradgradcheck(lambda x: clipped(x * x, 100.0), x)


@fastrnn.cell(
    gates="h",
    states="h",
    params={"gain": fastrnn.Param(init=1.0)},
    initialize=lambda u, v, p: u.h.weight.fill_(3),
)
def begun(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    return torch.tanh(u.h + p.gain * v.h)


VARIANTS: dict[str, Any] = {
    "zoneout": lambda cell: cells.zoneout(cell, 0.1),
    "recurrent_dropout": lambda cell: cells.recurrent_dropout(cell, 0.1),
    "clip_grad": lambda cell: cells.clip_grad(cell, 0.1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_begin_as_their_own_cell_does(name: str) -> None:
    """Cells that differ in their initial values alone are equal."""
    other = dataclasses.replace(
        begun,
        params={"gain": fastrnn.Param(init=2.0)},
        initialize=lambda u, v, p: u.h.weight.fill_(4),
    )
    assert other == begun
    variants = [VARIANTS[name](each) for each in (begun, other)]
    assert variants[0] == variants[1]
    for variant, weight, gain in zip(variants, (3, 4), (1, 2), strict=True):
        layer: Any = fastrnn.Recurrent(variant, 2, 5)
        assert (layer.weight_ih_l0 == weight).all()
        assert (layer.weight_gain_l0 == gain).all()


def test_rates_of_variants() -> None:
    assert cells.zoneout(cells.lstm, numpy.float32(0.5)) == cells.zoneout(cells.lstm, (0.5, 0.5))
    assert cells.zoneout(cells.lstm, (0, 0)) is cells.lstm
    assert cells.recurrent_dropout(cells.gru, 0.0) is cells.gru
    learned: list[Any] = [torch.tensor(0.1), torch.tensor([0.1, 0.2]), (0.1, torch.tensor(0.2))]
    for rate in learned:
        with pytest.raises(ValueError, match="zoneout takes a probability from 0 to 1"):
            cells.zoneout(cells.lstm, rate)
    with pytest.raises(ValueError, match="recurrent_dropout takes a probability from 0 to 1"):
        cells.recurrent_dropout(cells.lstm, learned[0])


def test_draws_are_found_within_the_context_of_another_device() -> None:
    def function(u: Any, v: Any, h: Tensor) -> Tensor:
        return fastrnn.dropout(torch.tanh(u.h + v.h), 0.5) * torch.ones(1, 1)

    with torch.device("meta"):
        cell = fastrnn.cell(gates="h", states="h", name="on_meta")(function).noisy
    assert [draw.probability for draw in cell.draws] == [0.5]


def test_any_gate_can_be_read_after_recurrent_dropout() -> None:
    def function(u: Any, v: Any, h: Tensor) -> Tensor:
        return torch.tanh(u._h + v._h) + v._own

    cell = fastrnn.cell(gates=("_h", "_own"), states="h", name="hidden_gates")(function)
    assert len(cells.recurrent_dropout(cell, 0.5).draws) == 1
