"""Dropout of weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WeightDrop"]


class WeightDrop(nn.Module):
    """A parametrization that drops weights in training: DropConnect.

    Each forward pass of a layer draws one mask, the same for all steps and sequences, and divides
    what is left by `1 - p`, as dropout does. With `weight_hh` this is the weight drop of AWD-LSTM
    (Merity et al. 2017, arXiv:1708.02182; DropConnect: Wan et al. 2013). In evaluation the weights
    are those of the layer. The numbers are those of torch's generator, so `torch.manual_seed`
    repeats them.

    Args:
        p: the probability that a weight is dropped, from 0 to 1.

    Raises:
        ValueError: if `p` is no probability.

    Example:
        >>> import torch, fastrnn
        >>> from torch.nn.utils import parametrize
        >>> layer = fastrnn.LSTM(8, 16)
        >>> drop = fastrnn.WeightDrop(0.5)
        >>> _ = parametrize.register_parametrization(layer, "weight_hh_l0", drop)
        >>> x = torch.randn(5, 3, 8)
        >>> torch.equal(layer(x)[0], layer(x)[0])
        False
        >>> _ = layer.eval()
        >>> torch.equal(layer(x)[0], layer(x)[0])
        True
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p should be a probability, from 0 to 1, got {p}")
        self.p = p

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, of any shape, with numbers dropped in training."""
        return F.dropout(weight, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
