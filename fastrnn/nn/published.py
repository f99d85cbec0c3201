"""Layers of the most used published cells, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.cells import get_published
from fastrnn.nn.base import Lengths, Resets, Sequences
from fastrnn.nn.checks import States
from fastrnn.nn.convert import export_forward
from fastrnn.nn.layers import Device, Recurrent
from fastrnn.nn.rounding import Precision

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
    One more is for a single layer in one direction, without `proj_size`:

    Args:
        norm: whether the output of each head is normalised over its units at every step, as in the
            blocks of the authors. This is `torch.nn.GroupNorm(heads, hidden_size)` with a gain and
            no bias. The gain `weight_norm_l0` begins with 1; it is [H], or [heads, H/heads] if
            there are several heads. The states, also those of `return_states=True`, are not
            normalised, as nothing of the norm is fed back. `stream`, `stream_slots` and `export_c`
            refuse such a layer.

    Example:
        >>> import torch, fastrnn
        >>> y, states = fastrnn.SLSTM(8, 16, heads=4, norm=True)(torch.randn(5, 3, 8))
        >>> y.unflatten(-1, (4, 4)).mean(-1).abs().max() < 1e-5
        tensor(True)
    """

    _cell_name = "slstm"
    norm = False  # the default for older pickles

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
        norm: bool = False,
        recompute: bool = False,
        zoneout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per: str = "sequence",
        clip_grad_step: float | None = None,
    ) -> None:
        if norm:
            _check_norm(num_layers, bidirectional, proj_size)
        super().__init__(
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
        if norm:
            self.norm = True
            shape = (heads, hidden_size // heads) if heads > 1 else (hidden_size,)
            self.weight_norm_l0 = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Write the initial values of the cell; a gain is 1."""
        super().reset_parameters()
        if self.norm:
            nn.init.ones_(self.weight_norm_l0)

    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Lengths = None,
        resets: Resets = None,
        reset_states: States | None = None,
        return_states: bool | None = None,
    ) -> tuple[Any, ...]:
        """Run the layer. The class documents the shapes."""
        result: tuple[Any, ...] = super().forward(
            input,
            hx,
            lengths=lengths,
            resets=resets,
            reset_states=reset_states,
            return_states=return_states,
        )
        # What is recorded in its place calls this layer once more, and has the norm.
        if not self.norm or export_forward(self, input) is not None:
            return result
        y, *rest = result
        if isinstance(y, PackedSequence):
            return y._replace(data=self._normed(y.data)), *rest
        return self._normed(y), *rest

    def _normed(self, y: Tensor) -> Tensor:
        gain = self.weight_norm_l0
        if self.heads == 1:
            return F.layer_norm(y, y.shape[-1:], gain)
        units = y.unflatten(-1, gain.shape)
        return (F.layer_norm(units, units.shape[-1:]) * gain).flatten(-2)

    def _freeze(self, precision: Precision | None = None) -> None:
        super()._freeze(precision)
        gain, frozen = self._parameters.get("weight_norm_l0"), self._frozen
        if frozen is not None and gain is not None and gain.requires_grad:
            self._frozen = frozen._replace(trained=(*frozen.trained, "weight_norm_l0"))
            gain.requires_grad_(False)

    def _check_streamable(self) -> None:
        super()._check_streamable()
        if self.norm:
            raise ValueError(
                "a stepper gives h, and the output of this layer is its norm; stream a layer with "
                "norm=False, and normalise what it gives"
            )

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr() + (", norm=True" if self.norm else "")


def _check_norm(num_layers: int, bidirectional: bool, proj_size: int) -> None:
    if proj_size:
        raise ValueError(
            "norm is over the units of a head, which a projection mixes; use proj_size=0"
        )
    if num_layers != 1 or bidirectional:
        raise ValueError(
            "norm is for one layer in one direction, as each block of the paper has; for several, "
            f"make several SLSTM, got num_layers={num_layers} and bidirectional={bidirectional}"
        )
