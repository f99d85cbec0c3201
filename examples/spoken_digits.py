"""Recognise spoken digits, frame by frame as they arrive.

A formant synthesiser speaks the digits: a pulse train of the glottis, or noise, goes through
resonances that glide from phoneme to phoneme. Voices differ in pitch, in the length of the vocal
tract and in speed, and have noise behind them. A GRU with zoneout reads log-mel frames. In the end
`layer.stream()` reads them one by one, as a microphone gives them, with the bits of the batch.

    python examples/spoken_digits.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn

Array = NDArray[np.float64]

RATE, HOP, FRAME, MELS = 8000, 80, 200, 24  # samples per second, between frames, in a frame
# Formants in Hz, the loudness of voice and of noise, and the duration in ms. "-" is a closure.
TABLE = """\
iy 270 2290 3010 1 0 110, ih 390 1990 2550 1 0 80, eh 530 1840 2480 1 0 100,
ah 640 1190 2390 1 0 110, ao 570 840 2410 1 0 130, aa 730 1090 2440 1 0 90,
uw 300 870 2240 1 0 120, er 490 1350 1690 0.9 0 100, n 280 1700 2600 0.4 0 80,
w 290 610 2150 0.6 0 70, r 310 1060 1380 0.6 0 70, v 220 1100 2080 0.3 0.1 60,
z 240 1390 3500 0.2 0.4 80, f 900 1700 3300 0 0.2 100, th 1400 2200 3300 0 0.15 90,
s 1500 2700 3800 0 0.5 100, t 1700 2600 3600 0 0.6 25, k 1300 1900 2500 0 0.6 30,
- 500 1500 2500 0 0 50"""
PHONEMES = {name: list(map(float, row)) for name, *row in map(str.split, TABLE.split(","))}
DIGITS = (
    *("z iy r ao", "w ah n", "t uw", "th r iy", "f ao er", "f aa ih v", "s ih - k s"),
    *("s eh v ah n", "eh ih - t", "n aa ih n"),
)


def speak(digit: int, random: np.random.Generator) -> Array:
    """A digit in a random voice, [samples]."""
    names = ["-", *DIGITS[digit].split(), "-"]
    table = np.array([PHONEMES[name] for name in names])
    # A short vocal tract has high formants.
    table[:, :3] *= random.uniform(0.85, 1.2) * random.normal(1, 0.04, (len(names), 3))
    durations = table[:, 5] / random.uniform(0.75, 1.4) * random.uniform(0.8, 1.2, len(names))
    durations[[0, -1]] *= random.uniform(0.5, 3, 2)
    # Every value glides between the middles of the phonemes; there is a row for each HOP samples.
    middles = np.cumsum(durations) - durations / 2
    frames = np.arange(0, durations.sum(), 1000 * HOP / RATE)
    tracks = np.stack([np.interp(frames, middles, column) for column in table.T[:5]], 1)
    count = len(frames) * HOP
    pitch = random.uniform(80, 280) * np.linspace(1.1, 0.85, count)
    cycles = np.cumsum(pitch * random.normal(1, 0.01, count)) / RATE
    pulses = np.diff(np.floor(cycles), prepend=0) / np.sqrt(pitch / RATE)
    voice, noise = np.repeat(tracks[:, 3:], HOP, 0).T
    source = np.pad(voice * pulses + noise * random.normal(0, 1, count), (HOP, HOP))
    # The filter: resonances of each frame, in the frequency domain, with overlapping windows.
    s = 2j * np.pi * np.fft.rfftfreq(4 * HOP, 1 / RATE)[None, :, None]
    centre, width = 2 * np.pi * tracks[:, None, :3], 2 * np.pi * np.array([80.0, 110.0, 170.0])
    gain = np.prod(centre**2 / (s**2 + width * s + centre**2), -1)
    window, sound = np.hanning(2 * HOP + 1)[:-1], np.zeros(count + 4 * HOP)
    for k in range(len(frames)):
        part = np.fft.rfft(source[k * HOP :][: 2 * HOP] * window, 4 * HOP)
        sound[k * HOP :][: 4 * HOP] += np.fft.irfft(part * gain[k], 4 * HOP)
    sound /= np.abs(sound).max()
    return sound + random.normal(0, 10 ** random.uniform(-2.5, -1), len(sound))


def mel_filters() -> Tensor:
    """Triangles with equal distances in mel, [MELS, frequencies]."""
    edges = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + RATE / 1400), MELS + 2) / 2595) - 1)
    distance = torch.fft.rfftfreq(256, 1 / RATE) - edges[:, None]
    rise, fall = distance[:-2] / edges.diff()[:-1, None], -distance[2:] / edges.diff()[1:, None]
    return torch.minimum(rise, fall).clamp(min=0)


def log_mel(sound: Array) -> Tensor:
    """Frames [T, MELS]; each is made of 25 ms of sound, and of nothing later."""
    parts = torch.from_numpy(sound).float().unfold(0, FRAME, HOP)
    power = torch.fft.rfft(parts * torch.hann_window(FRAME), 256).abs().square()
    return (power @ mel_filters().T + 1e-3).log() / 4


def utterances(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames [B, T, MELS] of random digits, the lengths [B], and the digits [B]."""
    random = np.random.default_rng(seed)
    digits = random.integers(0, 10, count)
    frames = [log_mel(speak(digit, random)) for digit in digits]
    lengths = torch.tensor([len(each) for each in frames])
    return nn.utils.rnn.pad_sequence(frames, True), lengths, torch.from_numpy(digits)


class Recogniser(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.rnn = fastrnn.GRU(MELS, hidden, batch_first=True, zoneout=0.1)
        self.out = nn.Linear(hidden, 10)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, 10], and the states [B, H] after the last frame of each."""
        _, h_n = self.rnn(frames, lengths=lengths)
        return self.out(h_n[-1]), h_n[-1]


def streamed(model: Recogniser, frames: Tensor, lengths: Tensor) -> Tensor:
    """The last states [B, H], frame by frame."""
    stepper, states = model.rnn.stream(), []
    for sequence, length in zip(frames, lengths.tolist(), strict=True):
        stepper.reset()
        for frame in sequence[:length]:
            state = stepper.step(frame)
        states.append(state)
    return torch.stack(states)


def main(quick: bool = False) -> tuple[float, float]:
    """Returns the shares of digits, in new voices, that the batch and the stream name right."""
    torch.manual_seed(0)
    steps = 200 if quick else 600
    frames, lengths, digits = utterances(3 * steps, seed=0)
    model = Recogniser()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(digits), (64,))
        loss = cross_entropy(model(frames[rows], lengths[rows])[0], digits[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"trained for {steps} steps, loss {loss:.3f}")
    frames, lengths, digits = utterances(500, seed=1)
    with torch.no_grad():
        scores, states = model.eval()(frames, lengths)
        last = streamed(model, frames, lengths)
        found = torch.stack([scores, model.out(last)]).argmax(-1)
    assert torch.equal(last, states), "the stream has the bits of the batch"
    batch, stream = (found == digits).float().mean(1).tolist()
    print(f"{batch:.1%} of 500 digits in new voices, {stream:.1%} streamed; the states are equal")
    return batch, stream


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train with fewer voices and steps")
    main(parser.parse_args().quick)
