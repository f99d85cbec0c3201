"""Recurrent networks at hardware speed for PyTorch."""

from fastrnn.cells import Cell, cell
from fastrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, Recurrent, RNNCell
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
    "cell",
    "replace_",
    "restore_",
]
