"""The definition of a cell, and the built-in cells."""

from fastrnn.cells.declare import MAX_GATES, MAX_STATES, Cell, Gates, cell, get, names, seal

# isort: off
# The order of these imports is the order in which the cells are listed.
from fastrnn.cells.elman import rnn_relu, rnn_tanh
from fastrnn.cells.lstm import lstm
from fastrnn.cells.gru import gru
# isort: on

__all__ = [
    "MAX_GATES",
    "MAX_STATES",
    "Cell",
    "Gates",
    "cell",
    "get",
    "gru",
    "lstm",
    "names",
    "rnn_relu",
    "rnn_tanh",
]

seal()
