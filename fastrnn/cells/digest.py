"""A digest of a function, which tells whether a cell that was saved is the one declared now."""

from __future__ import annotations

import dis
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["digest_of"]


def digest_of(function: Callable[..., Any]) -> str:
    """Python's version, and a digest of everything that decides the function's behaviour."""
    content = repr(_content(function, getattr(function, "__module__", None), ()))
    return f"{sys.implementation.cache_tag} {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _content(value: Any, module: str | None, above: tuple[object, ...]) -> object:
    """`value` as text and tuples without addresses; functions of `module` by their byte code."""

    def inside(values: Iterable[Any]) -> tuple[object, ...]:
        return tuple(_content(v, module, (*above, value)) for v in values)

    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return inside(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if isinstance(value, dict):
        return inside(sorted(value.items(), key=repr))
    if not isinstance(value, type) and hasattr(value, "tolist"):  # torch and NumPy
        return str(value.dtype), value.tolist()
    if hasattr(type(value), "digested"):  # a cell
        names, function = value.digested()
        return *names, inside([function])
    if isinstance(value, functools.partial):
        return inside([value.func, value.args, sorted(value.keywords.items())])
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, inside(value.co_consts)
    if isinstance(value, FunctionType) and value.__module__ == module and value not in above:
        code = value.__code__
        constants = [None if c == value.__doc__ else c for c in code.co_consts]
        read = [value.__globals__[n] for n in _globals(code) if n in value.__globals__]
        captured = [c.cell_contents for c in value.__closure__ or () if c != CellType()]
        defaults = value.__defaults__, sorted((value.__kwdefaults__ or {}).items())
        return code.co_code, code.co_names, inside([constants, read, captured, defaults])
    if hasattr(value, "__dict__") and not isinstance(value, (type, FunctionType, ModuleType)):
        plain = {n: v for n, v in vars(value).items() if isinstance(v, (int, float, complex, str))}
        return str(type(value)), inside(sorted(plain.items()))
    return getattr(value, "__module__", None), getattr(value, "__qualname__", str(type(value)))


def _globals(code: CodeType) -> list[str]:
    """Names of the globals that the code and the functions inside it read."""
    inner = [n for c in code.co_consts if isinstance(c, CodeType) for n in _globals(c)]
    own = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    return sorted({*own, *inner})
