"""Layers of the most used published cells, by their names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastrnn.cells import get_published
from fastrnn.nn.layers import Device, Recurrent

__all__ = ["SLSTM", "GRUResetBefore", "LayerNormGRU", "LayerNormLSTM", "PeepholeLSTM"]


class _Published(Recurrent):
    _cell_name = ""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int = 0,
        heads: int = 1,
        recompute: bool = False,
        zoneout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per: str = "sequence",
        clip_grad_step: float | None = None,
    ) -> None:
        super().__init__(
            get_published(self._cell_name),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            proj_size=proj_size,
            heads=heads,
            recompute=recompute,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            recurrent_dropout_per=recurrent_dropout_per,
            clip_grad_step=clip_grad_step,
        )

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr().removeprefix(f"{self.cell.name}, ")


class LayerNormLSTM(_Published):
    """`Recurrent` layers of the cell `layer_norm_lstm`: long short-term memory with layer norms.

    Ba et al. 2016, arXiv:1607.06450:

        i, f, g, o = LN(W·x + b_ih; gain_x, bias_x) + LN(R·h + b_hh; gain_h, bias_h)
        c' = sigmoid(f)·c + sigmoid(i)·tanh(g)
        h' = sigmoid(o)·tanh(LN(c'; gain_c, bias_c))

    Args, call and errors are those of `fastrnn.LSTM`. Besides torch's weights a layer has
    `weight_gain_x_l0`, `weight_bias_x_l0`, `weight_gain_h_l0`, `weight_bias_h_l0` [4*H],
    `weight_gain_c_l0` and `weight_bias_c_l0` [H]; gains begin with 1, biases with 0.

    Example:
        >>> import torch, fastrnn
        >>> output, (h_n, c_n) = fastrnn.LayerNormLSTM(4, 8)(torch.randn(5, 3, 4))
        >>> output.shape
        torch.Size([5, 3, 8])
    """

    _cell_name = "layer_norm_lstm"


class LayerNormGRU(_Published):
    """`Recurrent` layers of the cell `layer_norm_gru`: gated recurrent units with layer norms.

    Ba et al. 2016, arXiv:1607.06450, with a norm of its own for each gate:

        r  = sigmoid(LN(W_r·x) + LN(R_r·h))
        z  = sigmoid(LN(W_z·x) + LN(R_z·h))
        n  = tanh(LN(W_n·x) + r·LN(R_n·h))
        h' = (1 - z)·n + z·h

    Args, call and errors are those of `fastrnn.GRU`. Besides torch's weights a layer has
    `weight_gain_x_l0`, `weight_bias_x_l0`, `weight_gain_h_l0` and `weight_bias_h_l0` [3*H]; gains
    begin with 1, biases with 0.
    """

    _cell_name = "layer_norm_gru"


class GRUResetBefore(_Published):
    """`Recurrent` layers of the cell `gru_reset_before`: gated recurrent units as published.

    Cho et al. 2014, arXiv:1406.1078, whose reset comes before the recurrent product: the candidate
    is tanh(W_n·x + R_n·(r·h) + b_n). This is the GRU of Keras with `reset_after=False` and of ONNX
    with `linear_before_reset=0`.

    Args, call, weights and errors are those of `fastrnn.GRU`.
    """

    _cell_name = "gru_reset_before"


class PeepholeLSTM(_Published):
    """`Recurrent` layers of the cell `peephole_lstm`: long short-term memory with peepholes.

    Gers & Schmidhuber 2000, doi:10.1109/IJCNN.2000.861302: the gates i and f also see p_i·c and
    p_f·c, the gate o sees p_o·c' of the new state.

    Args, call and errors are those of `fastrnn.LSTM`. Besides torch's weights a layer has the
    peepholes `weight_pi_l0`, `weight_pf_l0` and `weight_po_l0` [H].
    """

    _cell_name = "peephole_lstm"


class SLSTM(_Published):
    """`Recurrent` layers of the cell `slstm`: long short-term memory with exponential gates.

    Beck et al. 2024, arXiv:2405.04517, stabilised. Its states are h, c, n and m.

    Args and errors are those of `fastrnn.Recurrent` without `cell`; `heads` are those of the paper.
    """

    _cell_name = "slstm"
