"""Calls of a layer in every form of its input, and all gradients of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from tests.support.tensors import flatten

FORMS = ["dense", "packed", "lengths", "resets", "states"]


def given(
    layer: Any, steps: int, batch: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Any]:
    """An input and initial states."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    random = torch.Generator().manual_seed(2)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    states = tuple(draw(count, batch, layer.hidden_size) for _ in layer._cell().states)
    return draw(steps, batch, layer.input_size), states


def call(layer: Any, form: str, x: Tensor, states: Any, seed: int = 3) -> list[Tensor]:
    """The results of a call of this form; a layer with noise draws it from the seed."""
    steps, batch = x.shape[:2]
    lengths = (torch.arange(batch) * 5 % steps) + 1
    options: dict[str, Any] = {}
    input: Any = x
    if form == "packed":
        input = pack_padded_sequence(x, lengths, enforce_sorted=False)
    elif form == "lengths":
        options["lengths"] = lengths
    elif form == "resets":
        options["resets"] = torch.arange(steps * batch).view(steps, batch) * 7 % 5 == 0
    elif form == "states":
        options["return_states"] = True
    hx = states[0] if states and len(states) == 1 else states
    torch.manual_seed(seed)
    return list(flatten(layer(input, hx, **options)))


def with_gradients(layer: Any, form: str, x: Tensor, states: Any) -> list[Tensor]:
    """The results, and gradients of everything."""
    leaves = [x.clone().requires_grad_(), *(s.clone().requires_grad_() for s in states)]
    out = [y for y in call(layer, form, leaves[0], tuple(leaves[1:])) if y.is_floating_point()]
    random = torch.Generator().manual_seed(1)
    terms = [(y * torch.randn(y.shape, generator=random, dtype=y.dtype)).sum() for y in out]
    loss = torch.stack(terms).sum()
    return [*out, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])]
