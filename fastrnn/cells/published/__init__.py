"""Cells of papers. They are custom cells: each is imported and compiled when it is first used."""

__all__ = ["MODULES"]

# The name of every published cell, and the module of this folder that declares it.
MODULES = {
    "antisymmetric_rnn": "antisymmetric",
    "atr": "atr",
    "cfn": "cfn",
    "cifg": "cifg",
    "fast_grnn": "fast",
    "fast_rnn": "fast",
    "gated_antisymmetric_rnn": "antisymmetric",
    "irnn": "irnn",
    "janet": "janet",
    "ligru": "ligru",
    "mgu": "mgu",
    "nas": "nas",
    "nbrc": "nbrc",
    "peephole_lstm": "peephole",
    "ran": "ran",
    "slstm": "slstm",
    "star": "star",
    "ugrnn": "ugrnn",
}
