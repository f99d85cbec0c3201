"""RNN, LSTM, GRU, and `Recurrent` for any cell: parameters and manners of torch.nn.

Layers derive from `nn.RNNBase` and not from `nn.LSTM` and its siblings, because `torch.compile`
refuses those by `isinstance`. Weights are read anew on every call: they may be parametrized,
tied, replaced or functionalised between two calls, and nothing here may remember them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.kernels.operands import Weights, named
from fastrnn.nn import functional
from fastrnn.nn.checks import (
    States,
    check_arguments,
    check_dtype,
    check_heads,
    check_input,
    different_dtypes,
    refuse_unknown,
)
from fastrnn.nn.convert import detour, scriptable, twin_of
from fastrnn.nn.freeze import Freezable
from fastrnn.nn.stream import Stepper, stepper

__all__ = ["GRU", "LSTM", "RNN", "Recurrent"]

Device = torch.device | str | int | None
Sequences = Tensor | PackedSequence
Lengths = Tensor | Sequence[int] | None
Resets = Tensor | PackedSequence | None

_CELL_OF_MODE = {
    "RNN_TANH": cells.rnn_tanh,
    "RNN_RELU": cells.rnn_relu,
    "LSTM": cells.lstm,
    "GRU": cells.gru,
}


class Written(NamedTuple):
    """The list `_flat_weights`, and the layer's own weights when it was made."""

    entries: list[Tensor | None]
    own: list[Tensor | None]


class _Layer(Freezable, nn.RNNBase):
    """What all layers share: parameters as torch.nn names them, and the call."""

    _name = "RNN"
    # Defaults for layers converted from torch.nn and for older pickles.
    heads = 1
    recompute = False
    _written: Written | None = None

    def __init__(
        self,
        cell: Cell,
        mode: str,
        *,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        heads: int,
        recompute: bool,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        # Not RNNBase's constructor: that one knows four modes only and says less in its errors.
        nn.Module.__init__(self)
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        check_arguments(
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            proj_size=proj_size,
        )
        check_heads(heads, hidden_size, bidirectional, proj_size)
        if heads > 1:
            self.heads = heads
        if recompute:
            self.recompute = True
        # RNNBase's own methods expect it. Weak references to parameters would keep
        # load_state_dict from swapping them, so it stays empty.
        self._flat_weight_refs: list[Any] = []
        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []

        rows = len(cell.gates) * hidden_size // heads
        recurrent = proj_size or hidden_size
        directions = ("", "_reverse") if bidirectional else ("",)
        for layer in range(num_layers):
            width = input_size if layer == 0 else recurrent * len(directions)
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (rows, width),
                "weight_hh": (rows, recurrent // heads),
            }
            if bias:
                shapes.update(bias_ih=(rows,), bias_hh=(rows,))
            if proj_size:
                shapes["weight_hr"] = (proj_size, hidden_size)
            if heads > 1:
                shapes = {kind: (heads, *shape) for kind, shape in shapes.items()}
            for suffix in directions:
                names = [f"{kind}_l{layer}{suffix}" for kind in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    empty = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(name, nn.Parameter(empty))
                self._flat_weights_names.extend(names)
                self._all_weights.append(names)
        self.reset_parameters()

    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Lengths = None,
        resets: Resets = None,
    ) -> tuple[Sequences, Tensor | tuple[Tensor, ...]]:
        """Run the layer; see the class for shapes."""
        extras = (
            {} if lengths is None and resets is None else {"lengths": lengths, "resets": resets}
        )
        if (other := detour(self, input, extras)) is not None:
            return other(input, hx, **extras)
        return functional.rnn(
            self._cell(),
            input,
            self._weights(),
            hx,
            bidirectional=self.bidirectional,
            heads=self.heads,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            resets=resets,
            recompute=self.recompute,
            name=self._name,
            check=self._check,
            packed=self._frozen.layers if self._frozen is not None else (),
        )

    def _slow_forward(self, *arguments: Any, **keywords: Any) -> Any:
        # What nn.Module calls in place of forward while TorchScript traces. The ONNX exporter that
        # does so passes the defaults of all parameters by position, of those for keywords too.
        while len(arguments) > 2 and arguments[-1] is None:
            arguments = arguments[:-1]
        return super()._slow_forward(*arguments, **keywords)  # type: ignore[no-untyped-call]

    def stream(self, batch_size: int = 1, *, threads: int = 1, release_gil: bool = True) -> Stepper:
        """A stepper: these layers with a copy of their weights and states of its own, for
        inference one step at a time. Dropout is not applied.

        Args:
            batch_size: rows of every step.
            threads: how many it may use at most; the plan takes as many as pay, from 256 KB of
                weights on. The others keep their cores busy for about 200 us after a step, then
                sleep, and the step that wakes them makes a system call. One is safe in real time.
            release_gil: whether other Python threads may run during a step; see `Stepper`.

        Raises:
            ValueError: for a bidirectional layer or one with heads, a batch or threads below one,
                or weights on another device than the CPU.
            fastrnn.plan.KernelRefused: for a cell of one's own that cannot be compiled.

        Example:
            >>> import numpy, fastrnn
            >>> stepper = fastrnn.GRU(8, 16).stream()
            >>> x, y = numpy.zeros((1, 8), "float32"), numpy.empty((1, 16), "float32")
            >>> stepper.step(x, y) is y
            True
        """
        if self.bidirectional:
            raise ValueError(
                "a bidirectional layer needs the whole sequence before its first output, "
                "so it cannot be streamed; use bidirectional=False"
            )
        if self.heads > 1:
            raise ValueError(
                f"a stepper runs one recurrence per layer, not heads={self.heads}; call the layer "
                "on one step at a time instead"
            )
        return stepper(self._cell(), self._weights(), batch_size, threads, release_gil)

    def _cell(self) -> Cell:
        if self.mode not in _CELL_OF_MODE:
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return _CELL_OF_MODE[self.mode]

    def _weights(self) -> list[Weights]:
        # A look into `_parameters` first: nn.Module's attribute lookup takes longer than a
        # small cell. What is not there was parametrized, or set as a plain tensor.
        own: Mapping[str, Any] = self._parameters
        if self._written is not None and (written := self._written_entries()):
            own = {**own, **written}
        lists: list[list[Any]] = [
            [own[n] if n in own else getattr(self, n) for n in names] for names in self._all_weights
        ]
        if self.heads > 1:
            lists = [list(head) for each in lists for head in zip(*each, strict=True)]
        return [named(each) for each in lists]

    def _weight_names(self) -> list[str]:
        return self._flat_weights_names

    def _check(
        self,
        input: Tensor,
        hx: States | None,
        batch_sizes: Tensor | None,
        weight: Tensor,
    ) -> None:
        check_dtype(input, weight)
        if hx is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, cast(Tensor, hx), batch_sizes)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise what torch.nn raises for an input of wrong dtype or shape."""
        # A parametrized weight is left alone: computing it may change its state.
        weight = self._parameters.get(self._flat_weights_names[0])
        if weight is not None:
            check_dtype(input, weight)
        check_input(input, self.input_size, batch_sizes)

    # torch.nn computes with the entries of its list `_flat_weights`, which users write: with
    # dropped weights, with those of another layer. Here the list is made when somebody asks for it,
    # and counts until one of the layer's own weights is replaced, as in torch.nn.

    def _own_weights(self) -> list[Tensor | None]:
        return [getattr(self, n, None) for n in self._flat_weights_names]

    def _written_entries(self) -> Mapping[str, Any]:
        """What stands in the list in the place of the layer's own weights, by name."""
        if self._written is None:
            return {}
        entries, own = self._written
        if not all(map(is_, self._own_weights(), own)):
            return {}
        names = self._flat_weights_names
        if len(entries) != len(names):
            raise RuntimeError(
                f"_flat_weights should hold {len(names)} weights ({', '.join(names)}), "
                f"got {len(entries)}"
            )
        triples = zip(names, entries, own, strict=True)
        return {name: entry for name, entry, weight in triples if entry is not weight}

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        own = self._own_weights()
        if self._written is None or not all(map(is_, own, self._written.own)):
            self._written = Written(own.copy(), own)
        return self._written.entries

    @_flat_weights.setter
    def _flat_weights(self, values: list[Tensor | None]) -> None:
        self._written = Written(values, self._own_weights())

    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_written", None)

    def _weights_have_changed(self) -> bool:
        return False

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: no kernel here needs the weights in one buffer."""

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)
        self.__dict__.pop("_flat_weights", None)
        self._flat_weight_refs = []

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        return super().extra_repr() + heads + (", recompute=True" if self.recompute else "")

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)


class _Plain(_Layer):
    """RNN and GRU: no projection."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise what torch.nn raises for an input of wrong dtype or shape."""
        super().check_input(input, batch_sizes)
        if self.proj_size > 0:
            expected = self.get_expected_hidden_size(input, batch_sizes)
            raise RuntimeError(
                f"Expected hidden size {expected}, got {[*expected[:2], self.hidden_size]}: "
                f"{self._name} was given proj_size={self.proj_size}, and projections are for LSTM"
            )


@twin_of(nn.RNN)
class RNN(_Plain):
    """Elman network, a drop-in for `torch.nn.RNN` with the same parameters and numbers.

    Args:
        input_size: `I`, features of the input.
        hidden_size: `H`, features of the state.
        num_layers: layers stacked on each other.
        nonlinearity: `"tanh"` or `"relu"`.
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: whether input and output are [B, T, *] and not [T, B, *].
        dropout: probability of zeroing outputs between layers while training.
        bidirectional: whether a second direction runs from the end; `D` = 2 then, else 1.
        device, dtype: of the parameters.
        heads: independent recurrences of `H/heads` units each over the same input, their outputs
            and states concatenated: a block-diagonal `weight_hh`. Every parameter then has a first
            dimension of that size, so that the weights of head k are those of a small layer:
            `weight_hh_l0` is [heads, G*H/heads, H/heads]. A keyword of ours alone.
        recompute: whether training keeps only outputs between the way there and the way back, and
            computes the rest again; see `functional.rnn`. An attribute, which may be set at any
            time, also on a layer that replaced one of torch.nn. A keyword of ours alone.

    Call:
        `output, h_n = layer(input, hx=None, *, lengths=None, resets=None)` with `input`
        [T, B, I], [T, I] or a `PackedSequence`; `hx` and `h_n` [num_layers*D, B, H]; `output`
        [T, B, D*H]. `lengths` [B] takes rows of different lengths unsorted, `resets` (bool,
        [T, B]) marks steps where an episode begins; both are given by keyword, and described in
        `functional.rnn`.

    Raises:
        As torch.nn does, and a message begins with torch.nn's sentence where it has one:
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
        **unknown: Any,
    ) -> None:
        refuse_unknown(self, unknown)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(
            _CELL_OF_MODE[mode],
            mode,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=_proj_size,
            heads=heads,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity


@twin_of(nn.GRU)
class GRU(_Plain):
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
        **unknown: Any,
    ) -> None:
        refuse_unknown(self, unknown)
        super().__init__(
            cells.gru,
            "GRU",
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=_proj_size,
            heads=heads,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )


class _Several(_Layer):
    """Layers with several states: `hx` is a tuple of them."""

    def check_forward_args(
        self,
        input: Tensor,
        hidden: Sequence[Tensor],  # type: ignore[override]
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise what torch.nn raises for an input or states of wrong dtype or shape."""
        self.check_input(input, batch_sizes)
        for k, s in enumerate(hidden):
            size = self.get_expected_cell_size if k else self.get_expected_hidden_size
            self.check_hidden_size(
                s, size(input, batch_sizes), f"Expected hidden[{k}] size {{}}, got {{}}"
            )

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Shape of the states behind the first, which no projection narrows."""
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, ...], permutation: Tensor | None
    ) -> tuple[Tensor, ...]:
        """States in another order of the batch."""
        if permutation is None:
            return hx
        return tuple(s.index_select(1, permutation) for s in hx)


@twin_of(nn.LSTM)
class LSTM(_Several):
    """Long short-term memory, a drop-in for `torch.nn.LSTM` with the same parameters and numbers.

    Arguments, call and errors are those of `RNN`, without `nonlinearity`, and with `proj_size`:
    if positive, the recurrent state and the output have `proj_size` features, less than
    `hidden_size` (Sak et al. 2014, arXiv:1402.1128). States are pairs `(h, c)`.

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
    ) -> None:
        super().__init__(
            cells.lstm,
            "LSTM",
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            heads=heads,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )

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
        # torch.nn checks nothing of packed input of an LSTM: what it says comes from the operator,
        # its loop over layers and its products.
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


class Recurrent(_Several):
    """Layers of any cell, with the parameters, layers and directions of torch.nn's.

    Args:
        cell: a cell made with `fastrnn.cell`, of `G` gates and `S` states.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in `RNN`.
        device, dtype: of the parameters, `weight_ih_l0` [G*H, I] and so on, in torch's names.
        heads, recompute: as in `RNN`.

    Call:
        As `RNN`. `hx` and the final states are one tensor for a cell with one state, and tuples
        of `S` tensors, each [num_layers*D, B, H], for a cell with several.

    Raises:
        TypeError: if `cell` is none. Otherwise as `RNN`.

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
        heads: int = 1,
        recompute: bool = False,
    ) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(
                f"cell should be a fastrnn.Cell, got: {type(cell).__name__}; "
                "make one by decorating a function with fastrnn.cell(gates=..., states=...)"
            )
        super().__init__(
            cell,
            cell.name,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=0,
            heads=heads,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )
        self.cell = cell

    def _cell(self) -> Cell:
        return self.cell

    def check_forward_args(
        self,
        input: Tensor,
        hidden: States,
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise what torch.nn raises for an input or states of wrong dtype or shape."""
        states = (hidden,) if isinstance(hidden, Tensor) else hidden
        super().check_forward_args(input, states, batch_sizes)

    def permute_hidden(  # type: ignore[override]
        self, hx: States, permutation: Tensor | None
    ) -> States:
        """States in another order of the batch."""
        if isinstance(hx, Tensor):
            return nn.RNNBase.permute_hidden(self, hx, permutation)
        return super().permute_hidden(tuple(hx), permutation)

    def extra_repr(self) -> str:
        """The cell, then what differs from the defaults."""
        return f"{self.cell.name}, {super().extra_repr()}"

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"torch.jit.script knows no layer for the cell {self.cell.name!r}; "
            "use torch.export or torch.compile"
        )
