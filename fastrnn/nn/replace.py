"""Replaces torch.nn's modules in a model by fastrnn's, in place, and restores them.

A replaced module stays the same object and changes its class, as with torch's own `parametrize`.
So everything that belongs to the object stays: Parameters (and with them optimizers and the
`state_dict`), buffers, hooks of all kinds, parametrizations, pruning masks, train/eval mode,
attributes, and every reference to it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastrnn.nn.convert import (
    FROM_TORCH,
    TO_TORCH,
    WRAPPERS,
    beyond_torch,
    converted,
    on_fastrnn,
)
from fastrnn.nn.freeze import Freezable
from fastrnn.nn.layers import Recurrent
from fastrnn.nn.rebase import obstacle

__all__ = ["Replaced", "Report", "Skipped", "replace_", "restore_"]

# Packages that decide by the class of a layer, and what to do. The report names those in use.
_BY_CLASS = {
    "opacus": "its PrivacyEngine refuses fastrnn's layers; "
    "opacus.validators.ModuleValidator.fix(model) puts its own in their place",
    "ptflops": "counts nothing in fastrnn's layers and cells; restore_(model) before counting",
    "thop": "counts nothing in fastrnn's layers and cells; restore_(model) before counting",
}
_OF_TRANSFORMERS = (
    "initialises torch.nn.LSTM, but no fastrnn.LSTM; call replace_ on a model that was loaded, "
    "not in its __init__"
)

_NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Replaced(NamedTuple):
    """A module that changed its class; `name` is "" for the model itself."""

    name: str
    before: str
    after: str


class Skipped(NamedTuple):
    """A recurrent module that was not changed, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The result of `replace_` or `restore_`; `print` it for a table.

    Attributes:
        replaced: (name, class before, class after), in the order of `model.named_modules()`.
        skipped: (name, class, reason) of recurrent modules that were not changed.
        notes: (package, text) for each imported package that decides by the class of a layer, if
            layers were replaced; the text says what the package does, and what to do.
    """

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            return "no recurrent modules found"
        rows = [("replaced", r.name, f"{r.before} -> {r.after}") for r in self.replaced]
        rows += [("skipped", s.name, f"{s.type}: {s.reason}") for s in self.skipped]
        rows += [("note", package, text) for package, text in self.notes]
        width = max(len(name or "(model)") for _, name, _ in rows)
        return "\n".join(f"{kind:<8}  {name or '(model)':<{width}}  {s}" for kind, name, s in rows)


def replace_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    subclasses: bool = False,
) -> Report:
    """Replace each `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells in `model` by fastrnn's, in place.

    The modules stay the same objects with the same Parameters, so optimizers stay valid and
    nothing is copied. `model` may itself be such a module. A module that is registered in several
    places is one object and is listed under its first name.

    Only exactly these classes are replaced, unless `subclasses=True`. Scripted and quantized
    modules, and those with a `forward` set on the instance, are skipped; the report says why.

    Afterwards `isinstance(module, nn.LSTM)` (`nn.GRU`, `nn.RNN`) is False for replaced layers: they
    are only `nn.RNNBase`, because `torch.compile` refuses instances of those three. Replaced cells
    stay instances of torch's cells. The report names imported packages that decide by class, and
    what to do.

    Args:
        model: any module.
        filter_fn: called as `filter_fn(module, qualified_name)`, once for each module that can be
            replaced. If it returns False, the module is skipped.
        subclasses: whether subclasses of these classes are replaced too, if their `forward` is
            inherited or calls `super().forward`. Such a module gets a class of the same name and
            methods on fastrnn's layer, so a layer is no longer an instance of its former class.
            If the same numbers cannot be guaranteed, it is skipped, and the report says why.

    Returns:
        A `Report` of replaced and skipped modules.

    Raises:
        TypeError: if `model` is not an `nn.Module`.

    Example:
        >>> import torch, fastrnn
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(8, 16), "out": torch.nn.Linear(16, 2)})
        >>> print(fastrnn.replace_(model))
        replaced  rnn  torch.nn.GRU -> fastrnn.GRU
    """
    report = _change(model, FROM_TORCH, filter_fn, subclasses)
    return replace(report, notes=_notes(model)) if report.replaced else report


def _notes(model: nn.Module) -> tuple[tuple[str, str], ...]:
    if "opacus.validators" in sys.modules:
        importlib.import_module("fastrnn.integrations.opacus")
    notes = [(package, text) for package, text in _BY_CLASS.items() if package in sys.modules]
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    if any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in kinds
    ):
        notes.append(("transformers", _OF_TRANSFORMERS))
    return tuple(notes)


def restore_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Replace fastrnn's modules in `model` by torch.nn's, in place: the inverse of `replace_`.

    Frozen modules are unfrozen first. Modules of subclasses that `replace_` changed get their
    former class again. `Recurrent` modules have no counterpart and are skipped.

    Args:
        model, filter_fn: as in `replace_`.

    Returns:
        A `Report` of restored and skipped modules.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
    """
    return _change(model, TO_TORCH, filter_fn, subclasses=False)


def _change(
    model: nn.Module,
    targets: Mapping[type, type],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    subclasses: bool,
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
    replaced: list[Replaced] = []
    skipped: list[Skipped] = []
    # A list, because the user's filter may change the model during the loop.
    modules = list(model.named_modules())
    for name, module in modules:
        kind = parametrize.type_before_parametrizations(module)
        reason = _refusal(module, kind, targets, subclasses)
        target = None if reason else _target(kind, targets)
        if target and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn returned False"
        if reason:
            skipped.append(Skipped(name, _label(kind), reason))
        elif target:
            if isinstance(module, Freezable):
                module._unfreeze()  # otherwise torch.nn's module would never train again
            _morph(module, converted(module, target))
            replaced.append(Replaced(name, _label(kind), _label(target)))
    for name, module in modules:
        if other := _wrapper(module):
            replaced.append(Replaced(name, _label(type(module)), _label(other)))
            module.__class__ = other
    order = {name: place for place, (name, _) in enumerate(modules)}
    replaced.sort(key=lambda entry: order[entry.name])
    return Report(tuple(replaced), tuple(skipped))


def _wrapper(module: nn.Module) -> type | None:
    """The class that a wrapper needs for the layer that it holds now; None if it has this class."""
    if "torchrl.modules.tensordict_module.rnn" in sys.modules:
        importlib.import_module("fastrnn.integrations.torchrl")
    for theirs, ours, name in WRAPPERS:
        if type(module) in (theirs, ours):
            held = any(kind in TO_TORCH for kind in type(getattr(module, name)).__mro__)
            wanted = ours if held else theirs
            return wanted if type(module) is not wanted else None
    return None


def _target(kind: type, targets: Mapping[type, type]) -> type | None:
    """The class that modules of class `kind` change to; None if they are not recurrent."""
    if kind in targets:
        return targets[kind]
    if targets is TO_TORCH:
        return vars(kind).get("_made_from")
    return on_fastrnn(kind) if any(base in targets for base in kind.__mro__) else None


def _refusal(
    module: nn.Module, kind: type, targets: Mapping[type, type], subclasses: bool
) -> str | None:
    """Why a recurrent module cannot change its class; None if it can or is not recurrent."""
    ours = next((base for base in kind.__mro__ if base in TO_TORCH), None)
    theirs = next((base for base in kind.__mro__ if base in FROM_TORCH), None)
    made = "_made_from" in vars(kind)
    if kind in targets or (made and targets is TO_TORCH):
        if "forward" in vars(module):
            return "its forward was set on the instance and would be bypassed or call the old class"
        if targets is TO_TORCH and (extra := beyond_torch(module)) is not None:
            return f"has {extra}, which torch.nn does not have"
        return None
    if kind in targets.values() or made:
        return f"is {_label(kind)} already"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in _NAMES:
        return "is scripted: replace before torch.jit.script"
    if kind.__name__ in _NAMES and kind.__module__.startswith("torch.ao."):
        return "is quantised or made for quantisation: its weights are not those of torch.nn"
    if isinstance(module, Recurrent):
        return "has a cell that torch.nn does not have" if targets is TO_TORCH else None
    if ours is not None:
        if targets is TO_TORCH:
            return f"is a subclass of {_label(ours)}: its forward may be its own"
        return f"is a subclass of {_label(ours)} already"
    if theirs is None or targets is TO_TORCH:
        return None
    if not subclasses:
        return (
            f"is a subclass of {_label(theirs)}: its forward may be its own; "
            "subclasses=True takes those that build on torch's"
        )
    if "forward" in vars(module):
        return "its forward was set on the instance and would be bypassed or call the old class"
    return obstacle(module, kind, theirs, FROM_TORCH[theirs])


def _morph(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the class and all attributes of `other`, which must not be used afterwards."""
    module.__class__ = type(other)
    module.__dict__ = other.__dict__


def _label(kind: type) -> str:
    """The name that users import: `torch.nn.LSTM`, `fastrnn.LSTM`, the full path for others."""
    if kind in FROM_TORCH:
        return f"torch.nn.{kind.__name__}"
    if kind in TO_TORCH:
        return f"fastrnn.{kind.__name__}"
    if "_made_from" in vars(kind):
        base = next(base for base in kind.__mro__ if base in TO_TORCH)
        return f"{_label(vars(kind)['_made_from'])} on fastrnn.{base.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
