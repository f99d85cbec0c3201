"""Resemblyzer embeds voices: three LSTMs over partial utterances of 1.6 s, whose last state is
used. Loudness, voice activity and spectrograms are the client's own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.clients.support import (
    Client,
    Quantised,
    Ratio,
    assert_checkpoints_pass,
    assert_restores,
    assert_same,
    assert_same_gradients,
    assert_same_outputs,
    dtype_of,
    replaced,
    speech,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of names in SciPy
    import resemblyzer

CLIENT = Client("Resemblyzer", "LSTM 256, 3 layers", trained=True)


@pytest.fixture(scope="module")
def torchs() -> nn.Module:
    return resemblyzer.VoiceEncoder("cpu", verbose=False).eval()


@pytest.fixture
def ours(torchs: nn.Module) -> nn.Module:
    return replaced(torchs)


@pytest.fixture(scope="module")
def voices() -> list[np.ndarray]:
    """Two pieces of one voice and one of another, higher voice."""
    low = [resemblyzer.preprocess_wav(speech(6, 16000, seed)) for seed in (0, 1)]
    high = resemblyzer.preprocess_wav(speech(6, 10000, 2), source_sr=7000)
    return [*low, high]


@pytest.fixture(scope="module")
def mels(voices: list[np.ndarray]) -> Tensor:
    """Partial utterances, [4, 160, 40]."""
    spectrogram = resemblyzer.wav_to_mel_spectrogram(voices[0])
    return torch.from_numpy(np.stack([spectrogram[n : n + 160] for n in range(0, 160, 40)]))


def embed(model: nn.Module, mels: Tensor) -> Tensor:
    return model(mels.to(dtype_of(model)))


def test_embeddings(ours: nn.Module, torchs: nn.Module, voices: list, mels: Tensor) -> None:
    found = [[model.embed_utterance(voice) for voice in voices] for model in (ours, torchs)]
    assert_same(*found, within=1e-5)
    first, second, other = found[1]
    assert first @ second > first @ other, "the client tells voices apart"
    assert_same(*(model.embed_speaker(voices[:2]) for model in (ours, torchs)), within=1e-5)
    with torch.no_grad():
        assert_same_outputs(ours, torchs, lambda model: embed(model, mels))


def test_quantised(ours: nn.Module, torchs: nn.Module, voices: list, quantised: Quantised) -> None:
    def similarities(model: nn.Module) -> Tensor:
        embedded = np.stack([model.embed_utterance(voice) for voice in voices])
        return torch.from_numpy(embedded @ embedded.T)

    # Integers of 8 bits are too coarse for its weights: similarities move, their order stays.
    before = quantised(
        CLIENT,
        "similarities of 3 utterances",
        ours,
        torchs,
        similarities,
        most={"int8": 0.1},
    )
    coarse = copy.deepcopy(ours)
    fastrnn.quantize_(coarse)
    for found in (before, similarities(coarse)):
        assert found[0, 1] > found[:2, 2].max() + 0.2, "the client tells voices apart"


def test_gradients(ours: nn.Module, torchs: nn.Module, mels: Tensor) -> None:
    def loss(model: nn.Module) -> Tensor:
        """A loss that pushes the pieces of two voices apart."""
        embedded = embed(model, mels)
        return (embedded[:2] @ embedded[2:].T).sum()

    assert_same_gradients(ours, torchs, loss)


@torch.no_grad()
def test_checkpoints_and_restore(ours: nn.Module, torchs: nn.Module, mels: Tensor) -> None:
    def run(model: nn.Module) -> Tensor:
        return embed(model, mels)

    assert_checkpoints_pass(ours, torchs, run)
    assert_restores(ours, torchs, run)


def test_times(
    ours: nn.Module, torchs: nn.Module, voices: list, mels: Tensor, ratio: Ratio
) -> None:
    ratio(
        CLIENT,
        "embed_utterance, 6 s, with spectrograms",
        lambda: torchs.embed_utterance(voices[0]),
        lambda: ours.embed_utterance(voices[0]),
        within=1e-5,
    )
    ratio(
        CLIENT,
        "the network, 1 partial utterance",
        lambda: torchs(mels[:1]),
        lambda: ours(mels[:1]),
        within=1e-5,
    )

    def training(model: nn.Module) -> Any:
        embedded = model(mels)
        loss = (embedded[:2] @ embedded[2:].T).sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    ratio(
        CLIENT,
        "gradients, 4 partial utterances",
        lambda: training(torchs),
        lambda: training(ours),
        within=1e-5,
        grad=True,
    )
