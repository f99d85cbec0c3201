"""The definition of a cell, the built-in cells, and on demand the published ones."""

from fastrnn.cells.arguments import Gates, Param, Params
from fastrnn.cells.declare import (
    MAX_GATES,
    MAX_PARAMS,
    MAX_STATES,
    Cell,
    cell,
    get,
    get_published,
    names,
    publish,
    seal,
)
from fastrnn.cells.published import MODULES as _MODULES
from fastrnn.cells.variants import clip_grad, recurrent_dropout, zoneout

# isort: off
# The order of these imports is the order in which the cells are listed.
from fastrnn.cells.elman import rnn_relu, rnn_tanh
from fastrnn.cells.lstm import lstm
from fastrnn.cells.gru import gru
# isort: on

__all__ = [
    "MAX_GATES",
    "MAX_PARAMS",
    "MAX_STATES",
    "Cell",
    "Gates",
    "Param",
    "Params",
    "cell",
    "clip_grad",
    "get",
    "get_published",
    "gru",
    "lstm",
    "names",
    "recurrent_dropout",
    "rnn_relu",
    "rnn_tanh",
    "zoneout",
]

seal()
publish({name: f"{__name__}.published.{module}" for name, module in _MODULES.items()})


def __getattr__(name: str) -> Cell:
    """The published cell with this name."""
    if name in _MODULES:
        return get_published(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, with those of the published cells."""
    return [*__all__, *_MODULES]
