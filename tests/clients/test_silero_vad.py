"""silero-vad finds speech, frame by frame: convolutions, then an LSTMCell whose state the model
keeps between calls.

The wheel ships a TorchScript file, in which `replace_` changes nothing, as its report says. So this
file defines the network of the script's code, with the file's weights; the file itself is the
reference. The client scripts its network, so the replaced network is scripted too.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import silero_vad
import torch
import torch.nn.functional as F
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

CLIENT = Client("silero-vad", "LSTMCell 128, one call a frame of 32 ms", trained=True)
RATE, FRAME, CONTEXT = 16000, 512, 64


class Network(nn.Module):
    """The network of the file's `_model` at 16 kHz."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.encoder = nn.Sequential(
            *(nn.Conv1d(129, 128, 3, padding=1), nn.ReLU()),
            *(nn.Conv1d(128, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv1d(64, 128, 3, padding=1), nn.ReLU()),
        )
        self.rnn = nn.LSTMCell(128, 128)
        self.out = nn.Conv1d(128, 1, 1)

    def features(self, x: Tensor) -> Tensor:
        """Frames [B, context + samples] to [B, 128]."""
        x = self.stft(F.pad(x, (0, 64), mode="reflect").unsqueeze(1))
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        return self.encoder(x).squeeze(-1)

    def probability(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self.out(torch.relu(h.unsqueeze(-1)))).squeeze(1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, c = self.rnn(self.features(x), (state[0], state[1]))
        return self.probability(h), torch.stack([h, c])


class Detector(nn.Module):
    """The model of the file: it cuts the context and keeps context and state, as
    `get_speech_timestamps` and `VADIterator` expect."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.reset_states()

    def reset_states(self) -> None:
        self.context, self.state = torch.zeros(1, CONTEXT), torch.zeros(2, 1, 128)

    def forward(self, x: Tensor, sr: int) -> Tensor:
        x = torch.cat([self.context, x.reshape(1, FRAME)], 1)
        probability, self.state = self.network(x, self.state)
        self.context = x[:, -CONTEXT:]
        return probability


@pytest.fixture(scope="module")
def scripted() -> torch.jit.ScriptModule:
    return silero_vad.load_silero_vad()


@pytest.fixture(scope="module")
def torchs(scripted: torch.jit.ScriptModule) -> Network:
    values = {}
    for name, tensor in scripted._model.state_dict().items():
        name = name.replace("stft.forward_basis_buffer", "stft.weight").replace(
            "decoder.rnn", "rnn"
        )
        name = name.replace(".reparam_conv", "").replace("decoder.decoder.2", "out")
        first, number, *rest = name.split(".")
        if first == "encoder":  # an activation follows each convolution
            name = ".".join([first, str(2 * int(number)), *rest])
        values[name] = tensor.detach().clone()
    network = Network().eval()
    network.load_state_dict(values)
    return network


@pytest.fixture
def ours(torchs: Network) -> nn.Module:
    return replaced(torchs)


@pytest.fixture(scope="module")
def audio() -> Tensor:
    return torch.from_numpy(speech(8, RATE))


def probabilities(network: nn.Module, audio: Tensor) -> Tensor:
    """One call per frame, as the client reads a file."""
    detector = Detector(network)
    detector.context = detector.context.to(dtype_of(network))
    detector.state = detector.state.to(dtype_of(network))
    frames = audio.to(dtype_of(network)).split(FRAME)
    return torch.cat([detector(frame, RATE) for frame in frames if len(frame) == FRAME])


def test_the_file_is_left_alone(scripted: torch.jit.ScriptModule) -> None:
    report = fastrnn.replace_(scripted)
    assert not report.replaced
    assert {s.name for s in report.skipped} == {"_model.decoder.rnn", "_model_8k.decoder.rnn"}
    assert all("scripted" in s.reason for s in report.skipped)


@torch.no_grad()
def test_probabilities(
    scripted: torch.jit.ScriptModule, torchs: Network, ours: nn.Module, audio: Tensor
) -> None:
    scripted.reset_states()
    file = torch.cat([scripted(f, RATE) for f in audio.split(FRAME) if len(f) == FRAME])
    assert file.max() > 0.9 and file.min() < 0.1, "speech and pauses"
    assert_same(probabilities(torchs, audio), file, 1e-5)
    assert_same(probabilities(ours, audio), file, 1e-5)
    assert_same_outputs(ours, torchs, lambda model: probabilities(model, audio))


def test_timestamps(scripted: torch.jit.ScriptModule, ours: nn.Module, audio: Tensor) -> None:
    find = silero_vad.get_speech_timestamps
    found = find(audio, Detector(ours))
    assert len(found) > 1
    assert found == find(audio, scripted)

    iterators = [silero_vad.VADIterator(model) for model in (scripted, Detector(ours))]
    for frame in audio.split(FRAME)[:-1]:
        assert iterators[0](frame) == iterators[1](frame)


def test_quantised(ours: nn.Module, torchs: Network, quantised: Quantised) -> None:
    noise = 0.01 * torch.randn(60 * RATE, generator=torch.Generator().manual_seed(0))
    minute = torch.from_numpy(speech(60, RATE, 1)) + noise

    def speaks(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return probabilities(model, minute) > 0.5

    found = quantised(CLIENT, "frames of 32 ms that are speech, of 60 s", ours, torchs, speaks)
    assert 0.2 < found.float().mean() < 0.9, "there is speech, and there are pauses"


def test_gradients(ours: nn.Module, torchs: Network, audio: Tensor) -> None:
    wanted = torch.linspace(0, 1, 16)[:, None]

    def loss(model: nn.Module) -> Tensor:
        found = probabilities(model, audio[: 16 * FRAME])
        return F.binary_cross_entropy(found, wanted.to(found.dtype))

    assert_same_gradients(ours, torchs, loss)


@torch.no_grad()
def test_checkpoints_and_restore(ours: nn.Module, torchs: Network, audio: Tensor) -> None:
    def run(model: nn.Module) -> Tensor:
        return probabilities(model, audio[: 8 * FRAME])

    assert_checkpoints_pass(ours, torchs, run)
    assert_restores(ours, torchs, run)


@torch.no_grad()
def test_script(ours: nn.Module, torchs: Network, audio: Tensor) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(ours), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    frames = audio[: 8 * FRAME].split(FRAME)
    detectors = [Detector(loaded), Detector(torchs)]
    for frame in frames:
        assert_same(detectors[0](frame, RATE), detectors[1](frame, RATE), 1e-6)


@torch.no_grad()
def test_compile(ours: nn.Module, torchs: Network, audio: Tensor) -> None:
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    x, state = audio[: FRAME + CONTEXT][None], torch.zeros(2, 1, 128)
    assert_same(compiled(x, state), torchs(x, state), 1e-5)


def test_times(ours: nn.Module, torchs: Network, audio: Tensor, ratio: Ratio) -> None:
    network = copy.deepcopy(torchs)
    x, state = torch.randn(1, 128), (torch.randn(1, 128), torch.randn(1, 128))
    # 1e-5: sums are taken in another order, and 250 frames of exponentials amplify it.
    ratio(
        CLIENT,
        "the cell, a frame",
        lambda: network.rnn(x, state),
        lambda: ours.rnn(x, state),
        within=1e-6,
    )
    frozen = fastrnn.freeze(copy.deepcopy(ours))
    ratio(
        CLIENT,
        "the cell, a frame; ours frozen",
        lambda: network.rnn(x, state),
        lambda: frozen.rnn(x, state),
        within=1e-6,
    )
    frame = audio[: FRAME + CONTEXT][None]
    zeros = torch.zeros(2, 1, 128)
    ratio(
        CLIENT,
        "the network, a frame",
        lambda: network(frame, zeros),
        lambda: ours(frame, zeros),
        within=1e-6,
    )

    layer = fastrnn.LSTM(128, 128)
    layer.load_state_dict({f"{n}_l0": p for n, p in network.rnn.state_dict().items()})
    rows = F.pad(audio, (CONTEXT, 0)).unfold(0, FRAME + CONTEXT, FRAME)
    with torch.no_grad():
        features = network.features(rows)

    def loop() -> Tensor:
        h = c = torch.zeros(1, 128)
        outputs = []
        for each in features:
            h, c = network.rnn(each[None], (h, c))
            outputs.append(h)
        return torch.cat(outputs)

    stepper = ours.rnn.stream(batch_size=1)
    arrays, out = features.numpy(), np.empty((len(features), 128), "float32")

    def stream() -> Tensor:
        stepper.reset()
        for x, y in zip(arrays, out, strict=True):
            stepper.step(x, y)
        return torch.from_numpy(out)

    ratio(CLIENT, f"the cell, {len(rows)} frames; ours a stepper", loop, stream, within=1e-5)
    ratio(
        CLIENT,
        f"the cell, {len(rows)} frames; ours one call of a layer",
        loop,
        lambda: layer(features)[0],
        within=1e-5,
    )
    ratio(
        CLIENT,
        "a file of 8 s, frame by frame; ours the frames as one batch, one call of a layer",
        lambda: probabilities(network, audio),
        lambda: network.probability(layer(network.features(rows))[0]),
        within=1e-5,
    )
