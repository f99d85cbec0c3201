"""The layers of a custom cell as a loop of torch operations, as one writes it without fastrnn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrnn.cells import Cell
from fastrnn.compiler.derive import derive

__all__ = ["Loop", "step_of"]

Step = Callable[..., Sequence[Tensor]]


class Loop(nn.Module):
    """Computes what `layer` does, on its Parameters: it projects the whole input at once and calls
    the cell's function on every step.

    Args:
        layer: a `fastrnn.Recurrent` of one direction, without heads, dropout and noise.
        compiled: the step is under `torch.compile`.

    Raises:
        ValueError: if the layer is another one.
    """

    def __init__(self, layer: Any, compiled: bool = False) -> None:
        super().__init__()
        noise = layer.dropout or layer.zoneout or layer.recurrent_dropout or layer.cell.noise
        norm = getattr(layer, "norm", False)
        if layer.bidirectional or layer.heads > 1 or noise or norm:
            raise ValueError(
                "a loop has one direction and neither heads nor norm nor dropout nor noise; it "
                f"cannot compute what {layer} does"
            )
        self.layer = layer
        step = step_of(layer.cell)
        self.step: Step = torch.compile(step, dynamic=False) if compiled else step

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The output of the last layer and the last states, in the shapes of the layer's own."""
        layer, count = self.layer, len(self.layer.cell.states)
        x = x.transpose(0, 1) if layer.batch_first else x
        if state is None:
            state = count * (x.new_zeros(layer.num_layers, x.size(1), layer.hidden_size),)
        first = state if isinstance(state, tuple) else (state,)
        last: list[list[Tensor]] = []
        for k, weights in enumerate(layer._weights()):
            states, outputs = [s[k] for s in first], []
            for u in F.linear(x, weights.w_ih, weights.b_ih).unbind():
                states = list(self.step(u, weights.w_hh, weights.b_hh, states, weights.params))
                outputs.append(states[0])
            x = torch.stack(outputs)
            last.append(states)
        after = tuple(torch.stack(states) for states in zip(*last, strict=True))
        y = x.transpose(0, 1) if layer.batch_first else x
        return y, after if count > 1 else after[0]


def step_of(cell: Cell) -> Step:
    """A step as one would write it: a product for the state, and one for another value, if the cell
    multiplies one by the blocks of some gates."""
    gates = len(cell.recurrent)
    others = {name for site in derive(cell).sites for name in site.gates}
    own = [k for k, name in enumerate(cell.recurrent) if name not in others]
    rest = [k for k, name in enumerate(cell.recurrent) if name in others]

    def step(
        u: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: list[Tensor], params: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        hidden = states[0].size(-1)

        def product(x: Tensor, chosen: list[int]) -> list[Any]:
            if not chosen:
                return [None] * gates
            rows = slice(chosen[0] * hidden, (chosen[-1] + 1) * hidden)
            parts: list[Any] = [None] * gates
            bias = None if b_hh is None else b_hh[rows]
            parts[chosen[0] : chosen[-1] + 1] = F.linear(x, w_hh[rows], bias).split(hidden, -1)
            return parts

        v = product(states[0], own)

        def apply(x: Tensor) -> list[Any]:
            return v if x is states[0] else product(x, rest)

        return cell.step(u.split(hidden, -1), v, states, params, apply)

    return step
