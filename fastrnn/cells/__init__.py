"""What a cell is, and the cells there are."""

from fastrnn.cells.declare import (
    MAX_GATES,
    MAX_STATES,
    Cell,
    Gates,
    cell,
    get,
    gru,
    lstm,
    names,
    rnn_relu,
    rnn_tanh,
)

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
