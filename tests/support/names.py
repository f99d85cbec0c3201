"""Devices, dtypes, classes, cells and sizes that tests iterate over."""

from __future__ import annotations

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
BUILT_IN = ["rnn_tanh", "rnn_relu", "lstm", "gru"]

# 1, primes, and sizes near the widths of vectors and tiles; 4096 is for time steps.
SIZES = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 61, 64, 65]
LONG = 4096
