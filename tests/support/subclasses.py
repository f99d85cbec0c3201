"""Subclasses of torch.nn's classes that `replace_` takes."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from tests.support.models import SIZES


class Inheriting(nn.LSTM):
    """Adds an attribute, a buffer and a method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = 2.0
        self.register_buffer("offset", torch.ones(1))

    def last(self, x: Tensor) -> Tensor:
        return self(x)[0][-1] * self.factor + self.offset


class Delegating(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input, hx)
        return output * 2, state


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return function(self, *args)

    return call


class Deeper(Delegating):
    """`super()` in every kind of member."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input, hx)
        return output + self.shift, state

    @property
    def shift(self) -> float:
        return len(super().extra_repr())

    @counted
    def extra_repr(self) -> str:
        return super().extra_repr() + f", {self.label()}, {self.three()}"

    @classmethod
    def label(cls) -> str:
        return getattr(super(), "__name__", cls.__name__)

    @staticmethod
    def three() -> int:
        return 3


class AnyLength(ABC, nn.RNNBase):
    """As in pytorch-forecasting: a second base, whose forward calls torch's."""

    @abstractmethod
    def start(self, x: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)
        if lengths.max() == 0:
            return torch.zeros(*x.shape[:2], self.hidden_size), self.start(x)
        packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False)
        output, state = super().forward(packed, hx=hx)
        return pad_packed_sequence(output)[0], state


class Forecasting(AnyLength, nn.LSTM):
    def start(self, x: Tensor) -> Any:
        zeros = torch.zeros(self.num_layers, x.size(1), self.hidden_size)
        return zeros, zeros


class OldStyle(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        h, c = super(OldStyle, self).forward(input, hx)  # noqa: UP008
        return h * 2, c


KINDS = (Inheriting, Delegating, Deeper, Forecasting, OldStyle)


def made(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module replaced as a subclass, and a copy that was not replaced."""
    module = kind(*SIZES, **options)
    original = copy.deepcopy(module)
    report = fastrnn.replace_(module, subclasses=True)
    assert len(report.replaced) == 1, report
    return module, original


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for each in value for t in flat(each)]


def sample(module: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(3)
    cell = isinstance(module, nn.RNNCellBase)
    return torch.randn(*((3, 5) if cell else (4, 3, 5)), generator=random)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    x = sample(a)
    torch.testing.assert_close(flat(a(x)), flat(b(x)), atol=1e-6, rtol=1e-5)
