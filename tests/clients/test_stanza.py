"""stanza reads text: a character language model of 1024 units, whose states at the ends of words
represent the words; highway LSTMs in its taggers and parsers; a tokenizer. All pack sequences.

Its trained weights come from a hub, so these are random, in the sizes of the trained models.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from stanza.models.common.char_model import CharacterLanguageModel, CharVocab
from stanza.models.common.hlstm import HighwayLSTM
from stanza.models.tokenization.model import Tokenizer
from torch import Tensor, nn

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
)

CLIENT = Client("stanza", "LSTM 1024; BiLSTM 200, 2 highway layers; BiLSTM 64")
WORDS = ["quick", "brown", "foxes", "jump", "over", "a", "lazy", "dog", "until", "the", "morning"]


@pytest.fixture(scope="module")
def sentences() -> list[list[str]]:
    """Sentences of 3 to 12 words, in random order."""
    draw = random.Random(0)
    return [draw.choices(WORDS, k=draw.randrange(3, 13)) for _ in range(12)]


@pytest.fixture
def language_model() -> nn.Module:
    args = {
        "char_emb_dim": 100,
        "char_hidden_dim": 1024,
        "char_num_layers": 1,
        "char_dropout": 0.05,
        "char_rec_dropout": 0,
    }
    letters = [*sorted(set("".join(WORDS))), "\n", " "]
    model = CharacterLanguageModel(args, {"char": CharVocab([letters])}, pad=True)
    model.eval()  # this eval returns None
    return model


@pytest.fixture
def highway() -> nn.Module:
    """The highway LSTM of the tagger."""
    return HighwayLSTM(
        125, 200, 2, batch_first=True, bidirectional=True, dropout=0.5, highway_func=torch.tanh
    ).eval()


@pytest.fixture
def tokenizer() -> nn.Module:
    args = {
        "feat_dim": 5,
        "rnn_layers": 1,
        "conv_res": None,
        "use_mwt": True,
        "hierarchical": True,
        "hier_invtemp": 0.5,
        "tok_noise": 0.02,
    }
    return Tokenizer(args, 60, 32, 64, 0.33, 0.05).eval()


LENGTHS = [40, 37, 37, 30, 22, 13, 5, 1]


def highway_run(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LENGTHS), max(LENGTHS), 125, generator=generator).to(dtype_of(model))
    output, states = model(x, LENGTHS)
    return output.data, states


def tokenizer_run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(60, (len(LENGTHS), max(LENGTHS)), generator=generator)
    features = torch.rand(*units.shape, 5, generator=generator).to(dtype_of(model))
    return model(units, features, LENGTHS)


def test_words(language_model: nn.Module, sentences: list) -> None:
    ours = replaced(language_model)
    assert_same_outputs(
        ours, language_model, lambda model: model.build_char_representation(sentences)
    )


@torch.no_grad()
def test_highway_and_tokenizer(highway: nn.Module, tokenizer: nn.Module) -> None:
    assert_same_outputs(replaced(highway), highway, highway_run)
    assert_same_outputs(replaced(tokenizer), tokenizer, tokenizer_run)


def test_gradients(language_model: nn.Module, highway: nn.Module, tokenizer: nn.Module) -> None:
    letters = torch.arange(3 * 20).reshape(3, 20) % 26 + 4

    def predict_letters(model: nn.Module) -> Tensor:
        """The loss of the client's language model: the next letter."""
        _, _, decoded = model(letters[:, :-1], [19, 19, 19])
        return nn.functional.cross_entropy(decoded.flatten(0, 1), letters[:, 1:].flatten())

    assert_same_gradients(replaced(language_model), language_model, predict_letters)
    assert_same_gradients(
        replaced(highway), highway, lambda model: highway_run(model)[0].square().sum()
    )
    assert_same_gradients(
        replaced(tokenizer), tokenizer, lambda model: -tokenizer_run(model)[..., 1].mean()
    )


@torch.no_grad()
def test_checkpoints_and_restore(
    language_model: nn.Module, highway: nn.Module, sentences: list, tmp_path: Path
) -> None:
    ours = replaced(highway)
    assert_checkpoints_pass(ours, highway, highway_run)
    assert_restores(ours, highway, highway_run)

    # The client's own file, from which it builds a new model.
    ours = replaced(language_model)
    ours.save(str(tmp_path / "ours.pt"))
    loaded = CharacterLanguageModel.load(str(tmp_path / "ours.pt"))
    assert kinds(loaded) == kinds(language_model)
    wanted = language_model.build_char_representation(sentences)
    assert_same(loaded.build_char_representation(sentences), wanted, 0)


def test_times(
    language_model: nn.Module, highway: nn.Module, sentences: list, ratio: Ratio
) -> None:
    ours = replaced(language_model)
    ratio(
        CLIENT,
        f"words of {len(sentences)} sentences, language model",
        lambda: language_model.build_char_representation(sentences),
        lambda: ours.build_char_representation(sentences),
        within=1e-5,
    )
    ours = replaced(highway)
    shape = f"{len(LENGTHS)} rows of up to {max(LENGTHS)}"
    ratio(
        CLIENT,
        f"highway LSTMs, {shape}",
        lambda: highway_run(highway),
        lambda: highway_run(ours),
        within=1e-5,
    )

    def training(model: nn.Module) -> Any:
        loss = highway_run(model)[0].square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    ratio(
        CLIENT,
        f"highway LSTMs, {shape}, gradients",
        lambda: training(highway),
        lambda: training(ours),
        within=1e-5,
        grad=True,
    )
