"""BeatNet tracks beats: a convolution over a spectrogram, two LSTMs, of three classes each frame.

The spectrogram and the steps after the network (particle filters, a dynamic Bayesian network) need
madmom, whose last release builds with no Python since 3.10. Microphones need PyAudio. Both packages
have stand-ins here, and this file defines the spectrogram. The network, its weights and its calls
are the client's own: a whole file at once, or frame by frame with states kept in the model.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

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
    stand_ins,
)

CLIENT = Client("BeatNet", "LSTM 150, 2 layers", trained=True)
RATE, HOP, WINDOW, BANDS = 22050, 441, 1411, 136


@pytest.fixture(scope="module")
def package() -> types.ModuleType:
    absent = ["pyaudio", "matplotlib", "matplotlib.pyplot", "madmom", "madmom.features"]
    absent += ["BeatNet.log_spect", "BeatNet.particle_filtering_cascade"]  # these import madmom
    with stand_ins(*absent):
        import BeatNet.BeatNet

        return BeatNet.BeatNet


class Spectrogram:
    """Logarithmic magnitudes in bands of a 24th of an octave, and their increase per frame."""

    def __init__(self) -> None:
        edges = np.geomspace(30, 10500, BANDS + 2) * WINDOW / RATE
        bins = np.arange(WINDOW // 2 + 1)
        rising = (bins[None] - edges[:-2, None]) / np.maximum(edges[1:-1] - edges[:-2], 1)[:, None]
        falling = (edges[2:, None] - bins[None]) / np.maximum(edges[2:] - edges[1:-1], 1)[:, None]
        filters = np.clip(np.minimum(rising, falling), 0, None)
        self.filters = filters / np.maximum(filters.sum(1, keepdims=True), 1)

    def process_audio(self, audio: np.ndarray) -> np.ndarray:
        """[samples] to [2 * bands, frames], as in the client."""
        padded = np.pad(audio, (WINDOW // 2, WINDOW // 2))
        frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
        spectrum = np.abs(np.fft.rfft(frames * np.hanning(WINDOW)))
        bands = np.log10(1 + spectrum @ self.filters.T)
        grown = np.clip(np.diff(bands, axis=0, prepend=bands[:1]), 0, None)
        return np.hstack([bands, grown]).astype(np.float32).T


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """Six seconds of drums, 120 beats a minute, and a tone below."""
    random = np.random.default_rng(0)
    time = np.arange(6 * RATE) / RATE
    since = time % 0.5
    drum = np.exp(-30 * since) * np.sin(2 * np.pi * 60 * since)
    stick = np.exp(-80 * since) * random.standard_normal(len(time))
    tone = np.sin(2 * np.pi * 220 * time)
    return (0.5 * drum + 0.2 * stick + 0.05 * tone).astype(np.float32)


@pytest.fixture
def tracker(package: types.ModuleType) -> Any:
    made = package.BeatNet(1, mode="online", inference_model="PF")
    made.proc = Spectrogram()
    return made


@pytest.fixture
def torchs(tracker: Any) -> nn.Module:
    return tracker.model


@pytest.fixture
def ours(torchs: nn.Module) -> nn.Module:
    return replaced(torchs)


def forget(model: nn.Module) -> None:
    """Clears the states that the client's model keeps from call to call."""
    model.hidden = model.cell = torch.zeros(2, 1, 150, dtype=dtype_of(model))


def run(model: nn.Module, features: Tensor) -> Tensor:
    forget(model)
    return model(features.to(dtype_of(model)))


@pytest.fixture(scope="module")
def features(audio: np.ndarray) -> Tensor:
    return torch.from_numpy(Spectrogram().process_audio(audio).T)[None]


def test_activations(
    tracker: Any, ours: nn.Module, torchs: nn.Module, audio: np.ndarray, features: Tensor
) -> None:
    found = []
    for model in (ours, torchs):
        tracker.model = model
        forget(model)
        found.append(tracker.activation_extractor_online(audio))
    assert_same(*found, within=1e-5)
    later = found[1][100:]  # the network needs two seconds to find the beat
    assert later.sum(1).max() > 0.5, "the client hears beats"
    with torch.no_grad():
        assert_same_outputs(ours, torchs, lambda model: run(model, features))


def test_frame_by_frame(tracker: Any, ours: nn.Module, torchs: nn.Module, audio: Any) -> None:
    found = []
    for model in (ours, torchs):
        tracker.model, tracker.mode = model, "realtime"
        tracker.counter, tracker.completed = 0, 0
        forget(model)
        frames = []
        while True:
            tracker.activation_extractor_realtime(audio)
            if tracker.completed:
                break
            frames.append(tracker.pred)
            tracker.counter += 1
        found.append(np.concatenate(frames[2:]))
    assert_same(*found, within=1e-5)
    assert len(found[0]) > 250


def test_quantised(
    ours: nn.Module, torchs: nn.Module, features: Tensor, quantised: Quantised
) -> None:
    def classes(model: nn.Module) -> Tensor:
        """Beat, first beat of a bar, or neither."""
        with torch.no_grad():
            return run(model, features).argmax(1)

    quantised(CLIENT, "beats, first beats and other frames, 6 s", ours, torchs, classes)


def test_gradients(ours: nn.Module, torchs: nn.Module, features: Tensor) -> None:
    classes = torch.arange(features.shape[1])[None] % 3

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(run(model, features), classes)

    assert_same_gradients(ours, torchs, loss)


@torch.no_grad()
def test_checkpoints_and_restore(ours: nn.Module, torchs: nn.Module, features: Tensor) -> None:
    def call(model: nn.Module) -> Tensor:
        return run(model, features)

    assert_checkpoints_pass(ours, torchs, call)
    assert_restores(ours, torchs, call)


def test_times(ours: nn.Module, torchs: nn.Module, features: Tensor, ratio: Ratio) -> None:
    ratio(
        CLIENT,
        f"the network, a file of {features.shape[1]} frames",
        lambda: run(torchs, features),
        lambda: run(ours, features),
        within=1e-5,
    )
    frame = features[:, :1]
    ratio(
        CLIENT,
        "the network, a frame of 20 ms",
        lambda: run(torchs, frame),
        lambda: run(ours, frame),
        within=1e-5,
    )

    x = torch.randn(1, 1, 150)
    stepper = ours.lstm.stream()
    zeros = (torch.zeros(2, 1, 150), torch.zeros(2, 1, 150))
    state = ours.lstm(x, zeros)[1]
    step, out = x[0].numpy(), np.empty((1, 150), "float32")

    def stream() -> np.ndarray:
        stepper.step(step, out)
        return out

    ratio(
        CLIENT,
        "the LSTMs, a frame",
        lambda: torchs.lstm(x, state)[0][0].numpy(),
        lambda: ours.lstm(x, state)[0][0].numpy(),
        within=1e-6,
    )
    # Both are compared at the second step. The stepper then steps on.
    stepper.state = state
    ratio(
        CLIENT,
        "the LSTMs, a frame; ours a stepper",
        lambda: torchs.lstm(x, state)[0][0].numpy(),
        stream,
        within=1e-6,
    )

    def training(model: nn.Module) -> Any:
        loss = run(model, features).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    ratio(
        CLIENT,
        f"gradients, {features.shape[1]} frames",
        lambda: training(torchs),
        lambda: training(ours),
        within=1e-5,
        grad=True,
    )
