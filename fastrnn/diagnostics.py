"""Where gradients vanish or explode: their norms at the states of every step."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.cells import Cell
from fastrnn.kernels.operands import Weights, named
from fastrnn.nn import functional
from fastrnn.nn.base import CELL_OF_MODE, Layer
from fastrnn.nn.checks import check_lengths, check_reset_states, check_resets, widths
from fastrnn.nn.freeze import precision_of

__all__ = ["GradientFlow", "StateGradient", "gradient_flow"]


@dataclass(frozen=True, eq=False)
class StateGradient:
    """The gradients of one state of one recurrence.

    Attributes:
        module: the name of the layer or cell in the model; empty for the model itself.
        layer: the number of the layer in a stack.
        reverse: whether it is the direction that runs from the end.
        state: the name of the state: `"h"`, and `"c"` for an LSTM.
        call: 0 for the first call of the layer, 1 for the second, and so on.
        norms: [T], the Euclidean norm of the gradient [B, H] of the state after each time step, in
            the order of time for both directions.
    """

    module: str
    layer: int
    reverse: bool
    state: str
    call: int
    norms: Tensor

    @property
    def name(self) -> str:
        """Such as `rnn.l0_reverse.c`, in the style of a layer's Parameters."""
        parts = [self.module] if self.module else []
        parts += [f"l{self.layer}{'_reverse' if self.reverse else ''}", self.state]
        return ".".join(parts) + (f" (call {self.call + 1})" if self.call else "")


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """The result of `gradient_flow`.

    Attributes:
        loss: the value of the loss.
        states: one entry for each layer, direction and state, in the order of their calls.
        skipped: recurrent modules without an entry, by name, with the reason.
    """

    loss: float
    states: tuple[StateGradient, ...]
    skipped: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The names of the entries."""
        return [entry.name for entry in self.states]

    def __getitem__(self, name: str) -> Tensor:
        """The norms [T] of the entry with this name."""
        for entry in self.states:
            if entry.name == name:
                return entry.norms
        raise KeyError(f"no state is named {name!r}; there are: {', '.join(self.names)}")

    def __str__(self) -> str:
        """A table of the norms at the first, the middle and the last step in time."""
        width = max(map(len, self.names))
        rows = [f"{'state':{width}}  steps   first step       middle    last step"]
        for entry in self.states:
            steps = entry.norms.numel()
            shown = [entry.norms[t].item() for t in (0, steps // 2, -1) if steps]
            rows.append(f"{entry.name:{width}}  {steps:5}" + "".join(f"  {n:11.3g}" for n in shown))
        rows += [f"{name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(rows)

    def plot(self, ax: Any = None) -> Any:
        """Draw the norms over the time steps, with a logarithmic axis.

        Args:
            ax: the axes of matplotlib to draw into; None for those of a new figure.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        if ax is None:
            _, ax = importlib.import_module("matplotlib.pyplot").subplots()
        for entry in self.states:
            ax.semilogy(range(entry.norms.numel()), entry.norms.cpu().numpy(), label=entry.name)
        ax.set_xlabel("time step")
        ax.set_ylabel("norm of the gradient")
        ax.legend()
        return ax


def gradient_flow(
    model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None
) -> GradientFlow:
    """The norms of the gradients of all hidden states, from one backward pass.

    The gradient at step `t` is the total one, `dL/ds_t`: it comes from the output of the step and
    from all steps that follow it. In back-propagation through time this is the gradient that
    arrives at the state `s_t`. For a cell with several states, `s_t` is all of them side by side:
    the gradient of the `c_t` of an LSTM is what comes back from the step that follows. That `h_t`
    was computed from `c_t` is within step `t` and does not count to it.

    For this one pass, every layer of fastrnn or torch.nn runs one step per call, with fastrnn's
    kernels and the same numbers up to rounding. This takes longer than a usual pass. Cells that
    the model calls in a loop of its own are recorded too, one step per call. The model runs in the
    mode that it is in, training or not, but random numbers within cells are replaced by their
    means. Neither its weights nor their `grad` change.

    Args:
        model: the model, or a layer alone. A compiled model runs as it is written. Of a
            `DistributedDataParallel`, pass its `module`.
        batch: input of the model, a tensor or a tuple of arguments; or a function without
            arguments that runs the model and returns the loss, and does not call `backward`.
        loss: a function from the model's output to the loss. None if `batch` is a function.

    Raises:
        TypeError: if `loss` is missing, or given beside a function.
        ValueError: if the loss is not one number or has no gradient, or if it ran no recurrent
            layer or cell. Modules with a `forward` of their own are `skipped`.

    Example:
        >>> import torch, fastrnn
        >>> layer = fastrnn.RNN(4, 8)
        >>> flow = fastrnn.diagnostics.gradient_flow(
        ...     layer, torch.randn(50, 3, 4), lambda result: result[0][-1].sum()
        ... )
        >>> flow.names, flow["l0.h"].shape
        (['l0.h'], torch.Size([50]))
        >>> bool(flow["l0.h"][0] < 1e-3 * flow["l0.h"][-1])  # it vanishes
        True

    Bengio et al. 1994, doi:10.1109/72.279181; Pascanu et al. 2013, arXiv:1211.5063.
    """
    run = _closure(model, batch, loss)
    trace = _Trace()
    with trace.watch(model), _eager(), torch.enable_grad():
        value = run()
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss should be a tensor with one number, got {found}")
    if not trace.steps:
        skipped = "".join(f"; {name or 'model'}: {why}" for name, why in trace.skipped.items())
        raise ValueError(
            f"the loss ran no recurrent layer or cell of this {type(model).__name__}{skipped}"
        )
    if not value.requires_grad:
        raise ValueError("the loss has no gradient: it was computed under no_grad, or detached")
    tensors = [tensor for steps in trace.steps.values() for tensor in steps]
    gradients = iter(torch.autograd.grad(value.sum(), tensors, allow_unused=True))
    entries = []
    for key, steps in trace.steps.items():
        norms = [_norm(next(gradients), state) for state in steps]
        entries.append(StateGradient(*key, torch.stack(norms)))
    return GradientFlow(value.item(), tuple(entries), trace.skipped)


def _eager() -> AbstractContextManager[Any]:
    """Runs compiled models as they are written. Dynamo is not imported for it."""
    if "torch._dynamo" in sys.modules:
        return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
    return nullcontext()


def _closure(
    model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None
) -> Callable[[], Any]:
    if callable(batch) and not isinstance(batch, Tensor):
        if loss is not None:
            raise TypeError("batch is a function that returns the loss, so loss= must be None")
        return cast(Callable[[], Any], batch)
    if loss is None:
        raise TypeError(
            "loss= is missing: pass a function from the model's output to the loss, or as batch "
            "a function without arguments that runs the model and returns the loss"
        )
    is_tuple = isinstance(batch, tuple) and not isinstance(batch, PackedSequence)
    arguments = batch if is_tuple else (batch,)
    return lambda: loss(model(*arguments))


def _norm(gradient: Tensor | None, state: Tensor) -> Tensor:
    dtype = torch.promote_types(state.dtype, torch.float32)
    if gradient is None:  # the loss does not depend on this state
        return torch.zeros((), dtype=dtype, device=state.device)
    return torch.linalg.vector_norm(gradient, dtype=dtype)


class _Key(NamedTuple):
    module: str
    layer: int
    reverse: bool
    state: str
    call: int


class _Sequences(NamedTuple):
    """The input of a layer as dense rows, and what marks their steps.

    Attributes:
        x: [T, B, I].
        alive: bool [T, B], the steps that a sequence has; None for all.
        cut: bool [T, B], steps at which an episode begins.
        packed: whether the layer was given a `PackedSequence`.
    """

    x: Tensor
    alive: Tensor | None = None
    cut: Tensor | None = None
    packed: bool = False

    def dropped(self, probability: float) -> Tensor:
        """`x` with dropout, which draws the random numbers that the layer draws."""
        if self.packed and self.alive is not None:
            rows = F.dropout(self.x[self.alive], probability, True)
            return torch.zeros_like(self.x).masked_scatter(self.alive.unsqueeze(-1), rows)
        return F.dropout(self.x, probability, True)


@dataclass
class _Trace:
    """The states of every step of the layers that it watches."""

    steps: dict[_Key, list[Tensor]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Make the layers and cells of a model record their states."""
        layers: list[nn.Module] = []
        handles = []
        try:
            for path, module in model.named_modules():
                name = path.replace("_orig_mod.", "").removesuffix("_orig_mod")  # torch.compile's
                if isinstance(module, nn.RNNCellBase):
                    hook = functools.partial(self._after_cell, name)
                    handles.append(module.register_forward_hook(hook))
                elif isinstance(module, nn.RNNBase):
                    if (reason := _obstacle(module)) is not None:
                        self.skipped[name] = reason
                        continue
                    layers.append(module)
                    stepwise: Any = functools.partial(self._run, name, module)
                    module.forward = stepwise
            yield
        finally:
            for module in layers:
                del module.forward
            for handle in handles:
                handle.remove()

    def _after_cell(self, name: str, cell: nn.Module, _: Any, output: Any) -> Any:
        """Record the next states of a cell: copies, because within torch.nn's LSTMCell the tensor
        `h` depends on the tensor `c`."""
        states = (output,) if isinstance(output, Tensor) else output
        copies = [_recordable(state.clone()) for state in states]
        for state, copy in zip("hc", copies, strict=False):
            self.steps.setdefault(_Key(name, 0, False, state, 0), []).append(copy)
        return copies[0] if isinstance(output, Tensor) else tuple(copies)

    def _run(self, name: str, layer: nn.RNNBase, *arguments: Any, **keywords: Any) -> Any:
        """The forward of a layer, one step per call."""
        signature = inspect.signature(type(layer).forward)
        given = signature.bind(layer, *arguments, **keywords).arguments
        input, hx = given["input"], given.get("hx")
        cell, weights = _cell_of(layer), _weights_of(layer)
        sequences, order = _dense(layer, input, given.get("lengths"), given.get("resets"))
        states: list[Tensor] = []
        if hx is not None:
            states = [hx] if isinstance(hx, Tensor) else list(hx)
            if not isinstance(input, PackedSequence) and input.dim() == 2:
                states = [s.unsqueeze(1) for s in states]
            if order is not None:
                states = [s.index_select(1, order) for s in states]
        begins: list[Tensor] = []
        if (own := given.get("reset_states")) is not None:
            count = layer.num_layers * (2 if layer.bidirectional else 1)
            sizes = widths(cell, weights[0], getattr(layer, "heads", 1))
            x = sequences.x
            shapes = [(count, x.size(1), width) for width in sizes]
            batched = isinstance(input, PackedSequence) or input.dim() == 3
            begins = check_reset_states(own, shapes, x, batched)
            if order is not None:
                begins = [s.index_select(1, order) for s in begins]
        every, last = self._stack(name, layer, cell, weights, sequences, states, begins)
        if isinstance(input, PackedSequence):
            alive = cast(Tensor, sequences.alive)
            every = [[input._replace(data=s[alive]) for s in own] for own in every]
            if input.unsorted_indices is not None:
                last = [s.index_select(1, input.unsorted_indices) for s in last]
        elif input.dim() == 2:
            every = [[s.squeeze(1) for s in own] for own in every]
            last = [s.squeeze(1) for s in last]
        elif layer.batch_first:
            every = [[s.transpose(0, 1) for s in own] for own in every]
        final = last[0] if len(last) == 1 else tuple(last)
        if given.get("return_states"):
            return every[-1][0], final, tuple(map(tuple, every))
        return every[-1][0], final

    def _stack(
        self,
        name: str,
        layer: nn.RNNBase,
        cell: Cell,
        weights: Sequence[Weights],
        sequences: _Sequences,
        s0: Sequence[Tensor],
        begins: Sequence[Tensor],
    ) -> tuple[list[list[Any]], list[Tensor]]:
        """The states after every step, [T, B, D*H] for each layer and state, and the last states
        [L*D, B, H]."""
        call = self.calls[name]
        self.calls[name] += 1
        heads = getattr(layer, "heads", 1)
        directions = 2 if layer.bidirectional else 1
        every: list[list[Any]] = []
        finals: list[list[Tensor]] = []
        for number in range(layer.num_layers):
            found: list[list[Tensor]] = []
            if number:
                sequences = sequences._replace(x=every[-1][0])
                if layer.training and layer.dropout:
                    sequences = sequences._replace(x=sequences.dropped(layer.dropout))
            for reverse in (False, True)[:directions]:
                index = number * directions + reverse
                own = weights[index * heads : (index + 1) * heads]
                start = [s[index] for s in s0] or [
                    sequences.x.new_zeros(sequences.x.size(1), width)
                    for width in widths(cell, own[0], heads)
                ]
                fresh = [s[index] for s in begins] or [torch.zeros_like(s) for s in start]
                steps = _sweep(cell, own, sequences, start, fresh, heads=heads, reverse=reverse)
                for k, state in enumerate(cell.states):
                    key = _Key(name, number, reverse, state, call)
                    self.steps[key] = [after[k] for after in steps.recorded]
                found.append(steps.outputs)
                finals.append(steps.last)
            every.append([torch.cat(both, -1) for both in zip(*found, strict=True)])
        return every, [torch.stack(s) for s in zip(*finals, strict=True)]


class _Swept(NamedTuple):
    recorded: list[list[Tensor]]  # the states after each step, in the order of time
    outputs: list[Tensor]  # [T, B, H] for each state, with zeros past the end of a sequence
    last: list[Tensor]


def _sweep(
    cell: Cell,
    weights: Sequence[Weights],
    sequences: _Sequences,
    states: list[Tensor],
    begins: list[Tensor],
    *,
    heads: int,
    reverse: bool,
) -> _Swept:
    """Run one direction of one layer, one step per call. Each state is one tensor, which both the
    output and the next step read, so that its gradient is the total one."""
    x, alive, cut, _ = sequences
    rows = x.unbind()  # a slice for each step would make the backward pass quadratic in T
    recorded: list[list[Tensor]] = [[] for _ in rows]
    outputs: list[list[Tensor]] = [[] for _ in rows]
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        before = states
        edge = t + 1 if reverse else t
        if cut is not None and edge < len(rows):
            flags = cut[edge].unsqueeze(-1)
            before = [torch.where(flags, b, s) for b, s in zip(begins, states, strict=True)]
        hx: Any = [s.unsqueeze(0) for s in before]
        hx = hx[0] if len(hx) == 1 else hx
        _, after = functional.rnn(cell, rows[t].unsqueeze(0), weights, hx, heads=heads)
        after = [after] if isinstance(after, Tensor) else after
        after = [_recordable(s.squeeze(0)) for s in after]
        recorded[t] = outputs[t] = after
        if alive is not None:
            valid = alive[t].unsqueeze(-1)
            outputs[t] = [torch.where(valid, s, 0) for s in after]
            after = [torch.where(valid, s, old) for s, old in zip(after, states, strict=True)]
        states = after
    stacked = [torch.stack(steps) for steps in zip(*outputs, strict=True)]
    return _Swept(recorded, stacked or [x.new_zeros(0, *s.shape) for s in states], states)


def _recordable(state: Tensor) -> Tensor:
    """A state that has a gradient, also if neither the weights nor the input have one."""
    return state if state.requires_grad else state.detach().requires_grad_()


def _dense(
    layer: nn.RNNBase, input: Tensor | PackedSequence, lengths: Any, resets: Any
) -> tuple[_Sequences, Tensor | None]:
    """The input of a layer as time-major rows, and the order into which a packed one sorts them."""
    if isinstance(input, PackedSequence):
        return _padded(input, resets), input.sorted_indices
    x, alive, cut = input, None, None
    batched = x.dim() == 3
    if not batched:
        x = x.unsqueeze(1)
    elif layer.batch_first:
        x = x.transpose(0, 1)
    if resets is not None:
        cut = check_resets(resets, x, None, None, layer.batch_first and batched)
    if lengths is not None:
        steps = torch.arange(x.size(0), device=x.device).unsqueeze(-1)
        alive = steps < check_lengths(lengths, x, batched)
        cut = None if cut is None else cut & alive
    return _Sequences(x, alive, cut), None


def _padded(input: PackedSequence, resets: Any) -> _Sequences:
    """Packed sequences with zeros behind their ends, in the order in which they are packed."""
    data, batch_sizes, order, _ = input
    sequences = torch.arange(int(batch_sizes[0]), device=data.device)
    alive = sequences < batch_sizes.to(data.device).unsqueeze(-1)
    x = data.new_zeros(*alive.shape, *data.shape[1:]).masked_scatter(alive.unsqueeze(-1), data)
    cut = None
    if resets is not None:
        flags = check_resets(resets, data, batch_sizes, order, False)
        cut = torch.zeros_like(alive).masked_scatter(alive, flags)
    return _Sequences(x, alive, cut, packed=True)


def _cell_of(layer: nn.RNNBase) -> Cell:
    return layer._cell() if isinstance(layer, Layer) else CELL_OF_MODE[layer.mode]


def _weights_of(layer: nn.RNNBase) -> list[Weights]:
    if isinstance(layer, Layer):
        return layer._weights()
    cell = _cell_of(layer)
    return [named(cell, cast(Sequence[Tensor], weights)) for weights in layer.all_weights]


def _obstacle(layer: nn.RNNBase) -> str | None:
    """Why the steps of a layer cannot be recorded, or None."""
    forward: Any = type(layer).forward
    ours = getattr(forward, "__code__", None) is Layer.forward.__code__
    if "forward" in vars(layer) or not (
        ours or forward in (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
    ):
        return f"{type(layer).__name__} has a forward of its own"
    if isinstance(layer, Layer) and precision_of(layer) is not None:
        return "it is quantised: call fastrnn.dequantize_ first"
    return None
