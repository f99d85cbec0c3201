"""TorchRL's LSTMModule and GRUModule with our layers.

TorchRL splits a rollout at steps where `is_init` marks the start of an episode, and runs the
episodes as a batch. It packs them for `nn.LSTM` and `nn.GRU`. It treats any other layer as its own
Python layer and passes a `mask`, which our layers do not accept. The classes here pass `lengths=`
instead. `resets=` would not do: an episode starts from the state in the rollout, which need not be
zero, and TorchRL keeps the last state of each episode.

An ensemble runs under `vmap`, over stacked parameters and over rollouts. Where `vmap` batches
`is_init`, no shape may depend on it, and the episodes run step by step.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor
from torchrl import modules

from fastrnn.nn.convert import FROM_TORCH, TO_TORCH, WRAPPERS, Wrapper, from_torch

__all__ = ["GRUModule", "LSTMModule"]


class _Episodes:
    """The forward of both classes, for rollouts in which an episode begins after the first step."""

    _name: str  # name of the attribute that holds the layer

    def __init__(self, *args: Any, **options: Any) -> None:
        """As TorchRL's module. Made from sizes, it holds a layer of ours; `python_based=True` and a
        layer that is passed are taken as they are."""
        super().__init__(*args, **options)
        made = getattr(self, self._name)
        if options.get(self._name) is None and type(made) in FROM_TORCH:
            setattr(self, self._name, from_torch(made))

    @dispatch
    def forward(self: Any, tensordict: TensorDictBase) -> TensorDictBase:
        """Run TorchRL's forward, with the same keys and the same numbers."""
        return tensordict if _run(self, tensordict) else super().forward(tensordict)  # type: ignore[misc]


class LSTMModule(_Episodes, modules.LSTMModule):
    """`torchrl.modules.LSTMModule` with a `fastrnn.LSTM`: `LSTMModule(input_size=…, …)`, or
    `LSTMModule(lstm=fastrnn.LSTM(..., batch_first=True), …)`.

    `fastrnn.replace_` changes TorchRL's module to this class; `fastrnn.restore_` changes it back.
    """

    _name = "lstm"


class GRUModule(_Episodes, modules.GRUModule):
    """`torchrl.modules.GRUModule` with a `fastrnn.GRU`; see `LSTMModule`."""

    _name = "gru"


WRAPPERS.append(Wrapper(modules.LSTMModule, LSTMModule, "lstm"))
WRAPPERS.append(Wrapper(modules.GRUModule, GRUModule, "gru"))


# The number of episodes depends on the data, so no graph can hold it, as in TorchRL's own `pad`.
# `recurrent_backend="scan"` compiles as a whole, and reads the weights of any layer.
@torch.compiler.disable
def _run(module: Any, tensordict: TensorDictBase) -> bool:
    """Write TorchRL's results and return True, if an episode begins after the first step of a
    rollout; else return False."""
    layer = getattr(module, module._name)
    if (
        not module.recurrent_mode
        or getattr(module, "recurrent_backend", "pad") not in ("auto", "pad")
        or not tensordict.ndim
        or not any(kind in TO_TORCH for kind in type(layer).__mro__)
    ):
        return False
    begins = tensordict["is_init"].reshape(-1, tensordict.shape[-1])
    states = [tensordict.get(key, None) for key in module.in_keys[1:-1]]
    present = [s for s in states if s is not None]
    if len(present) not in (0, len(states)):
        return False
    if _is_batched(begins):
        if layer.bidirectional:  # its backward direction begins at the end of an episode
            return False
        run = _steps
    elif begins[:, 1:].any():
        run = _episodes
    else:
        return False
    results = run(layer, tensordict[module.in_keys[0]], present, begins)
    for key, result in zip(module.out_keys, results, strict=True):
        tensordict.set(key, result.reshape(*tensordict.shape, *result.shape[1:]))
    return True


def _episodes(layer: Any, value: Tensor, states: list[Tensor], begins: Tensor) -> list[Tensor]:
    """Outputs, and the final states of every episode at its last step, zero at the other steps.

    Args:
        layer: a layer with `batch_first`.
        value: [*, T, I].
        states: none, or as many as the layer has, each [*, T, num_layers*D, H]; an episode starts
            from those at its first step.
        begins: bool [B, T], where B is the product of the dimensions `*`.

    Returns:
        Outputs and states, each with a first dimension of B*T.
    """
    begins = begins.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().squeeze(1)
    lengths = torch.diff(first, append=first.new_tensor([begins.numel()]))
    steps = torch.arange(int(lengths.max()), device=first.device)
    rows = first.unsqueeze(1) + steps
    value = value.reshape(begins.numel(), -1)[rows.clamp(max=begins.numel() - 1)]
    start = tuple(s.reshape(begins.numel(), *s.shape[-2:])[first].transpose(0, 1) for s in states)
    several = len(layer._cell().states) > 1
    hx = None if not start else start if several else start[0]
    output, final = layer(value, hx, lengths=lengths)
    results = [output[steps < lengths.unsqueeze(1)]]
    for state in final if several else (final,):
        last = state.transpose(0, 1)
        results.append(
            last.new_zeros(begins.numel(), *last.shape[1:]).index_copy(0, first + lengths - 1, last)
        )
    return results


def _is_batched(tensor: Tensor) -> bool:
    """Whether `vmap` batches the tensor, so that its values cannot be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _steps(layer: Any, value: Tensor, states: list[Tensor], begins: Tensor) -> list[Tensor]:
    """What `_episodes` returns, from one call of the layer for each time step."""
    batch, steps = begins.shape
    several = len(layer._cell().states) > 1
    value = value.reshape(batch, steps, -1)
    given = [s.reshape(batch, steps, *s.shape[-2:]).movedim(2, 0) for s in states]
    last = torch.ones_like(begins[:, :1])
    ends = torch.cat([begins[:, 1:], last], 1).unsqueeze(-1)
    begins = begins.unsqueeze(-1)
    # A state is a tensor [num_layers, B, H].
    now: list[Tensor] = [s[:, :, 0] for s in given]
    outputs, finals = [], []
    for t in range(steps):
        if t and given:
            now = [
                torch.where(begins[:, t], s[:, :, t], n) for s, n in zip(given, now, strict=True)
            ]
        elif t:
            now = [n.masked_fill(begins[:, t], 0) for n in now]
        hx = None if not now else tuple(now) if several else now[0]
        output, after = layer(value[:, t : t + 1], hx)
        now = list(after) if several else [after]
        outputs.append(output)
        finals.append([n.masked_fill(~ends[:, t], 0).transpose(0, 1) for n in now])
    found = [torch.stack(each, 1).flatten(0, 1) for each in zip(*finals, strict=True)]
    return [torch.cat(outputs, 1).flatten(0, 1), *found]
