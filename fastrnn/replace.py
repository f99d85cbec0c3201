"""Put fastrnn's modules where a model has torch.nn's, in place, and back.

A replaced module stays the same object and changes its class, as torch's own `parametrize`
does. So whatever hangs on the object stays as it is: Parameters (and with them optimizers and the
`state_dict`), buffers, hooks of all kinds, parametrizations, pruning masks, train/eval mode,
attributes, and every reference to it, wherever it is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastrnn.convert import FROM_TORCH, TO_TORCH, from_torch, to_torch
from fastrnn.modules import Recurrent

__all__ = ["Replaced", "Report", "Skipped", "replace_", "restore_"]

_NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Replaced(NamedTuple):
    """A module that changed its class; `name` is "" for the model itself."""

    name: str
    before: str
    after: str


class Skipped(NamedTuple):
    """A recurrent module that was left as it is, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `replace_` or `restore_` did; `print` it for a table.

    Attributes:
        replaced: (name, class before, class after), in the order of `model.named_modules()`.
        skipped: (name, class, reason) of the recurrent modules left alone.
    """

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            return "no recurrent modules found"
        rows = [("replaced", r.name, f"{r.before} -> {r.after}") for r in self.replaced]
        rows += [("skipped", s.name, f"{s.type}: {s.reason}") for s in self.skipped]
        width = max(len(name or "(model)") for _, name, _ in rows)
        return "\n".join(f"{kind:<8}  {name or '(model)':<{width}}  {s}" for kind, name, s in rows)


def replace_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Turn every `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells inside `model` into fastrnn's.

    In place: the modules stay the same objects with the same Parameters, so optimizers stay valid
    and nothing is copied. `model` may itself be such a module. A module that is registered in
    several places is one object, stays one, and is listed under its first name.

    Only exactly these classes are replaced. Subclasses (their `forward` may be their own),
    modules with a `forward` set on the instance, scripted and quantised ones are skipped, with
    the reason in the report.

    Afterwards `isinstance(module, nn.LSTM)` (`nn.GRU`, `nn.RNN`) is False for replaced layers: they
    are `nn.RNNBase` only. `torch.compile` refuses whatever is an instance of those three, so being
    one would give up compilation. Replaced cells stay instances of torch's cells.

    Args:
        model: any module.
        filter_fn: `filter_fn(module, qualified_name)`: False leaves that module alone. Asked once
            for each module that can be replaced.

    Raises:
        TypeError: if `model` is no `nn.Module`.

    Example:
        >>> import torch, fastrnn
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(8, 16), "out": torch.nn.Linear(16, 2)})
        >>> print(fastrnn.replace_(model))
        replaced  rnn  torch.nn.GRU -> fastrnn.GRU
    """
    return _change(model, FROM_TORCH, from_torch, filter_fn)


def restore_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Turn fastrnn's modules inside `model` back into torch.nn's: the mirror of `replace_`.

    `Recurrent` modules have no counterpart there and are skipped.
    """
    return _change(model, TO_TORCH, to_torch, filter_fn)


def _change(
    model: nn.Module,
    targets: Mapping[type, type],
    convert: Callable[[nn.Module], nn.Module],
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
    replaced: list[Replaced] = []
    skipped: list[Skipped] = []
    # A list, as the filter is the user's and may change the model while we walk it.
    for name, module in list(model.named_modules()):
        kind = parametrize.type_before_parametrizations(module)
        target = targets.get(kind)
        reason = _refusal(module, kind, targets)
        if target and not reason and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn returned False"
        if reason:
            skipped.append(Skipped(name, _label(kind), reason))
        elif target:
            _become(module, convert(module))
            replaced.append(Replaced(name, _label(kind), _label(target)))
    return Report(tuple(replaced), tuple(skipped))


def _refusal(module: nn.Module, kind: type, targets: Mapping[type, type]) -> str | None:
    """Why a recurrent module cannot change its class; None if it can or is not recurrent."""
    if kind in targets:
        if "forward" in vars(module):
            return "its forward was set on the instance and would be bypassed or call the old class"
        return None
    if kind in targets.values():
        return f"is {_label(kind)} already"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in _NAMES:
        return "is scripted: replace before torch.jit.script"
    if kind.__name__ in _NAMES and kind.__module__.startswith("torch.ao."):
        return "is quantised or made for quantisation: its weights are not those of torch.nn"
    if isinstance(module, Recurrent):
        return "has a cell that torch.nn does not have" if targets is TO_TORCH else None
    base = next((b for b in kind.__mro__ if b in FROM_TORCH or b in TO_TORCH), None)
    if base is not None and base in targets:
        return f"is a subclass of {_label(base)}: its forward may be its own"
    return None


def _become(module: nn.Module, other: nn.Module) -> None:
    """Make `module` in all respects what `other` is, which is then of no more use."""
    module.__class__ = type(other)
    module.__dict__ = other.__dict__


def _label(kind: type) -> str:
    """The name users import: `torch.nn.LSTM`, `fastrnn.LSTM`, full path for anything else."""
    if kind in FROM_TORCH:
        return f"torch.nn.{kind.__name__}"
    if kind in TO_TORCH:
        return f"fastrnn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
