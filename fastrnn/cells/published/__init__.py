"""Cells of papers. They are custom cells: each is imported and compiled when it is first used."""

__all__ = ["MODULES"]

# The name of every published cell, and the module of this folder that declares it.
MODULES = {
    "antisymmetric_rnn": "antisymmetric",
    "atr": "atr",
    "cfn": "cfn",
    "cifg": "cifg",
    "dreamer_gru": "layer_norm",
    "fast_grnn": "fast",
    "fast_rnn": "fast",
    "gated_antisymmetric_rnn": "antisymmetric",
    "gru_reset_before": "reset_before",
    "indrnn": "indrnn",
    "irnn": "irnn",
    "janet": "janet",
    "layer_norm_gru": "layer_norm",
    "layer_norm_lstm": "layer_norm",
    "layer_norm_lstm_sums": "layer_norm",
    "ligru": "ligru",
    "mgu": "mgu",
    "mgu2": "reset_before",
    "mgu_reset_before": "reset_before",
    "multiplicative_lstm": "multiplicative",
    "nas": "nas",
    "nbrc": "nbrc",
    "peephole_lstm": "peephole",
    "ran": "ran",
    "rms_norm_lstm": "layer_norm",
    "sgrn": "sgrn",
    "slstm": "slstm",
    "star": "star",
    "ugrnn": "ugrnn",
}
