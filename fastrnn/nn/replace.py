"""Put fastrnn's modules where a model has torch.nn's, in place, and back.

A replaced module stays the same object and changes its class, as torch's own `parametrize`
does. So whatever hangs on the object stays as it is: Parameters (and with them optimizers and the
`state_dict`), buffers, hooks of all kinds, parametrizations, pruning masks, train/eval mode,
attributes, and every reference to it, wherever it is held.
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

from fastrnn.nn.convert import FROM_TORCH, TO_TORCH, WRAPPERS, converted, on_fastrnn
from fastrnn.nn.freeze import Freezable
from fastrnn.nn.layers import Recurrent
from fastrnn.nn.rebase import obstacle

__all__ = ["Replaced", "Report", "Skipped", "replace_", "restore_"]

# Packages that go by the class of a layer, and what to do there; said where they are imported.
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
        notes: (package, what it does and the way out) for packages in use that go by the class of
            a layer, where some were replaced.
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
    """Turn every `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells inside `model` into fastrnn's.

    In place: the modules stay the same objects with the same Parameters, so optimizers stay valid
    and nothing is copied. `model` may itself be such a module. A module that is registered in
    several places is one object, stays one, and is listed under its first name.

    Only exactly these classes are replaced, unless `subclasses=True`. Modules with a `forward` set
    on the instance, scripted and quantised ones are skipped, with the reason in the report.

    Afterwards `isinstance(module, nn.LSTM)` (`nn.GRU`, `nn.RNN`) is False for replaced layers: they
    are `nn.RNNBase` only. `torch.compile` refuses whatever is an instance of those three, so being
    one would give up compilation. Replaced cells stay instances of torch's cells. The report names
    the packages in use that go by class, and what to do there.

    Args:
        model: any module.
        filter_fn: `filter_fn(module, qualified_name)`: False leaves that module alone. Asked once
            for each module that can be replaced.
        subclasses: whether subclasses of these classes are replaced too, where their `forward` is
            inherited or calls `super().forward`. Such a module gets a class of the same name and
            methods with fastrnn's layer as its base; a layer is then no instance of the class it
            had. Where that cannot be seen to give the same numbers, the report says why.

    Raises:
        TypeError: if `model` is no `nn.Module`.

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
    """Turn fastrnn's modules inside `model` back into torch.nn's: the mirror of `replace_`.

    Frozen ones are unfrozen first.

    Modules of subclasses that `replace_` changed get the class they had. `Recurrent` modules have
    no counterpart there and are skipped.
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
    # A list, as the filter is the user's and may change the model while we walk it.
    walk = list(model.named_modules())
    for name, module in walk:
        kind = parametrize.type_before_parametrizations(module)
        reason = _refusal(module, kind, targets, subclasses)
        target = None if reason else _target(kind, targets)
        if target and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn returned False"
        if reason:
            skipped.append(Skipped(name, _label(kind), reason))
        elif target:
            if isinstance(module, Freezable):
                module._unfreeze()  # torch.nn's would never train again
            _morph(module, converted(module, target))
            replaced.append(Replaced(name, _label(kind), _label(target)))
    for name, module in walk:
        if other := _wrapper(module):
            replaced.append(Replaced(name, _label(type(module)), _label(other)))
            module.__class__ = other
    order = {name: place for place, (name, _) in enumerate(walk)}
    replaced.sort(key=lambda each: order[each.name])
    return Report(tuple(replaced), tuple(skipped))


def _wrapper(module: nn.Module) -> type | None:
    """The class that a module needs for the layer it now holds, if that is another."""
    if "torchrl.modules.tensordict_module.rnn" in sys.modules:
        importlib.import_module("fastrnn.integrations.torchrl")
    for theirs, ours, name in WRAPPERS:
        if type(module) in (theirs, ours):
            held = any(kind in TO_TORCH for kind in type(getattr(module, name)).__mro__)
            wanted = ours if held else theirs
            return wanted if type(module) is not wanted else None
    return None


def _target(kind: type, targets: Mapping[type, type]) -> type | None:
    """The class that modules of class `kind` change to, if they are recurrent."""
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
        if targets is TO_TORCH and getattr(module, "heads", 1) > 1:
            return "has heads, which torch.nn does not have"
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
    """Make `module` in all respects what `other` is, which is then of no more use."""
    module.__class__ = type(other)
    module.__dict__ = other.__dict__


def _label(kind: type) -> str:
    """The name users import: `torch.nn.LSTM`, `fastrnn.LSTM`, full path for anything else."""
    if kind in FROM_TORCH:
        return f"torch.nn.{kind.__name__}"
    if kind in TO_TORCH:
        return f"fastrnn.{kind.__name__}"
    if "_made_from" in vars(kind):
        base = next(base for base in kind.__mro__ if base in TO_TORCH)
        return f"{_label(vars(kind)['_made_from'])} on fastrnn.{base.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
