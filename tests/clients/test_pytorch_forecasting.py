"""pytorch-forecasting's RecurrentNetwork: an LSTM that encodes the past and decodes the forecast,
over rows of different length.

Its LSTM is a subclass of torch.nn's that packs its input and accepts rows of length 0. `replace_`
skips it without `subclasses=True`. Two ways are tested: that option, and our LSTM with `lengths=`,
which does the subclass's work.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.clients.support import (
    Client,
    Ratio,
    assert_checkpoints_pass,
    assert_restores,
    assert_same_gradients,
    assert_same_outputs,
    dtype_of,
    replaced,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet
    from pytorch_forecasting.models.nn import rnn as theirs

CLIENT = Client("pytorch-forecasting", "LSTM 64, 2 layers, packed")


class WithLengths(fastrnn.LSTM):
    """The layer without packing: rows of length 0 keep their state, as in the client's class."""

    def forward(  # type: ignore[override]
        self, x: Any, hx: Any = None, lengths: Any = None, enforce_sorted: bool = True
    ) -> Any:
        output: Any
        output, states = super().forward(x, hx, lengths=lengths)
        return output if lengths is None else output[:, : lengths.max()], states

    init_hidden_state = theirs.LSTM.init_hidden_state
    repeat_interleave = theirs.LSTM.repeat_interleave


@pytest.fixture(scope="module")
def dataset() -> TimeSeriesDataSet:
    """32 noisy waves of different lengths."""
    random = np.random.default_rng(0)
    waves = []
    for number in range(32):
        time = np.arange(random.integers(30, 90))
        value = np.sin(time / 5 + number) + 0.1 * random.standard_normal(len(time))
        waves.append(pandas.DataFrame({"time": time, "series": str(number), "value": value}))
    return TimeSeriesDataSet(
        pandas.concat(waves, ignore_index=True),
        time_idx="time",
        target="value",
        group_ids=["series"],
        min_encoder_length=4,
        max_encoder_length=60,
        max_prediction_length=8,
        min_prediction_length=1,
        time_varying_unknown_reals=["value"],
    )


@pytest.fixture(scope="module")
def batch(dataset: TimeSeriesDataSet) -> tuple[dict[str, Tensor], Any]:
    """Rows of different lengths, some of which encode only one step."""
    torch.manual_seed(0)
    x, y = next(iter(dataset.to_dataloader(train=True, batch_size=64)))
    assert x["encoder_lengths"].unique().numel() > 10
    x["encoder_lengths"] = x["encoder_lengths"].clone()
    x["encoder_lengths"][:3] = 1  # the client feeds one step less, that is none
    return x, y


@pytest.fixture
def torchs(dataset: TimeSeriesDataSet) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RecurrentNetwork.from_dataset(
            dataset, cell_type="LSTM", hidden_size=64, rnn_layers=2, dropout=0.1
        ).eval()


def with_subclass(model: nn.Module) -> nn.Module:
    """A copy of the model whose LSTM is the client's own class on our layer."""
    return replaced(model, subclasses=True)


def with_lengths(model: nn.Module) -> nn.Module:
    """A copy of the model whose LSTM takes `lengths=` and packs nothing."""
    ours = copy.deepcopy(model)
    before = ours.rnn
    ours.rnn = WithLengths(
        before.input_size,
        before.hidden_size,
        before.num_layers,
        batch_first=before.batch_first,
        dropout=before.dropout,
    ).train(model.training)
    ours.rnn.load_state_dict(before.state_dict())
    return ours


@pytest.fixture(params=[with_subclass, with_lengths])
def ours(torchs: nn.Module, request: pytest.FixtureRequest) -> nn.Module:
    return request.param(torchs)


def forecast(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    dtype = dtype_of(model)
    x = {k: t.to(dtype) if t.is_floating_point() else t for k, t in x.items()}
    return model(x).prediction


def test_the_subclass_is_left_alone(torchs: nn.Module) -> None:
    report = fastrnn.replace_(torchs)
    assert not report.replaced
    ((name, _, reason),) = report.skipped
    assert name == "rnn"
    assert "subclass" in reason


def test_the_subclass_is_replaced_when_asked(torchs: nn.Module) -> None:
    """The new class has the methods of the client's class, but is no subclass of it."""
    rnn = with_subclass(torchs).rnn
    assert isinstance(rnn, fastrnn.LSTM)
    assert isinstance(rnn, theirs.RNN)
    assert not isinstance(rnn, theirs.LSTM)
    assert type(rnn).__name__ == "LSTM"


@torch.no_grad()
def test_forecasts(ours: nn.Module, torchs: nn.Module, batch: Any) -> None:
    """Outside of training, the client decodes step by step from its own forecasts."""
    x, _ = batch
    assert_same_outputs(ours, torchs, lambda model: forecast(model, x))


def test_gradients(ours: nn.Module, torchs: nn.Module, batch: Any) -> None:
    """The client's loss, with dropout between the layers."""
    x, (target, weight) = batch
    if isinstance(ours.rnn, WithLengths):  # dropout would draw for rows in another order
        ours.rnn.dropout = torchs.rnn.dropout = 0

    def loss(model: nn.Module) -> Tensor:
        return model.loss(forecast(model, x), (target.to(dtype_of(model)), weight))

    assert_same_gradients(ours, torchs, loss)


@torch.no_grad()
def test_checkpoints(ours: nn.Module, torchs: nn.Module, batch: Any) -> None:
    assert_checkpoints_pass(ours, torchs, lambda model: forecast(model, batch[0]))


@torch.no_grad()
def test_restore(torchs: nn.Module, batch: Any) -> None:
    assert_restores(with_subclass(torchs), torchs, lambda model: forecast(model, batch[0]))


def test_times(torchs: nn.Module, batch: Any, ratio: Ratio) -> None:
    x, _ = batch
    ways = {"replace_(subclasses=True)": with_subclass(torchs), "lengths=": with_lengths(torchs)}
    shape = f"{len(x['encoder_lengths'])} rows of up to {x['encoder_cont'].shape[1]} steps"
    for way, ours in ways.items():
        ratio(
            CLIENT,
            f"encoding, {shape}; {way}",
            lambda: torchs.encode(x),
            lambda ours=ours: ours.encode(x),
            within=1e-5,
        )

    for model in (torchs, *ways.values()):
        model.train().rnn.dropout = 0

    def training(model: nn.Module) -> Any:
        loss = model.loss(forecast(model, x), batch[1])
        return torch.autograd.grad(loss, list(model.parameters()))

    for way, ours in ways.items():
        ratio(
            CLIENT,
            f"gradients of the network, {shape}; {way}",
            lambda: training(torchs),
            lambda ours=ours: training(ours),
            within=1e-5,
            grad=True,
        )
