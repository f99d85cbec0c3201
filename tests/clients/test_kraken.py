"""kraken reads manuscripts. Its segmentation network (weights from the wheel) runs LSTMs along the
rows and columns of a page, its recognition network (its default, with random weights) packed LSTMs
along text lines.

The client's transforms of images need torchvision, which this environment lacks: the tests draw
pages and pass them to the network. The heatmaps go into the client's own search for baselines.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

# Imported before the stand-ins: these modules look for torchvision.
import lightning
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest
import torch
import torchmetrics
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
    stand_ins,
)

with stand_ins("torchvision", "torchvision.transforms", "kraken.lib.dataset"):
    from kraken.lib.segmentation import vectorize_lines
    from kraken.lib.vgsl import TorchVGSLModel

assert lightning and torchmetrics

CLIENT = Client("kraken", "BiLSTM 32, rows and columns; BiLSTM 200, lines", trained=True)
LINES = "[1,48,0,1 Cr3,13,32 Mp2,2 Cr3,13,32 Mp2,2 Cr3,9,64 Mp2,2 S1(1x0)1,3 Lbx200 Lbx200 O1c40]"


@pytest.fixture(scope="module")
def segmentation() -> nn.Module:
    import kraken

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        path = Path(kraken.__file__).with_name("blla.mlmodel")
        return TorchVGSLModel.load_model(str(path)).eval()


@pytest.fixture
def recognition() -> nn.Module:
    return TorchVGSLModel(vgsl=LINES).eval()


@pytest.fixture(scope="module")
def page() -> Tensor:
    """Text lines in black on white, [1, 3, 320, 480]."""
    image = PIL.Image.new("RGB", (480, 320), "white")
    draw = PIL.ImageDraw.Draw(image)
    font = PIL.ImageFont.load_default(22)
    for number in range(5):
        draw.text((30, 30 + 55 * number), "the quick brown fox jumps over", "black", font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def lines() -> tuple[Tensor, Tensor]:
    """Four lines of different length, padded: images [4, 1, 48, 400] and lengths."""
    lengths = torch.tensor([400, 320, 360, 240], dtype=torch.int32)
    images = torch.rand(4, 1, 48, 400, generator=torch.Generator().manual_seed(0))
    return images * (torch.arange(400) < lengths[:, None, None, None]), lengths


def heatmap(model: nn.Module, page: Tensor) -> Tensor:
    return model.nn(page)[0]


def read(model: nn.Module, lines: tuple[Tensor, Tensor]) -> list[Tensor]:
    images, lengths = lines
    return list(model(images.to(dtype_of(model)), lengths))


@torch.no_grad()
def test_segmentation(segmentation: nn.Module, page: Tensor) -> None:
    ours = replaced(segmentation)
    # Its norms compute in float32, so there is no float64 reference.
    assert_same_outputs(ours, segmentation, lambda model: heatmap(model, page), within=2e-6)
    baselines = []
    for model in (ours, segmentation):
        maps = nn.functional.interpolate(heatmap(model, page).sigmoid(), size=page.shape[2:])
        baselines.append(vectorize_lines(maps[0, :3].numpy()))
    assert len(baselines[1]) == 5, "the client finds the lines"
    assert baselines[0] == baselines[1]


def test_quantised(segmentation: nn.Module, page: Tensor, quantised: Quantised) -> None:
    def found(model: nn.Module) -> Tensor:
        """Beginnings of lines, ends, lines and regions, pixel by pixel."""
        with torch.no_grad():
            return heatmap(model, page).sigmoid() > 0.3

    what = "pixels that are a line, its end or a region, 320×480"
    quantised(CLIENT, what, replaced(segmentation), segmentation, found)


@torch.no_grad()
def test_recognition(recognition: nn.Module, lines: tuple[Tensor, Tensor]) -> None:
    ours = replaced(recognition)
    assert_same_outputs(ours, recognition, lambda model: read(model, lines))
    # The client reads a page line by line, and one line alone is not packed.
    one = lines[0][:1]
    assert_same_outputs(ours, recognition, lambda model: model(one.to(dtype_of(model)))[0])


def test_gradients(segmentation: nn.Module, recognition: nn.Module, page: Any, lines: Any) -> None:
    def segment(model: nn.Module) -> Tensor:
        found = heatmap(model, page[..., :80, :120])
        return model.criterion(found, torch.full_like(found, 0.3))

    assert_same_gradients(replaced(segmentation), segmentation, segment, within=1e-5)

    def recognise(model: nn.Module) -> Tensor:
        output, lengths = read(model, lines)
        scores = output.squeeze(2).permute(2, 0, 1).log_softmax(2)
        letters = torch.arange(40).reshape(4, 10) % 39 + 1
        return model.criterion(scores, letters, lengths, torch.full((4,), 10))

    assert_same_gradients(replaced(recognition), recognition, recognise)


@torch.no_grad()
def test_checkpoints_and_restore(recognition: nn.Module, lines: Any) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        return read(model, lines)

    ours = replaced(recognition)
    assert_checkpoints_pass(ours, recognition, run)
    assert_restores(ours, recognition, run)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_file_of_its_own_format(segmentation: nn.Module, page: Tensor, tmp_path: Path) -> None:
    path = str(tmp_path / "ours.mlmodel")
    replaced(segmentation).save_model(path)
    assert_same(
        heatmap(TorchVGSLModel.load_model(path).eval(), page), heatmap(segmentation, page), 1e-5
    )


def initialised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model.init_weights()
    return model


@torch.no_grad()
def test_initialisation(recognition: nn.Module, lines: Any) -> None:
    """The client initialises each `nn.LSTM`: before it is replaced, or after `restore_`."""
    ours = replaced(recognition)
    before = copy.deepcopy(ours.state_dict())
    changed = {n for n, p in initialised(ours).state_dict().items() if not p.equal(before[n])}
    assert changed and not any(".layer." in n for n in changed), "convolutions alone"

    initialised(recognition)
    fastrnn.restore_(ours)
    initialised(ours)
    assert fastrnn.replace_(ours).replaced
    for model in (ours, replaced(recognition)):
        assert_same(model.state_dict(), recognition.state_dict(), 0)
        assert_same_outputs(model, recognition, lambda model: read(model, lines))


def test_times(
    segmentation: nn.Module, recognition: nn.Module, page: Any, lines: Any, ratio: Ratio
) -> None:
    ours = replaced(segmentation)
    ratio(
        CLIENT,
        "heatmaps of a page, 320×480",
        lambda: heatmap(segmentation, page),
        lambda: heatmap(ours, page),
        within=1e-5,
    )
    rows = torch.randn(1, 256, 80, 120)
    layers = [copy.deepcopy(m.nn[10]) for m in (segmentation, ours)]
    ratio(
        CLIENT,
        "its first LSTM, 80 rows of 120",
        lambda: layers[0](rows)[0],
        lambda: layers[1](rows)[0],
        within=1e-5,
    )
    ours = replaced(recognition)
    ratio(
        CLIENT,
        "4 lines, packed",
        lambda: read(recognition, lines),
        lambda: read(ours, lines),
        within=1e-5,
    )
    ratio(
        CLIENT,
        "1 line",
        lambda: recognition(lines[0][:1])[0],
        lambda: ours(lines[0][:1])[0],
        within=1e-5,
    )

    def training(model: nn.Module) -> Any:
        output, _ = read(model, lines)
        return torch.autograd.grad(output.square().mean(), list(model.parameters()))

    ratio(
        CLIENT,
        "4 lines, packed, gradients",
        lambda: training(recognition),
        lambda: training(ours),
        within=1e-5,
        grad=True,
    )
    assert isinstance(ours.nn[-2].layer, fastrnn.LSTM)
