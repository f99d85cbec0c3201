"""Tells Opacus that it cannot train our layers and cells, and which of its own layers it can train.

Opacus replaces `nn.LSTM` and `nn.GRU`, found by exact class, by its own layers made of `nn.Linear`.
It takes per-sample gradients by hooks, which see only the first output of a module, so gradients
through the final states would be lost. Importing this module registers our classes with its
validator, its fixer and its gradient samplers. `fastrnn.replace_` imports it if Opacus is imported.
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
    """One sentence that says why, and what to do."""
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
    """Validator for `ModuleValidator.validate`, which `PrivacyEngine.make_private` calls."""
    return [ShouldReplaceModuleError(_reason(module))]


@register_module_fixer(_LAYERS)
def fix(module: Any) -> nn.Module:
    """Fixer for `ModuleValidator.fix`: Opacus's own layer with the weights of ours.

    Raises:
        NotImplementedError: if the layer has heads or a projection, which Opacus's layers lack.
    """
    for name, value in (("heads", module.heads - 1), ("proj_size", module.proj_size)):
        if value:
            raise NotImplementedError(
                f"Opacus's layers have no {name}, got {name}={getattr(module, name)}"
            )
    options = {"nonlinearity": module.nonlinearity} if hasattr(module, "nonlinearity") else {}
    private: nn.Module = _PRIVATE[TO_TORCH[type(module)]](
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        module.batch_first,
        module.dropout,
        module.bidirectional,
        **options,
    )
    private.load_state_dict(module.state_dict())
    return private


@register_grad_sampler(list(TO_TORCH))
def sample(module: nn.Module, activations: Any, backprops: Any) -> dict[nn.Parameter, Any]:
    """Sampler for `GradSampleModule`, which may run without the validator; it refuses too.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(_reason(module))
