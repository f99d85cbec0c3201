"""A model with every class of torch.nn that `replace_` replaces."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

SIZES = (5, 7)


def model_with_all() -> nn.Module:
    """It has every class once, at different depths and in different containers."""
    return nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.LSTM(*SIZES), nn.Linear(7, 7), nn.GRUCell(*SIZES)]),
            "sequence": nn.Sequential(OrderedDict(norm=nn.LayerNorm(5), rnn=nn.GRU(*SIZES))),
            "dict": nn.ModuleDict({"deep": nn.Sequential(nn.Sequential(nn.RNN(*SIZES)))}),
            "cells": nn.ModuleList([nn.LSTMCell(*SIZES), nn.RNNCell(*SIZES, nonlinearity="relu")]),
        }
    )


PLACES = {
    "list.0": "LSTM",
    "list.2": "GRUCell",
    "sequence.rnn": "GRU",
    "dict.deep.0.0": "RNN",
    "cells.0": "LSTMCell",
    "cells.1": "RNNCell",
}
