"""TorchRL's LSTMModule and GRUModule with our layers.

TorchRL splits a rollout at steps where `is_init` marks the start of an episode, and runs the
episodes as a batch. It packs them for `nn.LSTM` and `nn.GRU`. It treats any other layer as its own
Python layer and passes a `mask`, which our layers do not accept. The classes here pass `lengths=`
instead. `resets=` would not do: an episode starts from the state in the rollout, which need not be
zero, and TorchRL keeps the last state of each episode.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor
from torchrl import modules

from fastrnn.nn.convert import TO_TORCH, WRAPPERS, Wrapper

__all__ = ["GRUModule", "LSTMModule"]


class _Episodes:
    """The forward of both classes, for rollouts in which an episode begins after the first step."""

    _name: str  # name of the attribute that holds the layer

    @dispatch
    def forward(self: Any, tensordict: TensorDictBase) -> TensorDictBase:
        """Run TorchRL's forward, with the same keys and the same numbers."""
        return tensordict if _run(self, tensordict) else super().forward(tensordict)  # type: ignore[misc]


class LSTMModule(_Episodes, modules.LSTMModule):
    """`torchrl.modules.LSTMModule` with a `fastrnn.LSTM`: `LSTMModule(lstm=fastrnn.LSTM(...), …)`.

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
    if not begins[:, 1:].any() or len(present) not in (0, len(states)):
        return False
    results = _episodes(layer, tensordict[module.in_keys[0]], present, begins)
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
