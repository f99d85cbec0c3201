"""Streaming inference: layers with their own weights and states, one step at a time: of one stream,
or of the streams of a server that have a frame now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn import plan
from fastrnn.cells import Cell
from fastrnn.extension import _C
from fastrnn.kernels import device
from fastrnn.kernels.operands import Weights
from fastrnn.kernels.prepare import on_cpu

__all__ = ["Slots", "Stepper", "slots", "stepper"]


class Stepper(_C.Stepper):
    """Layers in one direction that run one step per call; `layer.stream(...)` makes them.

    A stepper holds the states and a prepacked copy of the weights, so that a step takes no lock,
    allocates nothing if it gets `out`, and releases the GIL. Later changes of the layer do not
    affect it. The steps of a sequence give the output that the layer gives for that sequence; with
    several layers in bfloat16 or float16 up to rounding, as h goes from layer to layer in float32.

    A stepper is one stream: a second thread that calls it at the same time gets a `RuntimeError`.
    Different steppers may run in different threads. If another Python thread is busy, re-acquiring
    the GIL delays about one step in a hundred by `sys.getswitchinterval()`, 5 ms. With
    `release_gil=False` that happens once in many thousand steps, as in any Python code.

    Attributes:
        batch_size, input_size, output_size, num_layers: sizes of the layers.
        threads: number of threads that the plan chose.
        weights: the format of the weights: "float32", "float64", "bfloat16", "int8", "int16".
        nbytes: bytes of the weights.

    Methods:
        `step(x, out=None)`: run one step from `x` [B, I] to [B, H] (`proj_size` in place of H if
        projected), or from [I] to [H] for a batch of one. `x` is a tensor, a NumPy array or any
        buffer, of the layer's dtype; the numbers of a row must be contiguous, the rows need not
        be. The result is written to `out`, which may be `x`, and `out` is returned. Without `out`
        the result is a new tensor for a tensor, a new array for an array; a buffer needs `out`.

        `reset()`: set all states to zero.

    Raises:
        TypeError, ValueError: from `step`, if an argument has a wrong type, dtype or shape.
        RuntimeError: from `step`, if a tensor requires gradients, or if the stepper is in use.
    """

    __slots__ = ()

    @property
    def state(self) -> Tensor | tuple[Tensor, ...]:
        """Copies of the states [num_layers, B, H], shaped as the layer's `h_n`: a tensor if the
        cell has one state, else a tuple.

        The property can be set to such values, which are copied.

        Raises:
            ValueError: if it is set to values of other shapes.
        """
        states = self._read()
        return states[0] if len(states) == 1 else tuple(states)

    @state.setter
    def state(self, value: Tensor | Sequence[Tensor]) -> None:
        self._write([value] if isinstance(value, Tensor) else list(value))

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(
            "a Stepper cannot be copied or pickled: its weights are prepacked for this processor. "
            "Make another with layer.stream() and set its state to this one's"
        )


class Slots(_C.Slots):
    """Many streams at different positions, for a server; `layer.stream_slots(...)` makes them.

    A stream has a slot, a number below the capacity, which keeps its states. The weights are
    prepacked once for all slots. A step runs the streams that have a frame now as one batch. The
    outputs of a stream are bit for bit those of a `Stepper` of one row, whichever streams run with
    it. With `out`, a step allocates nothing.

    One call of `step` or `run` goes on at a time: a second thread gets a `RuntimeError`. While it
    does, other threads may add streams, and use the slots that are not part of the call.

    Attributes:
        capacity, input_size, output_size, num_layers: sizes of the slots and the layers.
        threads, weights, nbytes: those of a `Stepper`.

    Methods:
        `add()`: take a free slot, with states of zero, and return it.

        `remove(slot)`: free a slot; a later `add()` may return it.

        `step(x, slots, out=None)`: run one step of the streams `slots`, a list or tuple of n
        distinct integers, or an int64 tensor or array, from `x` [n, I] to [n, H] (`proj_size` in
        place of H if projected). `x` and `out` are those of `Stepper.step`.

        `run(x, slots, out=None)`: run T steps of each of these streams, from `x` [n, T, I] to
        [n, T, H]. The first two dimensions may have any strides. `out` may be `x` or lie apart from
        it.

        `reset(slot)`: set the states of a slot to zero.

        `len(slots)`, `slot in slots`: number of streams, and whether a stream has that slot.

    Raises:
        TypeError, ValueError: if an argument has a wrong type, dtype or shape, if no stream has a
            slot, or if a call has a slot twice. No state changes then.
        RuntimeError: from `add`, if all slots are taken; if another thread runs these slots; from
            `step` and `run`, if a tensor requires gradients.
    """

    __slots__ = ()

    def state(self, slot: int) -> Tensor | tuple[Tensor, ...]:
        """Copies of the states [num_layers, H] of a stream, as the layer's `h_n` for a sequence
        without a batch: a tensor if the cell has one state, else a tuple."""
        states = self._read(slot)
        return states[0] if len(states) == 1 else tuple(states)

    def set_state(self, slot: int, states: Tensor | Sequence[Tensor]) -> None:
        """Copy such states into a slot.

        Raises:
            ValueError: if they have other shapes, or if no stream has the slot.
        """
        self._write(slot, [states] if isinstance(states, Tensor) else list(states))

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(
            "slots cannot be copied or pickled: their weights are prepacked for this processor. "
            "Make others with layer.stream_slots() and set the state of each stream"
        )


def stepper(
    cell: Cell,
    weights: Sequence[Weights],
    batch_size: int = 1,
    threads: int = 1,
    release_gil: bool = True,
    *,
    format: str | None = None,
    scales: Sequence[tuple[Tensor, ...]] = (),
    dtype: torch.dtype | None = None,
) -> Stepper:
    """Make a stepper for layers of `cell`; `weights` are those of `functional.rnn`, in one
    direction. `format`, `scales` and `dtype` are those of `ops.pack`, `scales` for every layer.

    Raises:
        ValueError: if `batch_size` or `threads` is below one, or if the weights are not dense
            floating-point tensors on the CPU.
        fastrnn.plan.KernelRefused: if the cell cannot be compiled, or if another kernel was asked
            for by name.
    """
    _check_positive("batch_size", batch_size)
    packed = _layers(cell, weights, threads, format=format, scales=scales, dtype=dtype)
    with torch.no_grad():
        return Stepper(*packed.given, batch_size, packed.threads, release_gil)


def slots(
    cell: Cell,
    weights: Sequence[Weights],
    capacity: int,
    threads: int = 1,
    release_gil: bool = True,
    *,
    format: str | None = None,
    scales: Sequence[tuple[Tensor, ...]] = (),
    dtype: torch.dtype | None = None,
) -> Slots:
    """Make slots for layers of `cell`. Other arguments and errors are those of `stepper`.

    Raises:
        ValueError: if `capacity` is below one.
    """
    _check_positive("capacity", capacity)
    packed = _layers(cell, weights, threads, format=format, scales=scales, dtype=dtype)
    with torch.no_grad():
        return Slots(*packed.given, capacity, packed.threads, release_gil)


class _Layers(NamedTuple):
    given: tuple[str, Tensor, list[list[Tensor | None]], str, Sequence[tuple[Tensor, ...]]]
    threads: int


def _check_positive(name: str, number: int) -> None:
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} should be a positive integer, got {number!r}")


def _layers(
    cell: Cell,
    weights: Sequence[Weights],
    threads: int,
    *,
    format: str | None,
    scales: Sequence[tuple[Tensor, ...]],
    dtype: torch.dtype | None,
) -> _Layers:
    """What `_C` makes a stepper of."""
    _check_positive("threads", threads)
    forced = device.asked_for()
    if forced not in (None, "cpu"):
        raise plan.KernelRefused(f"kernel {forced!r} was asked for, but a stepper has only 'cpu'")
    dtype = dtype or weights[0].w_ih.dtype
    key, reason, problem, offered, format = on_cpu(
        cell, weights[0], threads, format=format, dtype=dtype
    )
    if key is None:
        raise plan.KernelRefused(f"a stepper needs compiled code: {reason}")
    if reason is not None:
        raise ValueError(f"a stepper cannot run this layer: {reason}")
    numbers = sum(w.numel() for layer in weights for w in layer.present())
    like = torch.empty(0, dtype=dtype, device="cpu")
    layers = [layer.flat() for layer in weights]
    return _Layers(
        (key, like, layers, format, scales or [()] * len(weights)),
        plan.step_threads(numbers * problem.products.weight_bytes, offered, problem.stages),
    )
