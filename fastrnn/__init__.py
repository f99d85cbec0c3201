"""Recurrent networks at hardware speed for PyTorch."""

from fastrnn import diagnostics, init
from fastrnn._version import __version__
from fastrnn.cells import Cell, Param, cell
from fastrnn.cells.noise import bernoulli, dropout
from fastrnn.nn.cell_modules import GRUCell, LSTMCell, RNNCell
from fastrnn.nn.convert import from_torch, to_torch
from fastrnn.nn.export import export_c
from fastrnn.nn.freeze import freeze, unfreeze
from fastrnn.nn.layers import GRU, LSTM, RNN, Recurrent
from fastrnn.nn.published import (
    SLSTM,
    GRUResetBefore,
    LayerNormGRU,
    LayerNormLSTM,
    PeepholeLSTM,
)
from fastrnn.nn.quantize import dequantize_, quantize_
from fastrnn.nn.replace import replace_, restore_
from fastrnn.nn.weight_drop import WeightDrop

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "Cell",
    "GRUCell",
    "GRUResetBefore",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "Param",
    "PeepholeLSTM",
    "RNNCell",
    "Recurrent",
    "WeightDrop",
    "__version__",
    "bernoulli",
    "cell",
    "dequantize_",
    "diagnostics",
    "dropout",
    "export_c",
    "freeze",
    "from_torch",
    "init",
    "quantize_",
    "replace_",
    "restore_",
    "to_torch",
    "unfreeze",
]


def __dir__() -> list[str]:
    """The public names, without the folders and files that implement them."""
    return [*__all__, "cells", "kernels", "plan"]
