"""RNNCell, LSTMCell and GRUCell: one time step, with the parameters and behaviour of torch.nn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastrnn import cells, ops
from fastrnn.cells import Cell
from fastrnn.kernels.operands import Weights
from fastrnn.nn import functional
from fastrnn.nn.convert import counterpart_of, export_forward, scriptable
from fastrnn.nn.freeze import Freezable, operands, precision_of, slots_of, stepper_of
from fastrnn.nn.stream import Slots, Stepper

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_CELL_OF_NONLINEARITY = {"tanh": cells.rnn_tanh, "relu": cells.rnn_relu}


class _Cell(Freezable):
    def _weights(self, instead: Mapping[str, Any] | None = None) -> list[Weights]:
        own: Mapping[str, Any] = self._parameters
        if instead:
            own = {**own, **instead}
        weights: list[Any] = [own[n] if n in own else getattr(self, n) for n in _WEIGHTS]
        return [Weights(*weights)]

    def _weight_names(self) -> list[str]:
        return list(_WEIGHTS)

    def stream(self, batch_size: int = 1, *, threads: int = 1, release_gil: bool = True) -> Stepper:
        """Make a stepper, which runs this cell one step at a time for inference.

        It has its own states and its own copy of the weights. Arguments and errors are those of
        `fastrnn.LSTM.stream`.

        Example:
            >>> import numpy, fastrnn
            >>> stepper = fastrnn.LSTMCell(8, 16).stream()
            >>> y = stepper.step(numpy.zeros((1, 8), "float32"))  # the next h
            >>> h, c = stepper.state  # [1, B, H] each
        """
        return stepper_of(self, batch_size, threads, release_gil)

    def stream_slots(self, capacity: int, *, threads: int = 1, release_gil: bool = True) -> Slots:
        """Make slots for up to `capacity` streams. Arguments and errors are those of
        `fastrnn.LSTM.stream_slots`."""
        return slots_of(self, capacity, threads, release_gil)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)


@counterpart_of(nn.RNNCell)
class RNNCell(_Cell, nn.RNNCell):
    """One step of an Elman network, a drop-in for `torch.nn.RNNCell`, with its arguments, shapes
    and errors.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state from `input` [B, I] or [I] and `hx` [B, H] or [H]."""
        if (other := export_forward(self, input)) is not None:
            return other(input, hx)
        return _step(self, self._cell(), input, () if hx is None else (hx,))[0]

    def _cell(self) -> Cell:
        if self.nonlinearity not in _CELL_OF_NONLINEARITY:
            raise RuntimeError(
                f"Unknown nonlinearity: {self.nonlinearity}. Select from 'tanh' or 'relu'."
            )
        return _CELL_OF_NONLINEARITY[self.nonlinearity]


@counterpart_of(nn.LSTMCell)
class LSTMCell(_Cell, nn.LSTMCell):
    """One step of long short-term memory, a drop-in for `torch.nn.LSTMCell`, with its arguments,
    shapes and errors.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next states `(h, c)` from `input` [B, I] or [I] and `hx`, a pair [B, H] or [H]."""
        if (other := export_forward(self, input)) is not None:
            return other(input, hx)
        if hx is not None and (type(hx) is not tuple or len(hx) != 2):
            hx = _pair(input, hx)
        h, c = _step(self, self._cell(), input, () if hx is None else hx)
        return h, c

    def _cell(self) -> Cell:
        return cells.lstm


@counterpart_of(nn.GRUCell)
class GRUCell(_Cell, nn.GRUCell):
    """One step of gated recurrent units, a drop-in for `torch.nn.GRUCell`, with its arguments,
    shapes and errors.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state from `input` [B, I] or [I] and `hx` [B, H] or [H]."""
        if (other := export_forward(self, input)) is not None:
            return other(input, hx)
        return _step(self, self._cell(), input, () if hx is None else (hx,))[0]

    def _cell(self) -> Cell:
        return cells.gru


def _check_cell_dims(cell: Cell, input: Tensor, states: Iterable[Tensor]) -> None:
    name = {"lstm": "LSTMCell", "gru": "GRUCell"}.get(cell.name, "RNNCell")
    if input.dim() not in (1, 2):
        raise ValueError(
            f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead; "
            "input is [B, I] or [I]"
        )
    for k, s in enumerate(states):
        if s.dim() not in (1, 2):
            what = f"hx[{k}]" if len(cell.states) > 1 else "hidden"
            raise ValueError(
                f"{name}: Expected {what} to be 1D or 2D, got {s.dim()}D instead; "
                "states are [B, H] or [H]"
            )


def _pair(input: Tensor, hx: Any) -> tuple[Tensor, Tensor]:
    """The two states in an `hx` that is not a tuple of two, if torch.nn accepts it."""
    _check_cell_dims(cells.lstm, input, hx)
    if input.dim() == 1:  # torch.nn then takes the first two entries of any sequence
        return hx[0], hx[1]
    if isinstance(hx, Tensor):
        raise TypeError(
            "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor; "
            "pass hx=(h, c)"
        )
    if len(hx) != 2:
        raise RuntimeError(f"lstm_cell expects two hidden states (h, c), got {len(hx)} in hx")
    return hx[0], hx[1]


def _wrong_size(k: int, state: Tensor, input: Tensor, hidden_size: int) -> Exception:
    """torch.nn's error for state k; a row without a batch counts as a batch of one."""
    batched = input.dim() == 2
    expected = [input.size(0), hidden_size] if batched else [hidden_size]
    is_and_should = f": it is {list(state.size())} and should be {expected}"
    batch, *width = state.size() if batched else (1, *state.size())
    if batched and batch != input.size(0):
        return RuntimeError(
            f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {batch}"
            + is_and_should
        )
    if not width:
        return IndexError(
            "Dimension out of range (expected to be in range of [-1, 0], but got 1) of "
            f"hidden{k}{is_and_should}"
        )
    if width[0] != hidden_size:
        return RuntimeError(
            f"hidden{k} has inconsistent hidden_size: got {width[0]}, expected {hidden_size}"
            + is_and_should
        )
    # torch.nn would treat the rows of the state as steps.
    return RuntimeError(f"hidden{k} has inconsistent size{is_and_should}")


def _step(
    module: RNNCell | LSTMCell | GRUCell, cell: Cell, input: Tensor, hx: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    frozen = module._frozen
    if frozen is None or frozen.precision is None:
        (weights,) = module._weights()
        packed = None if frozen is None else frozen.layers[0]
    else:
        (weights,), layers = operands(module, input)
        packed = layers[0] if layers else None
    after = ops.step(cell, input, hx, weights, packed)
    if after is not None:
        return after
    _check_cell_dims(cell, input, hx)
    if input.size(-1) != module.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.size(-1)} expected {module.input_size}"
        )
    if hx:
        size = module.hidden_size
        expected = (input.size(0), size) if input.dim() == 2 else (size,)
        for k, s in enumerate(hx):
            if s.shape != expected:
                raise _wrong_size(k, s, input, size)
    stored = precision_of(module, stored=True)
    dtype = None if stored is None else stored.dtype
    return functional.rnn_cell(cell, input, hx, weights, packed, dtype)
