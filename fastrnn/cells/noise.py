"""Random numbers within a cell: `dropout` and `bernoulli`.

They are a pure function of a seed and of where they are drawn: the sequence, the time step, the
unit, and the place of the draw in the cell's function. So a forward pass, its recomputation and
every kernel draw the same bits, however the batch is split, sorted or packed. The generator is
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_DRAWS", "Draw", "bernoulli", "drawing", "dropout", "numbers", "seeded"]

MAX_DRAWS = 16  # the masks of Draws in csrc/core/cell.h have room for twice as many
_ONE = 1 << 32  # a probability of 1 as a threshold of 32-bit words


@dataclass(frozen=True)
class Draw:
    """A place of a cell's function that draws a number for each unit: 0 or, with a probability, 1.

    Attributes:
        probability: that of the number other than zero.
        per: "step" for a number for each time step, "sequence" for one for all steps of a sequence.
        scaled: whether the number other than zero is not 1 but 1 / probability, so that the mean
            is 1.
    """

    probability: float
    per: str
    scaled: bool

    @property
    def threshold(self) -> int:
        """The number is not zero where a random word of 32 bits is smaller."""
        return round(self.probability * _ONE)


_Source = Callable[[Draw], Tensor]


class _Active(threading.local):
    source: _Source | None = None


_active = _Active()


@contextmanager
def drawing(source: _Source) -> Iterator[None]:
    """Draw from `source` within the block, which runs a cell's function in training."""
    before = _active.source
    _active.source = source
    try:
        yield
    finally:
        _active.source = before


def bernoulli(probability: float, per: str = "step") -> Any:
    """Draw 1 with a probability and else 0, for each unit of a cell.

    It is for functions of `fastrnn.cell`. Outside training it gives the probability, which is the
    mean: so choose by `stay * a + (1 - stay) * b`, not by `torch.where`.

    Args:
        probability: a number from 0 to 1; it cannot be learned.
        per: "step" to draw for each time step, "sequence" to draw once for all steps of a sequence.

    Returns:
        In training a tensor like the states, else a float.

    Raises:
        ValueError: if `probability` or `per` is out of range.

    Example:
        >>> import torch, fastrnn
        >>> @fastrnn.cell(gates="h", states="h")
        ... def zoneout(u, v, h):  # Krueger et al. 2017, arXiv:1606.01305
        ...     stay = fastrnn.bernoulli(0.1)
        ...     return stay * h + (1 - stay) * torch.tanh(u.h + v.h)
        >>> fastrnn.Recurrent(zoneout, 4, 8)(torch.randn(5, 3, 4))[0].shape
        torch.Size([5, 3, 8])
    """
    _check("bernoulli", probability, per)
    source = _active.source
    if source is None or probability in (0, 1):
        return float(probability)
    return source(Draw(float(probability), per, scaled=False))


def dropout(x: Tensor, p: float = 0.5, per: str = "step") -> Tensor:
    """Zero units of a cell at random, and scale the others by 1 / (1 - p), in training.

    It is for functions of `fastrnn.cell`. Outside training it gives `x`.

    Args:
        x: a value with a number for each unit.
        p: the probability of zero; it cannot be learned.
        per: "step" to draw for each time step (Semeniuta et al. 2016, arXiv:1603.05118),
            "sequence" to draw once for all steps of a sequence, which is called variational (Gal
            and Ghahramani 2016, arXiv:1512.05287).

    Raises:
        ValueError: if `p` or `per` is out of range.

    Example:
        >>> import torch, fastrnn
        >>> @fastrnn.cell(gates="h", states="h")
        ... def variational(u, v, h):
        ...     return torch.tanh(u.h + v(fastrnn.dropout(h, 0.25, per="sequence")).h)
        >>> fastrnn.Recurrent(variational, 4, 8)(torch.randn(5, 3, 4))[0].shape
        torch.Size([5, 3, 8])
    """
    _check("dropout", p, per)
    source = _active.source
    if source is None or p == 0:
        return x
    if p == 1:
        return x * 0.0
    return x * source(Draw(1 - float(p), per, scaled=True))


def _check(name: str, probability: Any, per: str) -> None:
    if isinstance(probability, Tensor) or not 0 <= probability <= 1:
        raise ValueError(f"{name} takes a probability from 0 to 1, got {probability!r}")
    if per not in ("step", "sequence"):
        raise ValueError(f"{name} draws per='step' or per='sequence', got {per!r}")


# The operand of a scan, and the numbers that follow from it.


def seeded(draws: Sequence[Draw], like: Tensor, order: Tensor | None = None) -> Tensor:
    """The operand `noise` of a scan on the device of `like`, int64: a seed from torch's generator,
    the thresholds of the draws, and the caller's index of every sequence, if there is an order."""
    seed = torch.randint(0, (1 << 63) - 1, (1,), dtype=torch.int64, device=like.device)
    thresholds = torch.tensor([d.threshold for d in draws], dtype=torch.int64, device=like.device)
    return torch.cat([seed, thresholds] if order is None else [seed, thresholds, order])


def numbers(
    draws: Sequence[Draw], noise: Tensor, recurrence: int, size: tuple[int, int, int]
) -> list[Tensor]:
    """The numbers of every draw of a recurrence, float64 [T, B, H], or [1, B, H] if they are drawn
    per sequence. `size` is (T, B, H)."""
    steps, batch, hidden = size
    device, count = noise.device, len(draws)
    sequences = noise[1 + count :]
    if not sequences.numel():
        sequences = torch.arange(batch, device=device)
    unit = torch.arange(hidden, device=device)
    counter = unit // 64 * 8 + unit % 16 // 2
    word, rotated = unit // 16 % 2 * 2 + unit % 2, unit // 32 % 2 == 1
    made = []
    for k, draw in enumerate(draws):
        every = [_WORD] if draw.per == "sequence" else range(steps)
        step = torch.tensor(list(every), dtype=torch.int64, device=device)
        words = philox(
            noise[0],
            counter,
            step[:, None, None],
            sequences[None, :, None],
            torch.tensor(recurrence << 16 | k, device=device),
        )
        one = torch.stack(words).gather(0, word.expand(1, *words[0].shape))[0]
        mine = torch.where(rotated, (one << 16 | one >> 16) & _WORD, one)
        value = _ONE / noise[1 + k].double() if draw.scaled else 1.0
        made.append(torch.where(mine < noise[1 + k], value, 0.0))
    return made


_WORD = 0xFFFFFFFF


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 bits, int64, for four words of a counter that broadcast."""
    a, b, c, d = torch.broadcast_tensors(*counter)
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, a)
        high1, low1 = _product(0xCD9E8D57, c)
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return a, b, c, d


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of 32-bit words."""
    # 64 bits would overflow int64, so the factor is taken in halves.
    low, high = words * (factor & 0xFFFF), words * (factor >> 16)
    middle = (low >> 16) + high
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF
