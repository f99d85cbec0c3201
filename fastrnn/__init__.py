"""Recurrent networks at hardware speed for PyTorch."""

from fastrnn._version import __version__
from fastrnn.cell_modules import GRUCell, LSTMCell, RNNCell
from fastrnn.cells import Cell, cell
from fastrnn.convert import from_torch, to_torch
from fastrnn.freeze import freeze, unfreeze
from fastrnn.modules import GRU, LSTM, RNN, Recurrent
from fastrnn.replace import replace_, restore_

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "__version__",
    "cell",
    "freeze",
    "from_torch",
    "replace_",
    "restore_",
    "to_torch",
    "unfreeze",
]
