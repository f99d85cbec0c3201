"""Builds a user's class again on another base: their methods on our layer, or on torch.nn's.

A subclass `S` of `nn.LSTM` cannot run fastrnn's forward, because `nn.LSTM` is among its bases. So
the class is built a second time from the same functions, with fastrnn's layer in place of
`nn.LSTM`. Zero-argument `super()` finds its class in a closure cell of the function, so functions
that use it are copied with a cell that holds the new class.
"""

from __future__ import annotations

import abc
import ast
import functools
import inspect
import textwrap
import types
from typing import Any

from torch import nn

__all__ = ["obstacle", "rebased"]

# A class gets these from Python, not from its author.
_NOT_COPIED = ("__dict__", "__weakref__")
# A subclass may override these: our layer's forward does not depend on them.
_FREE = ("__init__", "forward", "reset_parameters", "extra_repr", "flatten_parameters")
_DUNDERS = (
    *("__setattr__", "__getattribute__"),
    *("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"),
)


def rebased(kind: type, old: type, new: type, **extra: Any) -> type:
    """`kind`, a subclass of `old`, with `new` in the place of `old`.

    Classes between the two are built again too; bases that do not derive from `old` are used
    unchanged. If `new` derives from `old`, as our cells do from torch's, nothing is built again: a
    subclass of both has `new` right before `old`, and stays a subclass of `kind`.

    Args:
        kind, old, new: see above.
        extra: additional attributes of the returned class.
    """
    if issubclass(new, old):
        namespace = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        result = _new_class(kind, (kind, new), {**namespace, **extra})
    else:
        cells: dict[type, types.CellType] = {}
        result = _rebuilt(kind, {old: new}, cells)
        for name, value in extra.items():
            setattr(result, name, value)
    return result


def _new_class(kind: type, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    meta: Any = type(kind)
    result: type = meta(kind.__name__, bases, namespace)
    result.__qualname__ = kind.__qualname__
    return result


def _rebuilt(kind: type, done: dict[type, type], cells: dict[type, types.CellType]) -> type:
    if kind in done:
        return done[kind]
    old = next(iter(done))
    if not issubclass(kind, old):
        return kind
    bases = tuple(_rebuilt(base, done, cells) for base in kind.__bases__)
    cells[kind] = types.CellType()
    namespace = {
        name: _moved(value, cells) for name, value in vars(kind).items() if name not in _NOT_COPIED
    }
    result = _new_class(kind, bases, namespace)
    cells[kind].cell_contents = result
    done[kind] = result
    return result


def _moved(value: Any, cells: dict[type, types.CellType]) -> Any:
    """A member of a class in which `__class__` is the new class, in wrapped functions too."""
    if isinstance(value, types.FunctionType):
        closure = tuple(_moved_cell(cell, cells) for cell in value.__closure__ or ())
        if all(a is b for a, b in zip(closure, value.__closure__ or (), strict=True)):
            return value
        copy = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, closure
        )
        functools.update_wrapper(copy, value)
        copy.__kwdefaults__ = value.__kwdefaults__
        if "__wrapped__" in vars(value):
            copy.__wrapped__ = _moved(vars(value)["__wrapped__"], cells)  # type: ignore[attr-defined]
        else:
            del copy.__wrapped__  # type: ignore[attr-defined]
        return copy
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_moved(value.__func__, cells))
    if isinstance(value, property):
        get, change, remove = (_moved(f, cells) for f in (value.fget, value.fset, value.fdel))
        return property(get, change, remove, value.__doc__)
    return value


def _moved_cell(cell: types.CellType, cells: dict[type, types.CellType]) -> types.CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return cell
    if isinstance(content, type):
        return cells.get(content, cell)
    moved = _moved(content, cells) if isinstance(content, types.FunctionType) else content
    return cell if moved is content else types.CellType(moved)


def obstacle(module: nn.Module, kind: type, old: type, new: type) -> str | None:
    """Why `module` of class `kind`, a subclass of `old`, cannot run on `new`; None if it can.

    It can if its forward is inherited or calls `super().forward`, and if nothing that it adds
    conflicts with `new`. In doubt it cannot.
    """
    theirs = kind.__mro__[: kind.__mro__.index(old)]
    names = set(dir(new)) - set(dir(old)) - {"_flat_weights"}
    inner = {
        name
        for base in old.__mro__[: old.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        if (callable(value) or isinstance(value, property)) and not name.startswith("__")
    }
    inner = inner.union(_DUNDERS).difference(_FREE)
    for base in kind.__mro__:
        # typing.Generic looks only at type parameters.
        if "__init_subclass__" in vars(base) and base.__module__ not in ("builtins", "typing"):
            return f"{base.__qualname__} acts on every class made from it (__init_subclass__)"
    rebuilt = {base.__name__ for base in (*theirs, old) if issubclass(base, old)}
    for base in theirs:
        where = base.__qualname__
        members = vars(base)
        if "forward" in members and (reason := _own_forward(members["forward"])):
            return f"{where}.forward {reason}"
        if changed := sorted(inner.intersection(members)):
            return f"{where} has its own {changed[0]}, which fastrnn's layer may not go through"
        if taken := sorted(names.intersection(members)):
            return f"{where} has its own {taken[0]}, a name that fastrnn's layer uses itself"
        if issubclass(base, old) and not issubclass(new, old):
            if type(base) not in (type, abc.ABCMeta):
                return f"{where} has a metaclass, {type(base).__qualname__}"
            if members.get("__slots__"):
                return f"{where} has __slots__"
            for name, member in members.items():
                if name != "__init__" and (reason := _asks_for_a_class(member, rebuilt)):
                    return f"{where}.{name} {reason}"
    attributes = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    if taken := sorted(names.intersection(attributes)):
        return f"has its own attribute {taken[0]}, a name that fastrnn's layer uses itself"
    return None


def _asks_for_a_class(member: Any, classes: set[str]) -> str | None:
    """Why a method depends on its former class, so that it fails in the rebuilt one; or None.

    A constructor is not checked, because it does not run again.
    """
    for part in ("__func__", "fget", "__wrapped__"):
        member = getattr(member, part, member)
    if not isinstance(member, types.FunctionType):
        return None
    names = _names(member.__code__)
    if classes.isdisjoint(names):
        return None
    if "super" in names:
        return (
            "names a class where it calls super(...), and would find the class it was made in; "
            "super() without arguments would do"
        )
    if asked := sorted(names.intersection(("isinstance", "issubclass", "type"))):
        return f"asks {asked[0]}(...) of a class that fastrnn's layer does not have"
    return None


def _names(code: types.CodeType) -> set[str]:
    """Names that the code and the functions inside it use."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names, *code.co_freevars}.difference(["__class__"]).union(*inner)


def _own_forward(forward: Any) -> str | None:
    """Why a forward does not delegate, or None if it does."""
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return "is wrapped, so what it calls cannot be seen"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        return "has no source to be read, so what it calls cannot be seen"
    if any(_is_super_forward(node) for node in ast.walk(tree)):
        return None
    return "does not call super().forward"


def _is_super_forward(node: ast.AST) -> bool:
    match node:
        case ast.Call(
            func=ast.Attribute(attr="forward", value=ast.Call(func=ast.Name(id="super")))
        ):
            return True
    return False
