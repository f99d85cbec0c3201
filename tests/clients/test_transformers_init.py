"""transformers initialises `nn.LSTM`, by class: which models are safe, and what others need."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastrnn

SIZE = 6


class Config(transformers.PretrainedConfig):
    model_type = "fastrnn-test"

    def __init__(self, layer: str = "torch.nn.LSTM", **options: Any) -> None:
        super().__init__(**options)
        self.layer = layer
        self.initializer_range = 0.02


class Body(transformers.PreTrainedModel):
    config_class = Config
    base_model_prefix = "body"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.linear = nn.Linear(SIZE, SIZE)
        self.post_init()


class Headed(transformers.PreTrainedModel):
    """A recurrent head whose weights no checkpoint of the body holds."""

    config_class = Config
    base_model_prefix = "body"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.body = Body(config)
        library, name = config.layer.rsplit(".", 1)
        self.rnn = getattr({"torch.nn": nn, "fastrnn": fastrnn}[library], name)(SIZE, SIZE)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.body.linear(x))[0]


class Served(Headed):
    """The method of docs/drop-in.md: transformers sees torch.nn's layer on the same Parameters."""

    def _init_weights(self, module: nn.Module) -> None:
        ours = isinstance(module, fastrnn.LSTM)
        super()._init_weights(fastrnn.to_torch(module) if ours else module)


class Reset(Headed):
    """The method for layers that transformers does not know, torch.nn.GRU included."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RNNBase):
            module.reset_parameters()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    Body(Config()).save_pretrained(tmp_path)
    return tmp_path


def load(kind: Any, checkpoint: Path, layer: str) -> Any:
    torch.manual_seed(0)
    return kind.from_pretrained(checkpoint, layer=layer)


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach() for p in model.rnn.parameters()]


def test_a_model_replaced_after_loading(checkpoint: Path, tmp_path: Path) -> None:
    model = load(Headed, checkpoint, "torch.nn.LSTM")
    original = copy.deepcopy(model)
    report = fastrnn.replace_(model)
    assert "not in its __init__" in dict(report.notes)["transformers"]
    x = torch.randn(4, 2, SIZE)
    torch.testing.assert_close(model(x), original(x))
    model.init_weights()  # resize_token_embeddings and others may call it so
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(original), strict=True))
    model.save_pretrained(tmp_path / "saved")
    again = Headed.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(x), original(x))


@pytest.mark.parametrize("layer", ["fastrnn.LSTM", "torch.nn.GRU"])
def test_layers_unknown_to_transformers_stay_uninitialised(layer: str, checkpoint: Path) -> None:
    """Shows why the methods are needed. The tests fill uninitialised memory with NaN."""
    assert any(w.isnan().any() for w in weights(load(Headed, checkpoint, layer)))


def test_recipe_that_gives_what_torchs_layer_gets(checkpoint: Path) -> None:
    expected = weights(load(Headed, checkpoint, "torch.nn.LSTM"))
    assert not any(w.isnan().any() for w in expected)
    given = weights(load(Served, checkpoint, "fastrnn.LSTM"))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("library", ["fastrnn", "torch.nn"])
def test_recipe_for_every_layer(library: str, name: str, checkpoint: Path, tmp_path: Path) -> None:
    model = load(Reset, checkpoint, f"{library}.{name}")
    assert all((w != 0).any() and w.abs().max() <= SIZE**-0.5 for w in weights(model))
    # Weights from the checkpoint stay as they are.
    model.save_pretrained(tmp_path / "saved")
    again = Reset.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(model), strict=True))
