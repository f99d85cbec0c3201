"""Between torch.nn's modules and ours: the same Parameters and attributes under another class.

Our classes enter the tables below themselves (`counterpart_of`), as they need the way back to
torch.nn for formats that know torch's own operators only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize

from fastrnn.nn.flat_weights import written_entries
from fastrnn.nn.rebase import rebased

__all__ = [
    "FROM_TORCH",
    "TO_TORCH",
    "WRAPPERS",
    "Wrapper",
    "converted",
    "counterpart_of",
    "export_forward",
    "from_torch",
    "on_fastrnn",
    "scriptable",
    "to_torch",
]

_Class = TypeVar("_Class", bound=type[nn.Module])

FROM_TORCH: dict[type[nn.Module], type[nn.Module]] = {}
TO_TORCH: dict[type[nn.Module], type[nn.Module]] = {}


class Wrapper(NamedTuple):
    """Another package's module around a layer, ours for it, and the attribute with the layer."""

    theirs: type[nn.Module]
    ours: type[nn.Module]
    layer: str


# The adapters in integrations/ add to them.
WRAPPERS: list[Wrapper] = []


def counterpart_of(theirs: type[nn.Module]) -> Callable[[_Class], _Class]:
    """Declare the decorated class to be ours for that class of torch.nn."""

    def declare(ours: _Class) -> _Class:
        FROM_TORCH[theirs] = ours
        TO_TORCH[ours] = theirs
        return ours

    return declare


def from_torch(module: nn.Module) -> nn.Module:
    """The fastrnn module for a torch.nn layer or cell, on the very same Parameters.

    Training flag, hooks and parametrizations come along; the registries of hooks are shared, so
    that handles given out before still remove their hooks. The torch module stays usable.

    Raises:
        TypeError: for anything but `nn.RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell`. A subclass may
            have changed the forward, and so may an instance that was given one of its own.
    """
    return converted(module, _target(module, FROM_TORCH))


def to_torch(module: nn.Module) -> nn.Module:
    """The torch.nn module for a fastrnn layer or cell: the inverse of `from_torch`."""
    return converted(module, _target(module, TO_TORCH))


def scriptable(module: nn.Module) -> nn.Module:
    """The module that TorchScript compiles in the place of one of our layers or cells.

    It is torch.nn's own on the same Parameters; for a subclass of ours it is of the same subclass
    of torch.nn's class, so TorchScript takes and refuses the same methods.
    """
    kind = parametrize.type_before_parametrizations(module)
    ours = next(base for base in kind.__mro__ if base in TO_TORCH)
    if kind is ours:
        return to_torch(module)
    _refuse(module, kind)
    return converted(module, _on_torch(kind))


@functools.cache
def _on_torch(kind: type) -> type:
    if "_made_from" in vars(kind):  # by `on_fastrnn`
        return cast(type, vars(kind)["_made_from"])
    ours = next(base for base in kind.__mro__ if base in TO_TORCH)
    theirs = TO_TORCH[ours]
    made: Any = rebased(kind, ours, theirs)
    if issubclass(theirs, nn.RNNBase) and made.forward is theirs.forward:
        # TorchScript finds the two signatures of a layer's forward by the name of its class, and
        # the source of the class by name and module.
        made.__name__ = made.__qualname__ = theirs.__name__
        made.__module__ = theirs.__module__
    return cast(type, made)


@functools.cache
def on_fastrnn(kind: type) -> type:
    """A subclass of one of torch.nn's layers or cells with fastrnn's in the place of that.

    Its modules are copied and pickled by the name of `kind`; whoever loads them makes the class
    anew. `rebase.obstacle` tells for which classes that works.
    """
    theirs = next(base for base in kind.__mro__ if base in FROM_TORCH)
    return rebased(kind, theirs, FROM_TORCH[theirs], __reduce_ex__=_by_origin, _made_from=kind)


def _by_origin(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _empty_on_fastrnn, (type(self)._made_from,), self.__getstate__()


def _empty_on_fastrnn(kind: type) -> Any:
    made: Any = on_fastrnn(kind)
    return made.__new__(made)


def _target(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> type[nn.Module]:
    source = parametrize.type_before_parametrizations(module)
    if source not in classes:
        raise TypeError(
            f"cannot convert {source.__module__}.{source.__qualname__}: it is none of "
            f"{', '.join(f'{c.__module__}.{c.__qualname__}' for c in classes)}"
        )
    _refuse(module, source)
    return classes[source]


def _refuse(module: nn.Module, source: type) -> None:
    if "forward" in module.__dict__:
        raise TypeError(
            f"cannot convert this {source.__qualname__}: its forward was replaced on the instance"
        )
    if getattr(module, "heads", 1) > 1:
        raise TypeError(f"cannot convert this {source.__qualname__}: torch.nn has no heads")


def converted(module: nn.Module, target: type[nn.Module]) -> nn.Module:
    """A module of class `target` on the Parameters, attributes and hooks of `module`."""
    made: nn.Module = target.__new__(target)
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_all_weights", "_flat_weights_names"):
        if name in state:
            state[name] = state[name].copy()
    # The list of weights and the references to them are torch's alone; what was written into it
    # is ours.
    written = written_entries(module) if isinstance(module, nn.RNNBase) else {}
    for name in ("_flat_weights", "_frozen", "_written"):
        state.pop(name, None)
    if "_flat_weight_refs" in state:
        state["_flat_weight_refs"] = []
    made.__dict__.update(state)
    if parametrize.is_parametrized(module):
        parametrize._inject_new_class(made)
        for name in cast(nn.ModuleDict, made.parametrizations):
            parametrize._inject_property(made, name)
    if isinstance(made, nn.RNNBase):
        made._init_flat_weights()
        for name, value in written.items():
            made._flat_weights[made._flat_weights_names.index(name)] = cast(Tensor, value)
    return made


def export_forward(module: nn.Module, input: Any, extras: dict[str, Any] | None = None) -> Any:
    """What to call in place of our own forward, if anything.

    Where the call is being written down in a format that knows torch's own operators only
    (TorchScript, ONNX), the stock module's forward; in a symbolic trace, a single node, which
    is what torch.nn's own layers leave there.
    """
    if torch._C._get_tracing_state() is not None or (
        torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    ):
        known = [c for c in type(module).__mro__ if c in TO_TORCH]
        if known and not extras and getattr(module, "heads", 1) == 1:
            return converted(module, TO_TORCH[known[0]]).forward
    if isinstance(input, Proxy):
        tracer: Any = input.tracer
        path = tracer.path_of_module(module)
        return lambda *args, **kwargs: tracer.create_proxy("call_module", path, args, kwargs)
    return None
