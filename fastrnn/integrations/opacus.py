"""Opacus learns here that it cannot train our layers and cells, and which of its own it can.

Opacus looks for `nn.LSTM` and `nn.GRU` by exact class, to replace them by layers of its own made
of `nn.Linear`, and takes per-sample gradients by hooks, which see the first output of a module
only: a gradient that comes through the final states would be lost. Importing this module tells
its validator, its fixer and its gradient samplers about ours. `fastrnn.replace_` imports it where
Opacus is imported already.
"""

from __future__ import annotations

from typing import Any

from opacus.grad_sample.utils import register_grad_sampler
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError
from opacus.validators.utils import register_module_fixer, register_module_validator
from torch import nn

from fastrnn.nn.convert import TO_TORCH

__all__ = ["fix", "sample", "validate"]

_PRIVATE = {nn.RNN: DPRNN, nn.LSTM: DPLSTM, nn.GRU: DPGRU}
_LAYERS = [ours for ours, theirs in TO_TORCH.items() if theirs in _PRIVATE]


def _reason(module: nn.Module) -> str:
    """One sentence, with the way out."""
    name = type(module).__name__
    way = (
        f"opacus.validators.ModuleValidator.fix(model) puts opacus.layers.DP{name} with the same "
        "weights in its place"
        if type(module) in _LAYERS
        else f"use opacus.layers.DP{name} in its place"
    )
    return (
        f"Opacus has no per-sample gradients of fastrnn.{name}, whose states its hooks miss; {way}"
    )


@register_module_validator(list(TO_TORCH))
def validate(module: nn.Module) -> list[UnsupportedModuleError]:
    """For `ModuleValidator.validate`, which `PrivacyEngine.make_private` calls."""
    return [ShouldReplaceModuleError(_reason(module))]


@register_module_fixer(_LAYERS)
def fix(module: Any) -> nn.Module:
    """Opacus's own layer with the weights of ours; for `ModuleValidator.fix`.

    Raises:
        NotImplementedError: for `heads` and `proj_size`, which Opacus's layers do not have.
    """
    for name, value in (("heads", module.heads - 1), ("proj_size", module.proj_size)):
        if value:
            raise NotImplementedError(
                f"Opacus's layers have no {name}, got {name}={getattr(module, name)}"
            )
    options = {"nonlinearity": module.nonlinearity} if hasattr(module, "nonlinearity") else {}
    made: nn.Module = _PRIVATE[TO_TORCH[type(module)]](
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        module.batch_first,
        module.dropout,
        module.bidirectional,
        **options,
    )
    made.load_state_dict(module.state_dict())
    return made


@register_grad_sampler(list(TO_TORCH))
def sample(module: nn.Module, activations: Any, backprops: Any) -> dict[nn.Parameter, Any]:
    """For `GradSampleModule` without the validator: it refuses too.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(_reason(module))
