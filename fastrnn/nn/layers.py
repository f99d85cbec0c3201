"""RNN, LSTM, GRU, and `Recurrent` for any cell, with the parameters and behaviour of torch.nn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.nn.base import CELL_OF_MODE, Layer, with_own_forward
from fastrnn.nn.checks import States, check_projected, different_dtypes, refuse_unknown
from fastrnn.nn.convert import counterpart_of

__all__ = ["GRU", "LSTM", "RNN", "Recurrent"]

Device = torch.device | str | int | None


class _NoProjection(Layer):
    """Base of RNN and GRU, which have no projection."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise torch.nn's errors for an input of wrong dtype or shape."""
        Layer.check_input(self, input, batch_sizes)  # super() would take longer
        if self.proj_size > 0:
            expected = self.get_expected_hidden_size(input, batch_sizes)
            raise RuntimeError(
                f"Expected hidden size {expected}, got {[*expected[:2], self.hidden_size]}: "
                f"{self._name} was given proj_size={self.proj_size}, and projections are for LSTM"
            )


@counterpart_of(nn.RNN)
@with_own_forward
class RNN(_NoProjection):
    """Elman network, a drop-in for `torch.nn.RNN` with the same parameters and numbers.

    Args:
        input_size: `I`, features of the input.
        hidden_size: `H`, features of the state.
        num_layers: number of stacked layers.
        nonlinearity: `"tanh"` or `"relu"`.
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: whether input and output are [B, T, *] and not [T, B, *].
        dropout: probability of zeroing outputs between layers while training.
        bidirectional: whether a second direction runs from the end; then `D` is 2, else 1.
        device, dtype: device and dtype of the parameters.
        heads: number of independent recurrences of `H/heads` units each over the same input. Their
            outputs and states are concatenated, so `weight_hh` is block-diagonal. If there are
            several, every parameter has a first dimension of that size and `weight_hh_l0` is
            [heads, G*H/heads, H/heads]: the weights of a head are those of a small layer.
            torch.nn does not have this argument.
        recompute: whether training saves only outputs for the backward pass, which recomputes all
            else; see `functional.rnn`. The attribute of this name may be set at any time, also on
            a layer that replaced one of torch.nn. torch.nn does not have this argument.
        zoneout: probability with which a unit keeps its state of the step before while training,
            for all states or one for each; see `cells.zoneout`. torch.nn does not have these four
            arguments, which are fixed when the layer is made.
        recurrent_dropout: probability of zeroing units of what the recurrent weights multiply while
            training; see `cells.recurrent_dropout`.
        recurrent_dropout_per: `"sequence"` to zero the same units at all steps of a sequence,
            `"step"` to draw them at every step.
        clip_grad_step: largest absolute value of the gradients of the states at every step of the
            backward pass, or None; see `cells.clip_grad`.

    Call:
        `output, h_n = layer(input, hx=None, *, lengths=None, resets=None)` with `input`
        [T, B, I], [T, I] or a `PackedSequence`; `hx` and `h_n` [num_layers*D, B, H]; `output`
        [T, B, D*H]. `lengths` [B] gives the steps of each sequence, in any order, and `resets`
        (bool, [T, B]) marks steps where an episode begins, from zeros or from `reset_states`, in
        the form of `hx`; `functional.rnn` describes them.
        With `return_states=True` there is a third result: for every layer a tuple of its states
        after every step, in the form of `output`, with gradients.

    Raises:
        The errors of torch.nn, in messages that begin with torch.nn's sentence if it has one:
        `TypeError` and `ValueError` for arguments; from a call `ValueError` for wrong dimensions
        or dtype of the input, `RuntimeError` for wrong sizes.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        _proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        recompute: bool = False,
        zoneout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per: str = "sequence",
        clip_grad_step: float | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(self, unknown)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(CELL_OF_MODE[mode], mode, locals() | {"proj_size": _proj_size})
        self.nonlinearity = nonlinearity


@counterpart_of(nn.GRU)
@with_own_forward
class GRU(_NoProjection):
    """Gated recurrent units, a drop-in for `torch.nn.GRU` with the same parameters and numbers.

    Arguments, call and errors are those of `RNN`, without `nonlinearity`. The reset gate is
    applied after the product (Cho et al. 2014, arXiv:1406.1078v1), as in torch.nn and cuDNN.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    _name = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        _proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        recompute: bool = False,
        zoneout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per: str = "sequence",
        clip_grad_step: float | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(self, unknown)
        super().__init__(cells.gru, "GRU", locals() | {"proj_size": _proj_size})


class _MultiState(Layer):
    """Base of layers with several states, whose `hx` is a tuple."""

    def check_forward_args(
        self,
        input: Tensor,
        hidden: Sequence[Tensor],  # type: ignore[override]
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise torch.nn's errors for an input or states of wrong dtype or shape."""
        self.check_input(input, batch_sizes)
        for k, s in enumerate(hidden):
            size = self.get_expected_cell_size if k else self.get_expected_hidden_size
            self.check_hidden_size(
                s, size(input, batch_sizes), f"Expected hidden[{k}] size {{}}, got {{}}"
            )

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Shape [num_layers*D, B, H] of the states after the first, which are not projected."""
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, ...], permutation: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The states with the batch permuted."""
        if permutation is None:
            return hx
        return tuple(s.index_select(1, permutation) for s in hx)


@counterpart_of(nn.LSTM)
@with_own_forward
class LSTM(_MultiState):
    """Long short-term memory, a drop-in for `torch.nn.LSTM` with the same parameters and numbers.

    Arguments, call and errors are those of `RNN`, without `nonlinearity` and with `proj_size`. If
    that is positive, `h` and the output have `proj_size` features, fewer than `hidden_size` (Sak
    et al. 2014, arXiv:1402.1128); `zoneout` and `recurrent_dropout` are then refused. States are
    pairs `(h, c)`.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    _name = "LSTM"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        recompute: bool = False,
        zoneout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per: str = "sequence",
        clip_grad_step: float | None = None,
    ) -> None:
        super().__init__(cells.lstm, "LSTM", locals())

    def _check(
        self,
        input: Tensor,
        hx: States | None,
        batch_sizes: Tensor | None,
        weight: Tensor,
    ) -> None:
        if batch_sizes is None:
            super()._check(input, hx, batch_sizes, weight)
            return
        # torch.nn does not check the packed input of an LSTM: its errors come from the operator's
        # loop over layers and from its products.
        for k, state in enumerate(hx or ()):
            if (rank := state.dim()) < 3:
                raise IndexError(
                    f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], "
                    f"but got 2): hx[{k}] should be 3-D but is {rank}-D"
                )
        if hx is not None and (count := hx[0].size(0)) != len(self._all_weights):
            if self.bidirectional and count % 2:
                what = "Odd number of params or hiddens given to a bidirectional RNN"
            else:
                what = "Expected more hidden states in stacked_rnn"
            raise RuntimeError(
                f"{what}: hx has states of {count} layers and directions, and the module has "
                f"{len(self._all_weights)}"
            )
        try:
            super()._check(input, hx, batch_sizes, weight)
        except ValueError as error:
            what = different_dtypes(input, weight)
            raise RuntimeError(f"{what}: {error}") from None


@with_own_forward
class Recurrent(_MultiState):
    """Layers of any cell, with parameters, stacking and directions as in torch.nn.

    Args:
        cell: a cell declared with `fastrnn.cell`, or one of `fastrnn.cells`, with `G` gates and `S`
            states.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in `RNN`.
        device, dtype: device and dtype of the parameters. They have torch's names:
            `weight_ih_l0` [G*H, I] and so on, where `G` counts the gates that have rows in that
            matrix. There is no parameter without rows.
        heads, recompute, zoneout, recurrent_dropout, recurrent_dropout_per, clip_grad_step: as in
            `RNN`.
        proj_size: as in `LSTM`: every step of a cell that reads its previous output through the
            recurrent weights alone may end in one more product, with `weight_hr_l0` [proj_size, H]
            and so on. Then `weight_hh_l0` is [G*H, proj_size].

    Call:
        As in `RNN`, also with `return_states=True`. `hx` and the final states are one tensor
        [num_layers*D, B, H] for a cell with one state, and a tuple of `S` such tensors for a cell
        with several; the first has `proj_size` features if that is positive.

    Raises:
        TypeError: if `cell` is not a `fastrnn.Cell`.
        ValueError: if `proj_size` is positive and the cell uses its previous output unit by unit,
            or multiplies another value by the recurrent weights. All other errors are those of
            `LSTM`.

    Example:
        >>> import torch, fastrnn
        >>> @fastrnn.cell(gates="zn", states="h")
        ... def light_gru(u, v, h):  # Ravanelli et al. 2018, arXiv:1803.10225
        ...     z = torch.sigmoid(u.z + v.z)
        ...     return z * h + (1 - z) * torch.relu(u.n + v.n)
        >>> layer = fastrnn.Recurrent(light_gru, 4, 8, num_layers=2)
        >>> output, h_n = layer(torch.randn(5, 3, 4))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 8]), torch.Size([2, 3, 8]))
    """

    _name = "Recurrent"

    def __init__(
        self,
        cell: Cell,
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
        if not isinstance(cell, Cell):
            raise TypeError(
                f"cell should be a fastrnn.Cell, got: {type(cell).__name__}; "
                "make one by decorating a function with fastrnn.cell(gates=..., states=...)"
            )
        if proj_size:
            check_projected(cell)
        self.cell = cell  # first, because the constructor writes the cell's initial values
        super().__init__(cell, cell.name, locals())

    def _cell(self) -> Cell:
        return self._quiet or self.cell

    def check_forward_args(
        self,
        input: Tensor,
        hidden: States,
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise torch.nn's errors for an input or states of wrong dtype or shape."""
        states = (hidden,) if isinstance(hidden, Tensor) else hidden
        super().check_forward_args(input, states, batch_sizes)

    def permute_hidden(  # type: ignore[override]
        self, hx: States, permutation: Tensor | None
    ) -> States:
        """The states with the batch permuted."""
        if isinstance(hx, Tensor):
            return nn.RNNBase.permute_hidden(self, hx, permutation)
        return super().permute_hidden(tuple(hx), permutation)

    def extra_repr(self) -> str:
        """The cell, then the arguments that differ from their defaults."""
        return f"{self.cell.name}, {super().extra_repr()}"

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"torch.jit.script knows no layer for the cell {self.cell.name!r}; "
            "use torch.export or torch.compile"
        )
