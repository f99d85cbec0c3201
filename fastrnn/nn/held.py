"""What a module holds of its matrices of weights: Parameters in floats, or buffers of the same
names with the rounded numbers, and with `<name>_scale` for int8.

Functions take the names of all weights of the module, in the order of its Parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn.nn import rounding
from fastrnn.nn.rounding import Precision

__all__ = [
    "Source",
    "dtype_after",
    "hold_floats",
    "hold_rounded",
    "in_floats",
    "matrices",
    "rounded",
    "rounded_buffers",
    "sources",
    "translate",
    "unchanged",
]

_SCALE = "_scale"
# Other weights are learned parameters of a cell.
_MATRIX = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")

Source = tuple[str, Tensor, int]  # name, tensor and its version


def matrices(names: Sequence[str]) -> list[str]:
    """The names of weights that are matrices."""
    return [n for n in names if _MATRIX.fullmatch(n)]


def rounded(
    module: nn.Module, names: Sequence[str], precision: Precision
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The matrices by name, in int8 with scales or in bfloat16."""
    held: dict[str, Any] = {n: getattr(module, n) for n in matrices(names)}
    if precision.weights == "bfloat16":
        return {n: (w.to(torch.bfloat16), None) for n, w in held.items()}
    if precision.keep_float:
        return {n: rounding.quantised(w) for n, w in held.items()}
    scales: dict[str, Any] = {n: getattr(module, n + _SCALE) for n in held}
    return {n: (w, scales[n]) for n, w in held.items()}


def in_floats(module: nn.Module, names: Sequence[str], precision: Precision) -> dict[str, Tensor]:
    """The rounded matrices by name, in the dtype of input and results."""
    found = rounded(module, names, precision)
    return {n: rounding.restored(w, scale, precision.dtype) for n, (w, scale) in found.items()}


def hold_rounded(module: nn.Module, names: Sequence[str], precision: Precision) -> None:
    """Put buffers with the rounded matrices in the place of the Parameters."""
    with torch.no_grad():
        found = rounded(module, names, precision._replace(keep_float=True))
    for name, (matrix, scale) in found.items():
        del module._parameters[name]
        module.register_buffer(name, matrix.detach().clone())
        if scale is not None:
            module.register_buffer(name + _SCALE, scale)


def hold_floats(module: nn.Module, names: Sequence[str], floats: Mapping[str, Tensor]) -> None:
    """Put Parameters with these matrices in the place of what the module holds."""
    for name in floats:
        module._buffers.pop(name, None)
        module._buffers.pop(name + _SCALE, None)
    made = {n: nn.Parameter(w, requires_grad=False) for n, w in floats.items()}
    own = {**module._parameters, **made}
    module._parameters.clear()
    # Optimizers and users rely on the order of Parameters.
    module._parameters.update({n: own.pop(n) for n in names if n in own})
    module._parameters.update(own)


def rounded_buffers(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The buffers that hold matrices and scales."""
    places = (n + suffix for n in matrices(names) for suffix in ("", _SCALE))
    found = ((n, module._buffers.get(n)) for n in places)
    return {n: buffer for n, buffer in found if buffer is not None}


def sources(module: nn.Module, names: Sequence[str]) -> list[Source]:
    """All that the results depend on, to tell later whether it has changed."""
    held = {n: module._parameters.get(n) for n in names}
    tensors = {**held, **rounded_buffers(module, names)}
    return [(n, w, _version(w)) for n, w in tensors.items() if w is not None]


def unchanged(module: nn.Module, expected: Sequence[Source]) -> bool:
    """Whether the module still holds these tensors, as they were. torch does not count writes
    through `.data`, NumPy or DLPack."""
    own = {**module._parameters, **module._buffers}
    return all(own.get(n) is w and _version(w) == then for n, w, then in expected)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def translate(
    state_dict: dict[str, Any],
    prefix: str,
    module: nn.Module,
    names: Sequence[str],
    stored: Precision | None,
    assign: bool,
) -> list[str]:
    """Put the matrices in a `state_dict` in the form in which the module has them, in place.

    Args:
        stored: the precision of a module that holds rounded matrices, else None.
        assign: whether the entries take the place of the module's own, so that the module gets the
            dtype of the biases in the `state_dict`.

    Returns:
        Messages about entries that have no such form; these are deleted.
    """
    errors = []
    given = {n: entry for n in names if isinstance(entry := state_dict.get(prefix + n), Tensor)}
    dtypes = {entry.dtype for entry in given.values()}
    others = {given[n].dtype for n in given.keys() - set(matrices(names))}
    for name in matrices(names):
        key = prefix + name
        matrix = state_dict.get(key)
        if not isinstance(matrix, Tensor):
            continue
        if stored is not None and stored.weights == "int8":
            if matrix.dtype != torch.int8:
                state_dict[key], state_dict[key + _SCALE] = rounding.quantised(matrix)
            continue
        own = module._parameters.get(name)
        dtype = torch.bfloat16 if own is None else own.dtype
        if assign and own is not None and len(others) == 1:
            (dtype,) = others
        if matrix.dtype == torch.int8:
            scale = state_dict.pop(key + _SCALE, None)
            if scale is not None:
                state_dict[key] = rounding.restored(matrix, scale, dtype)
            else:
                errors.append(f"{key} is int8, but there is no {key}{_SCALE}")
                del state_dict[key]
        # Rounded matrices with biases in floats: assigned as they are, they would not fit together.
        elif stored is not None or (matrix.dtype == torch.bfloat16 and len(dtypes) > 1):
            state_dict[key] = matrix.detach().to(dtype)  # a Parameter would not become a buffer
    return errors


def dtype_after(
    module: nn.Module,
    names: Sequence[str],
    given: Mapping[str, Any],
    weights: str,
    before: torch.dtype,
) -> torch.dtype:
    """The dtype of input and results of a module that holds rounded matrices and was assigned
    `given`: that of its other weights, or else of the matrices if they were given in floats. For a
    module that holds bfloat16 these are other floats: its own checkpoint has bfloat16, too."""
    rounded = matrices(names)
    own = {module._parameters[n] for n in names if n not in rounded and n in module._parameters}
    dtypes = {p.dtype for p in own if p is not None}
    if not dtypes:
        entries = (given.get(n) for n in rounded)
        dtypes = {m.dtype for m in entries if isinstance(m, Tensor) and m.is_floating_point()}
        if weights == "bfloat16":
            dtypes.discard(torch.bfloat16)
    return dtypes.pop() if len(dtypes) == 1 else before
