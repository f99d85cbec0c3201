"""The answers of `isinstance` for our modules: docs/drop-in.md rests on these facts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn

SIZES = (3, 5)


class Asks(nn.Module):
    """A forward that branches on the class of its layer, as users write it."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.LSTM):
            x = x + 1
        if isinstance(self.rnn, (nn.RNN, nn.LSTM)):
            x = x + 10
        if isinstance(self.rnn, nn.RNN | nn.LSTM):
            x = x + 100
        if isinstance(self.rnn, nn.RNNBase):
            x = x + 1000
        if isinstance(self.rnn, (nn.LSTMCell, nn.GRUCell)):
            x = x + 10000
        if issubclass(type(self.rnn), nn.LSTM):
            x = x + 100000
        return x


def answers(rnn: nn.Module) -> tuple[float, float]:
    """The answers, eager and compiled, as sums of powers of two."""
    model = Asks(rnn)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    return model(torch.zeros(1)).item(), compiled(torch.zeros(1)).item()


@pytest.mark.parametrize(
    ("kind", "expected"), [("LSTM", 1000), ("GRU", 1000), ("LSTMCell", 10000), ("RNNCell", 0)]
)
def test_eager_and_compiled_code_get_the_same_answers(kind: str, expected: float) -> None:
    assert answers(getattr(fastrnn, kind)(*SIZES)) == (expected, expected)


# The two facts that decide against `isinstance(layer, nn.LSTM)` being True. If torch changes one of
# them, a test fails, and the decision can be taken anew.


class Claims(fastrnn.LSTM):
    """Claims to `isinstance` to be torch.nn's class; nothing else of it is torch.nn's."""

    @property
    def __class__(self) -> Any:
        return nn.LSTM

    @__class__.setter
    def __class__(self, kind: Any) -> None: ...


class ClaimsToOthers(fastrnn.LSTM):
    """Claims it to all callers except Dynamo's check for refused classes."""

    @property
    def __class__(self) -> Any:
        caller = __import__("sys")._getframe(1)
        return type(self) if caller.f_code.co_name == "wrap_module" else nn.LSTM

    @__class__.setter
    def __class__(self, kind: Any) -> None: ...


def test_dynamo_refuses_whatever_is_an_instance() -> None:
    assert isinstance(Claims(*SIZES), nn.LSTM)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        answers(Claims(*SIZES))


def test_a_claim_that_dynamos_check_does_not_see_splits_eager_from_compiled() -> None:
    """Dynamo asks the object about one class, but its type about a tuple or a union of classes."""
    assert answers(ClaimsToOthers(*SIZES)) == (1111, 1001)


def test_torchs_classes_take_no_other_metaclass() -> None:
    class Meta(type):
        pass

    with pytest.raises(TypeError, match="__class__ assignment"):
        nn.LSTM.__class__ = Meta  # type: ignore[method-assign, assignment]


def test_what_asks_torchs_own_attribute_works_for_both() -> None:
    for layer in (nn.LSTM(*SIZES), fastrnn.LSTM(*SIZES)):
        assert isinstance(layer, nn.RNNBase) and layer.mode == "LSTM"
