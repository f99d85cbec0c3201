"""Streaming inference: a stack of layers with its own weights and states, one step at a time."""

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
    for name, number in (("batch_size", batch_size), ("threads", threads)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} should be a positive integer, got {number!r}")
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
    with torch.no_grad():
        return Stepper(
            key,
            torch.empty(0, dtype=dtype, device="cpu"),
            [layer.flat() for layer in weights],
            format,
            scales or [()] * len(weights),
            batch_size,
            plan.step_threads(numbers * problem.products.weight_bytes, offered, problem.stages),
            release_gil,
        )
