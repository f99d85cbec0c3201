"""The base of all layers: names in errors."""

import inspect

import pytest
import torch
from torch import nn

import fastrnn

NAMES = ("RNN", "LSTM", "GRU")


@pytest.mark.parametrize("name", NAMES)
def test_an_error_about_arguments_names_the_public_class(name: str) -> None:
    x = torch.zeros(2, 1, 3)
    with pytest.raises(TypeError) as expected:
        getattr(nn, name)(3, 4)(x, typo=None)
    with pytest.raises(TypeError) as raised:
        getattr(fastrnn, name)(3, 4)(x, typo=None)
    assert str(raised.value) == str(expected.value)


def test_an_error_names_recurrent() -> None:
    layer = fastrnn.Recurrent(fastrnn.cells.gru, 3, 4)
    with pytest.raises(TypeError, match=r"^Recurrent\.forward\(\) takes from 2 to 3 positional"):
        layer(torch.zeros(2, 1, 3), None, None, None)


@pytest.mark.parametrize("name", [*NAMES, "Recurrent"])
def test_the_forward_of_a_class_shows_its_arguments(name: str) -> None:
    forward = getattr(fastrnn, name).forward
    parameters = ["self", "input", "hx", "lengths", "resets", "reset_states", "return_states"]
    assert list(inspect.signature(forward).parameters) == parameters
    assert "class documents the shapes" in forward.__doc__
