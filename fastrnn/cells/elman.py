"""Elman networks, as in torch.nn."""

from __future__ import annotations

from torch import relu, tanh

from fastrnn.cells.declare import cell

__all__ = ["rnn_relu", "rnn_tanh"]


@cell(gates="h", states="h")
def rnn_tanh(u, v, h):  # type: ignore[no-untyped-def]
    """Elman network, https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html"""
    return tanh(u.h + v.h)


@cell(gates="h", states="h")
def rnn_relu(u, v, h):  # type: ignore[no-untyped-def]
    """Elman network with rectified units (Le et al. 2015, arXiv:1504.00941)."""
    return relu(u.h + v.h)
