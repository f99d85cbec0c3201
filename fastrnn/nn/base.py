"""The base class of all layers: parameters with torch.nn's names, and the call.

Layers derive from `nn.RNNBase` and not from `nn.LSTM` and its siblings, because `torch.compile`
refuses those by `isinstance`. Every call reads the weights again, because they may be parametrized,
tied, replaced or functionalized between two calls. Do not cache them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import cells, ops
from fastrnn.cells import Cell
from fastrnn.kernels.operands import Weights, heads_of, named
from fastrnn.nn import functional
from fastrnn.nn.checks import States, check_arguments, check_dtype, check_heads, check_input
from fastrnn.nn.convert import export_forward, scriptable
from fastrnn.nn.flat_weights import FlatWeights
from fastrnn.nn.freeze import Freezable, operands, precision_of, slots_of, stepper_of
from fastrnn.nn.initial import initialize
from fastrnn.nn.stream import Slots, Stepper

__all__ = ["CELL_OF_MODE", "Layer", "with_own_forward"]

_Class = TypeVar("_Class", bound="type[Layer]")

Sequences = Tensor | PackedSequence
Lengths = Tensor | Sequence[int] | None
Resets = Tensor | PackedSequence | None

CELL_OF_MODE = {
    "RNN_TANH": cells.rnn_tanh,
    "RNN_RELU": cells.rnn_relu,
    "LSTM": cells.lstm,
    "GRU": cells.gru,
}


class Layer(Freezable, FlatWeights):
    """A stack of layers of one cell, in one or both directions."""

    _name = "RNN"
    # Defaults for layers converted from torch.nn and for older pickles.
    heads = 1
    recompute = False
    zoneout: float | tuple[float, ...] = 0.0
    recurrent_dropout = 0.0
    recurrent_dropout_per = "sequence"
    clip_grad_step: float | None = None
    _param_count = 0  # of the cell's learned parameters
    _lacks_rows = False  # whether gates of the cell lack rows of a matrix
    # The cell with what these arguments add, in evaluation and in training; None if they add
    # nothing.
    _quiet: Cell | None = None
    _noisy: Cell | None = None

    def __init__(self, cell: Cell, mode: str, arguments: Mapping[str, Any]) -> None:
        """`arguments` holds the arguments of the public constructor by name, and `proj_size`."""
        # RNNBase's constructor is not called: it knows only four modes, and its errors say less.
        nn.Module.__init__(self)
        self.mode = mode
        self.input_size = arguments["input_size"]
        self.hidden_size = arguments["hidden_size"]
        self.num_layers = arguments["num_layers"]
        self.bias = arguments["bias"]
        self.batch_first = arguments["batch_first"]
        self.dropout = float(arguments["dropout"])
        self.bidirectional = arguments["bidirectional"]
        self.proj_size = arguments["proj_size"]
        check_arguments(arguments)
        check_heads(arguments)
        if arguments["heads"] > 1:
            self.heads = arguments["heads"]
        if arguments["recompute"]:
            self.recompute = True
        self._vary(cell, arguments)
        if cell.params:
            self._param_count = len(cell.params)
        if not cell.has_all_rows:
            self._lacks_rows = True
        # RNNBase's methods expect this list. It stays empty, because weak references to parameters
        # would keep load_state_dict from swapping them.
        self._flat_weight_refs: list[Any] = []
        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.num_layers):
            shapes = self._shapes(cell, layer)
            for suffix in directions:
                names = [f"{kind}_l{layer}{suffix}" for kind in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    empty = torch.empty(shape, device=arguments["device"], dtype=arguments["dtype"])
                    self.register_parameter(name, nn.Parameter(empty))
                self._flat_weights_names.extend(names)
                self._all_weights.append(names)
        self.reset_parameters()

    def _vary(self, cell: Cell, arguments: Mapping[str, Any]) -> None:
        """Make the variants of the cell that the arguments ask for."""
        quiet = cell
        if arguments["zoneout"]:
            quiet = cells.zoneout(quiet, arguments["zoneout"])
        if quiet is not cell:
            self.zoneout = arguments["zoneout"]
        if arguments["clip_grad_step"] is not None:
            self.clip_grad_step = arguments["clip_grad_step"]
            quiet = cells.clip_grad(quiet, self.clip_grad_step)
        per = arguments["recurrent_dropout_per"]
        noisy = cells.recurrent_dropout(quiet, arguments["recurrent_dropout"], per)
        if noisy is not quiet:
            self.recurrent_dropout = arguments["recurrent_dropout"]
            self.recurrent_dropout_per = per
        for name in ("zoneout", "recurrent_dropout"):
            if self.proj_size and getattr(self, name):
                raise ValueError(f"{name} is for states that are not projected; use proj_size=0")
        if quiet is not cell:
            self._quiet = quiet
        if noisy.noisy is not cell:
            self._noisy = noisy.noisy

    def _shapes(self, cell: Cell, layer: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's parameters in one direction, in torch.nn's order."""
        hidden = self.hidden_size // self.heads
        of_u, of_v = len(cell.inputs) * hidden, len(cell.recurrent) * hidden
        recurrent = self.proj_size or self.hidden_size
        width = recurrent * (2 if self.bidirectional else 1) if layer else self.input_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (of_u, width),
            "weight_hh": (of_v, recurrent // self.heads),
        }
        if self.bias:
            shapes.update(bias_ih=(of_u,), bias_hh=(of_v,))
        if not cell.recurrent:
            shapes = {kind: shapes[kind] for kind in shapes if kind.endswith("ih")}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        for name, param in cell.params.items():
            shapes[f"weight_{name}"] = (param.size(hidden, len(cell.gates)),)
        if self.heads > 1:
            return {kind: (self.heads, *shape) for kind, shape in shapes.items()}
        return shapes

    def reset_parameters(self) -> None:
        """Write torch's uniform initial values, then those of the cell, if it has its own.

        A parametrized weight begins where its parametrization stores it. What is stored in several
        tensors, or in another shape, has torch's values.
        """
        if precision_of(self, stored=True) is not None:
            raise RuntimeError(
                "this layer holds its matrices quantised: call fastrnn.dequantize_(module) before "
                "reset_parameters()"
            )
        super().reset_parameters()
        cell = self._cell()
        if cell.initialize is None and not cell.params:
            return
        parametrized = getattr(self, "parametrizations", {})
        stored = {
            name: weight.original
            for name, weight in parametrized.items()
            if weight.is_tensor and not weight.unsafe
        }
        with torch.no_grad():
            for weights in self._weights(stored):
                initialize(cell, weights)

    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Lengths = None,
        resets: Resets = None,
        reset_states: States | None = None,
        return_states: bool | None = None,  # None and not False: see `_slow_forward`
    ) -> tuple[Any, ...]:
        """Run the layer. The class documents the shapes."""
        extras: dict[str, Any] = (
            {} if lengths is None and resets is None else {"lengths": lengths, "resets": resets}
        )
        if reset_states is not None:
            extras["reset_states"] = reset_states
        if return_states:
            extras["return_states"] = True
        if (other := export_forward(self, input, extras)) is not None:
            return other(input, hx, **extras)
        frozen = self._frozen
        if frozen is None or frozen.precision is None:
            weights, packed = self._weights(), () if frozen is None else frozen.layers
        else:
            weights, packed = operands(self, input)
        noisy = self._noisy if self.training and frozen is None else None
        cell = noisy or self._cell()
        if reset_states is None and not return_states:
            dropout = self.dropout if self.training else 0.0
            ways = self.bidirectional, self.heads, self.batch_first, self.recompute, dropout
            quick = ops.layers(cell, input, hx, weights, self._check, ways, packed, lengths, resets)
            if quick is not None:
                return quick
        return functional.rnn(
            cell,
            input,
            weights,
            hx,
            bidirectional=self.bidirectional,
            heads=self.heads,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            resets=resets,
            reset_states=reset_states,
            recompute=self.recompute,
            return_states=bool(return_states),
            name=self._name,
            check=self._check,
            packed=packed,
        )

    def _slow_forward(self, *arguments: Any, **keywords: Any) -> Any:
        # nn.Module calls this in place of forward while TorchScript traces. The ONNX exporter then
        # passes the defaults of all parameters by position, even those of keyword-only ones, and
        # numbers as tensors.
        while len(arguments) > 2 and arguments[-1] is None:
            arguments = arguments[:-1]
        return super()._slow_forward(*arguments, **keywords)  # type: ignore[no-untyped-call]

    def stream(self, batch_size: int = 1, *, threads: int = 1, release_gil: bool = True) -> Stepper:
        """Make a stepper, which runs these layers one step at a time for inference.

        It has its own states and its own copy of the weights. Dropout is not applied.

        Args:
            batch_size: `B`, rows of every step.
            threads: most threads that it may use; the plan takes fewer if more would not pay, and
                one below 256 KB of weights. The other threads keep their cores busy for about
                200 us after a step, then sleep; the step that wakes them makes a system call. One
                thread is safe in real time.
            release_gil: whether other Python threads may run during a step; see `Stepper`.

        Raises:
            ValueError: if the layer is bidirectional or has heads, if `batch_size` or `threads` is
                below one, or if the weights are not on the CPU.
            fastrnn.plan.KernelRefused: if a custom cell cannot be compiled.

        Example:
            >>> import numpy, fastrnn
            >>> stepper = fastrnn.GRU(8, 16).stream()
            >>> x, y = numpy.zeros((1, 8), "float32"), numpy.empty((1, 16), "float32")
            >>> stepper.step(x, y) is y
            True
        """
        self._check_streamable()
        return stepper_of(self, batch_size, threads, release_gil)

    def stream_slots(self, capacity: int, *, threads: int = 1, release_gil: bool = True) -> Slots:
        """Make slots for up to `capacity` streams, of which a server runs those together that have
        a frame now.

        Each stream has its own states; all share one copy of the weights. Dropout is not applied.
        Other arguments and errors are those of `stream`.

        Example:
            >>> import numpy, fastrnn
            >>> streams = fastrnn.GRU(8, 16).stream_slots(1000)
            >>> first, second = streams.add(), streams.add()
            >>> y = streams.step(numpy.zeros((2, 8), "float32"), [first, second])  # [2, 16]
            >>> y = streams.step(numpy.zeros((1, 8), "float32"), [second])
            >>> streams.remove(first)
            >>> len(streams)
            1
        """
        self._check_streamable()
        return slots_of(self, capacity, threads, release_gil)

    def _check_streamable(self) -> None:
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

    def _cell(self) -> Cell:
        cell = self._quiet or CELL_OF_MODE.get(self.mode)
        if cell is None:
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return cell

    def _weights(self, instead: Mapping[str, Any] | None = None) -> list[Weights]:
        # `_parameters` comes first, because nn.Module's attribute lookup takes longer than a small
        # cell. A weight that is not there was parametrized, or set as a plain tensor.
        own: Mapping[str, Any] = self._parameters
        if self._written is not None and (written := self._written_entries()):
            own = {**own, **written}
        if instead:
            own = {**own, **instead}
        recurrences = []
        for names in self._all_weights:  # a loop, because nested comprehensions take longer
            weights = [own[n] if n in own else getattr(self, n) for n in names]
            if self.proj_size or self._param_count or self._lacks_rows:
                recurrences.append(named(self._cell(), weights, self.heads))
            else:
                recurrences.append(Weights(*weights))
        if self.heads > 1:
            return [head for stacked in recurrences for head in heads_of(stacked)]
        return recurrences

    def _weight_names(self) -> list[str]:
        return self._flat_weights_names

    def _check(
        self,
        input: Tensor,
        hx: States | None,
        batch_sizes: Tensor | None,
        weight: Tensor,
    ) -> None:
        if weight is not self._parameters.get(self._flat_weights_names[0]):
            if (stored := precision_of(self, stored=True)) is not None:
                weight = torch.empty(0, dtype=stored.dtype, device=weight.device)
            check_dtype(input, weight)  # check_input looks only at the layer's own first Parameter
        if hx is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, hx, batch_sizes)  # type: ignore[arg-type]

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise torch.nn's errors for an input of wrong dtype or shape."""
        # A parametrized weight is not read: computing it may change its state.
        weight = self._parameters.get(self._flat_weights_names[0])
        if weight is not None:
            check_dtype(input, weight)
        check_input(input, self.input_size, batch_sizes)

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        own = heads + (", recompute=True" if self.recompute else "")
        for name in ("zoneout", "recurrent_dropout", "clip_grad_step"):
            if value := getattr(self, name):
                own += f", {name}={value}"
        if self.recurrent_dropout and self.recurrent_dropout_per != "sequence":
            own += f", recurrent_dropout_per={self.recurrent_dropout_per!r}"
        return super().extra_repr() + own

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)


def with_own_forward(kind: _Class) -> _Class:
    """Give a public class its own copy of `Layer.forward`, so that Python's errors about arguments
    name the class that the user knows, as torch.nn's do."""
    shared = cast(FunctionType, Layer.forward)
    forward = FunctionType(shared.__code__, shared.__globals__, "forward", shared.__defaults__)
    forward.__kwdefaults__ = shared.__kwdefaults__
    forward.__annotations__ = shared.__annotations__
    forward.__qualname__ = f"{kind.__qualname__}.forward"
    kind.forward = forward  # type: ignore[method-assign]
    return kind
