"""transformers' EnCodec: two LSTMs between the convolutions of an audio codec's encoder, two in its
decoder. Trained weights come from a hub, so these are random, in the default sizes (24 kHz)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EncodecConfig, EncodecModel

import fastrnn
from tests.clients.support import (
    Client,
    Ratio,
    assert_checkpoints_pass,
    assert_restores,
    assert_same,
    assert_same_gradients,
    assert_same_outputs,
    dtype_of,
    kinds,
    replaced,
    speech,
)

CLIENT = Client("transformers", "EnCodec: LSTM 512, 2 layers, in encoder and decoder")


@pytest.fixture
def torchs() -> nn.Module:
    return EncodecModel(EncodecConfig()).eval()


@pytest.fixture
def ours(torchs: nn.Module) -> nn.Module:
    return replaced(torchs)


@pytest.fixture(scope="module")
def audio() -> Tensor:
    """Half a second in two rows, [2, 1, 12000]."""
    return torch.from_numpy(speech(1, 24000)).reshape(2, 1, 12000)


def code(model: nn.Module, audio: Tensor) -> tuple[Tensor, Tensor]:
    """The input of the quantiser, and the decoder's output for it."""
    embeddings = model.encoder(audio.to(dtype_of(model)))
    return embeddings, model.decoder(embeddings)


@torch.no_grad()
def test_codes_and_audio(ours: nn.Module, torchs: nn.Module, audio: Tensor) -> None:
    codes = [model.encode(audio, bandwidth=6.0) for model in (ours, torchs)]
    assert torch.equal(*(each.audio_codes for each in codes))
    decoded = [
        model.decode(codes[1].audio_codes, codes[1].audio_scales).audio_values
        for model in (ours, torchs)
    ]
    assert_same(*decoded, within=1e-5)
    assert_same(ours(audio).audio_values, torchs(audio).audio_values, 1e-5)
    assert_same_outputs(ours, torchs, lambda model: code(model, audio))


def test_gradients(ours: nn.Module, torchs: nn.Module, audio: Tensor) -> None:
    piece = audio[..., :6080]  # for this length the decoder returns as many samples

    def loss(model: nn.Module) -> Tensor:
        """The squared difference of output and input."""
        return (code(model, piece)[1] - piece.to(dtype_of(model))).square().sum()

    assert_same_gradients(ours, torchs, loss)


@torch.no_grad()
def test_checkpoints_and_restore(
    ours: nn.Module, torchs: nn.Module, audio: Tensor, tmp_path: Path
) -> None:
    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        return code(model, audio)

    # Its convolutions are parametrized, and torch cannot pickle such modules whole.
    assert_checkpoints_pass(ours, torchs, run, whole=False)
    assert_restores(ours, torchs, run)

    # The client's own folders, saved and loaded both ways.
    ours.save_pretrained(tmp_path / "ours")
    loaded = EncodecModel.from_pretrained(tmp_path / "ours").eval()
    assert kinds(loaded) == kinds(torchs)
    assert_same(run(loaded), run(torchs), 0)
    fastrnn.replace_(loaded)
    assert_same(run(loaded), run(ours), 0)


@torch.no_grad()
def test_compile(ours: nn.Module, torchs: nn.Module, audio: Tensor) -> None:
    """The client's padding breaks the graph of its encoder; the block with our LSTM is whole."""
    encoder = torch.compile(copy.deepcopy(ours.encoder), backend="aot_eager")
    assert_same(encoder(audio), torchs.encoder(audio), 1e-5)
    x = torch.randn(1, 512, 20)
    blocks = [recurrent(model) for model in (ours, torchs)]
    whole = torch.compile(copy.deepcopy(blocks[0]), backend="aot_eager", fullgraph=True)
    assert_same(whole(x), blocks[1](x), 1e-5)


def recurrent(model: nn.Module) -> nn.Module:
    """The encoder's block of LSTMs."""
    return next(layer for layer in model.encoder.layers if hasattr(layer, "lstm"))


def test_times(ours: nn.Module, torchs: nn.Module, audio: Tensor, ratio: Ratio) -> None:
    ratio(
        CLIENT,
        "2 rows of 0.5 s, coded and decoded",
        lambda: torchs(audio).audio_values,
        lambda: ours(audio).audio_values,
        within=1e-5,
    )
    x = torch.randn(1, 512, 75)
    blocks = [recurrent(model) for model in (torchs, ours)]
    ratio(
        CLIENT,
        "its LSTMs, 1 s",
        lambda: blocks[0](x),
        lambda: blocks[1](x),
        within=1e-5,
    )

    def training(model: nn.Module) -> Any:
        loss = code(model, audio)[1].square().sum()
        parts = [*model.encoder.parameters(), *model.decoder.parameters()]
        return torch.autograd.grad(loss, parts)

    ratio(
        CLIENT,
        "2 rows of 0.5 s, gradients",
        lambda: training(torchs),
        lambda: training(ours),
        within=1e-5,
        grad=True,
    )
