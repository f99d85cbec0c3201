"""Streaming inference: a stack of layers that holds its weights and states, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn import plan
from fastrnn.cells import Cell
from fastrnn.extension import _C
from fastrnn.kernels import device
from fastrnn.kernels.operands import Weights
from fastrnn.kernels.prepare import on_cpu

__all__ = ["Stepper", "stepper"]


class Stepper(_C.Stepper):
    """Layers in one direction, run step by step; made by `layer.stream(...)`.

    It holds a prepacked copy of the weights and the states, so that a step neither allocates (with
    `out`) nor locks, and the GIL is released meanwhile. Later changes of the layer do not reach it.
    Steps from a sequence's first on give what the layer gives for the whole sequence.

    A stepper is one stream: a second thread that steps it at the same time gets a `RuntimeError`.
    Different steppers may run in different threads. Beside a Python thread that computes all the
    time, every hundredth step or so takes `sys.getswitchinterval()`, 5 ms, to get the GIL back;
    without `release_gil` that happens once in many thousand steps, as to any Python code.

    Attributes:
        batch_size, input_size, output_size, num_layers, threads: as made.

    Methods:
        `step(x, out=None)`: `x` [B, I] to [B, H] (or `proj_size`); for a batch of one [I] too. A
        tensor, a NumPy array or any buffer, of the layer's dtype, rows apart as they like but the
        numbers of each side by side. `out` takes the result, may be `x` itself, and is returned;
        without it the result is a new tensor for a tensor, a new array for an array.

        `reset()`: all states to zero.

    Raises:
        TypeError, ValueError: from `step`, for anything of another kind, dtype or shape.
        RuntimeError: from `step`, for tensors that require gradients, or a stepper in use.
    """

    __slots__ = ()

    @property
    def state(self) -> Tensor | tuple[Tensor, ...]:
        """Copies of the states, [num_layers, B, H] as the layer's `h_n`: a tensor, or a tuple.

        Setting takes the same; values are copied. `ValueError` for other shapes.
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


def stepper(
    cell: Cell,
    weights: Sequence[Weights],
    batch_size: int = 1,
    threads: int = 1,
    release_gil: bool = True,
) -> Stepper:
    """A stepper for layers of `cell`; `weights` as `functional.rnn` has them, in one direction.

    Raises:
        ValueError: for a batch or a number of threads below one, or weights that are not dense
            floating-point tensors on the CPU.
        fastrnn.plan.KernelRefused: for a cell that cannot be compiled, or where another kernel
            was asked for by name.
    """
    for name, number in (("batch_size", batch_size), ("threads", threads)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} should be a positive integer, got {number!r}")
    forced = device.asked_for()
    if forced not in (None, "cpu"):
        raise plan.KernelRefused(f"kernel {forced!r} was asked for, but a stepper is 'cpu' alone")
    key, reason, problem, offered = on_cpu(cell, weights[0], threads)
    if key is None:
        raise plan.KernelRefused(f"a stepper needs compiled code: {reason}")
    if reason is not None:
        raise ValueError(f"a stepper cannot run this layer: {reason}")
    # Without what there is not: what is left tells the compiled part what it is.
    lists = [[w for w in layer if w is not None] for layer in weights]
    numbers = sum(w.numel() for layer in lists for w in layer)
    with torch.no_grad():
        return Stepper(
            key,
            lists,
            batch_size,
            plan.step_threads(numbers * problem.itemsize, offered),
            release_gil,
        )
