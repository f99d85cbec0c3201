"""Converts modules between torch.nn and fastrnn: another class, the same Parameters and attributes.

Our classes register themselves in the tables below with `counterpart_of`. They also need the
conversion to torch.nn themselves, for formats that know only torch's own operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from fastrnn.kernels import onnx
from fastrnn.nn.flat_weights import written_entries
from fastrnn.nn.freeze import Freezable, in_floats, precision_of
from fastrnn.nn.rebase import rebased

__all__ = [
    "FROM_TORCH",
    "TO_TORCH",
    "WRAPPERS",
    "Wrapper",
    "beyond_torch",
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
    """Another package's module around a layer, our class for it, and the layer's attribute."""

    theirs: type[nn.Module]
    ours: type[nn.Module]
    layer: str


# The adapters in integrations/ append to this list.
WRAPPERS: list[Wrapper] = []


def counterpart_of(theirs: type[nn.Module]) -> Callable[[_Class], _Class]:
    """Register the decorated class as the counterpart of a class of torch.nn."""

    def declare(ours: _Class) -> _Class:
        FROM_TORCH[theirs] = ours
        TO_TORCH[ours] = theirs
        return ours

    return declare


def from_torch(module: nn.Module) -> nn.Module:
    """The fastrnn module for a torch.nn layer or cell, with the same Parameter objects.

    Training flag, hooks and parametrizations are kept. Both modules share the registries of hooks,
    so that existing handles still remove their hooks. The torch module stays usable.

    Args:
        module: an `nn.RNN`, `LSTM`, `GRU`, `RNNCell`, `LSTMCell` or `GRUCell`.

    Raises:
        TypeError: if `module` is of another class, a subclass included, or if `forward` was set on
            the instance: its forward may compute something else.
    """
    return converted(module, _target(module, FROM_TORCH))


def to_torch(module: nn.Module) -> nn.Module:
    """The torch.nn module for a fastrnn layer or cell, with the same Parameter objects.

    It is the inverse of `from_torch`.

    Raises:
        TypeError: if torch.nn has no counterpart: `Recurrent`, subclasses, layers with heads, or a
            `forward` that was set on the instance.
    """
    return converted(module, _target(module, TO_TORCH))


def scriptable(module: nn.Module) -> nn.Module:
    """The module that TorchScript compiles in place of one of our layers or cells.

    It is torch.nn's module with the same Parameters. For a subclass of ours it is the same subclass
    on torch.nn's class, so that TorchScript accepts and refuses the same methods.
    """
    module = in_floats(module)
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
    on_torch: Any = rebased(kind, ours, theirs)
    if issubclass(theirs, nn.RNNBase) and on_torch.forward is theirs.forward:
        # TorchScript finds the two signatures of a layer's forward by the name of its class, and
        # the source of the class by name and module.
        on_torch.__name__ = on_torch.__qualname__ = theirs.__name__
        on_torch.__module__ = theirs.__module__
    return cast(type, on_torch)


@functools.cache
def on_fastrnn(kind: type) -> type:
    """The class `kind`, a subclass of a torch.nn layer or cell, built on fastrnn's class instead.

    Its modules are copied and pickled by the name of `kind`, and loading them builds the class
    again. `rebase.obstacle` tells for which classes this works.
    """
    theirs = next(base for base in kind.__mro__ if base in FROM_TORCH)
    return rebased(kind, theirs, FROM_TORCH[theirs], __reduce_ex__=_by_origin, _made_from=kind)


def _by_origin(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _empty_on_fastrnn, (type(self)._made_from,), self.__getstate__()


def _empty_on_fastrnn(kind: type) -> Any:
    target: Any = on_fastrnn(kind)
    return target.__new__(target)


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
    if (extra := beyond_torch(module)) is not None:
        raise TypeError(f"cannot convert this {source.__qualname__}: torch.nn has no {extra}")


def beyond_torch(module: nn.Module) -> str | None:
    """What a layer has that torch.nn's layers do not have, or None."""
    if getattr(module, "heads", 1) > 1:
        return "heads"
    for name in ("zoneout", "recurrent_dropout", "clip_grad_step"):
        if getattr(module, name, None):
            return name
    return None


def converted(module: nn.Module, target: type[nn.Module]) -> nn.Module:
    """A module of class `target` with the Parameters, attributes and hooks of `module`. It gets
    Parameters of its own for weights that `module` holds rounded."""
    if isinstance(module, Freezable) and precision_of(module, stored=True) is not None:
        module = in_floats(module)
    result: nn.Module = target.__new__(target)
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_all_weights", "_flat_weights_names"):
        if name in state:
            state[name] = state[name].copy()
    # torch.nn's list of weights and references are not copied, but entries that a user wrote are.
    written = written_entries(module) if isinstance(module, nn.RNNBase) else {}
    for name in ("_flat_weights", "_frozen", "_written"):
        state.pop(name, None)
    if "_flat_weight_refs" in state:
        state["_flat_weight_refs"] = []
    result.__dict__.update(state)
    if parametrize.is_parametrized(module):
        parametrize._inject_new_class(result)
        for name in cast(nn.ModuleDict, result.parametrizations):
            parametrize._inject_property(result, name)
    if isinstance(result, nn.RNNBase):
        result._init_flat_weights()
        for name, value in written.items():
            result._flat_weights[result._flat_weights_names.index(name)] = cast(Tensor, value)
    return result


def export_forward(module: nn.Module, input: Any, extras: dict[str, Any] | None = None) -> Any:
    """The function to call with our forward's arguments in its place, or None.

    While the call is recorded in a format that knows only torch's own operators (TorchScript,
    ONNX), it is the forward of torch.nn's module. Layers that torch.onnx's new exporter records are
    an exception: `kernels/onnx.py` has their nodes. In a symbolic trace it records a single node,
    as for torch.nn's layers.
    """
    if isinstance(input, PackedSequence) and onnx.is_recording():
        return functools.partial(_padded, module)
    scripted = torch._C._get_tracing_state() is not None
    if scripted or (not isinstance(module, nn.RNNBase) and onnx.is_recording()):
        known = [c for c in type(module).__mro__ if c in TO_TORCH]
        if known and not extras and beyond_torch(module) is None:
            return converted(in_floats(module), TO_TORCH[known[0]]).forward
    if isinstance(input, Proxy):
        tracer: Any = input.tracer
        path = tracer.path_of_module(module)
        return lambda *args, **kwargs: tracer.create_proxy("call_module", path, args, kwargs)
    return None


def _padded(
    module: Any,
    input: PackedSequence,
    hx: Any = None,
    *,
    resets: Any = None,
    **extras: Any,
) -> tuple[Any, ...]:
    """A layer's results for packed input, from a call on padded input with `lengths`."""
    data, batch_sizes, order, restore = input
    state = hx if hx is None or isinstance(hx, Tensor) else hx[0]
    padding = onnx.padding(data, batch_sizes, order, state)
    first = bool(module.batch_first)

    def pad(rows: Tensor) -> Tensor:
        return padding.pad(rows).transpose(0, 1) if first else padding.pad(rows)

    def pack(y: Tensor) -> PackedSequence:
        rows = padding.pack(y.transpose(0, 1) if first else y)
        return PackedSequence(rows, batch_sizes, order, restore)

    def chosen(states: Any, order: Tensor | None) -> Any:
        if states is None or order is None:
            return states
        if isinstance(states, Tensor):
            return states.index_select(1, order)
        return tuple(s.index_select(1, order) for s in states)

    if resets is not None:
        extras["resets"] = pad(resets.data if isinstance(resets, PackedSequence) else resets)
    if "reset_states" in extras:
        extras["reset_states"] = chosen(extras["reset_states"], order)
    extras["lengths"] = padding.lengths
    y, last, *steps = module(pad(data), chosen(hx, order), **extras)
    every = [tuple(tuple(map(pack, layer)) for layer in layers) for layers in steps]
    return pack(y), chosen(last, restore), *every
