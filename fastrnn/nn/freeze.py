"""Prepacks the weights of layers once, for inference, instead of on every call.

A frozen module keeps a copy of its weights in the kernel's layout, which must follow every change
of its Parameters. Changes through the module (`load_state_dict`, `.to`, copies, pickles) prepack
the weights again; the kernel detects all other changes at the next call.

A quantised module is a frozen one whose matrices are rounded before they are packed. If it does not
keep the floats, it holds the matrices as buffers, with the names that the Parameters had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import ops
from fastrnn.cells import Cell
from fastrnn.extension import _C
from fastrnn.kernels import device
from fastrnn.kernels.operands import Weights, side_by_side
from fastrnn.nn import held, rounding
from fastrnn.nn.rounding import Precision, Quantised
from fastrnn.nn.stream import Slots, Stepper, slots, stepper

__all__ = [
    "Freezable",
    "Frozen",
    "computed_anew",
    "floats_of",
    "freezable_in",
    "freeze",
    "hold_floats",
    "hold_rounded",
    "in_floats",
    "operands",
    "precision_of",
    "rounded_of",
    "slots_of",
    "stepper_of",
    "unfreeze",
]

_Module = TypeVar("_Module", bound=nn.Module)
_Entry = TypeVar("_Entry")


class Restored(NamedTuple):
    """What a module with rounded matrices was packed from, and its weights in floats, if the kernel
    cannot read the matrices."""

    weights: list[Weights] | None
    sources: list[held.Source]


class Frozen(NamedTuple):
    """The additional state of a frozen module."""

    layers: tuple[ops.Prepacked | None, ...]  # None for layers that the CPU kernel does not run
    trained: tuple[str, ...]  # parameters that required gradients before
    precision: Precision | None = None  # that of a quantised module; it has all `layers` or none
    restored: Restored | None = None  # of a module that holds rounded matrices


class Freezable(nn.Module):
    """Base of layers and cells, whose weights can be prepacked once."""

    # Each name here is one that a user's subclass cannot have, so the rest are functions below.
    _frozen: Frozen | None = None

    def _cell(self) -> Cell:
        raise NotImplementedError

    def _weights(self, instead: Mapping[str, Any] | None = None) -> list[Weights]:
        """The weights of every layer, direction and head, as `functional.rnn` takes them; those in
        `instead` take the place of the module's own."""
        raise NotImplementedError

    def _weight_names(self) -> list[str]:
        raise NotImplementedError

    def _freeze(self, precision: Precision | None = None) -> None:
        trained = _trained(self)
        with torch.no_grad():
            if precision is None:
                layers = [ops.pack(self._cell(), w) for w in _by_layer(self, self._weights())]
                frozen = Frozen(tuple(layers), trained)
            else:
                frozen = _quantised(self, precision)._replace(trained=trained)
        self._frozen = frozen
        for name in self._weight_names():
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(False)

    def _unfreeze(self) -> None:
        if self._frozen is None:
            return
        hold_floats(self)
        for name in self._frozen.trained:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_()
        del self._frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        stored = precision_of(self, stored=True)
        before = held.rounded_buffers(self, self._weight_names()) if stored is not None else {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now: Any = self._buffers[name]
            if now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        if stored is not None:
            dtype = fn(torch.empty(0, dtype=stored.dtype, device="cpu")).dtype
            self._freeze(stored._replace(dtype=dtype))
        elif self._frozen is not None:
            self._freeze(self._frozen.precision)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored, names = precision_of(self, stored=True), self._weight_names()
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        given = {n: state_dict.get(prefix + n) for n in names}
        errors = held.translate(state_dict, prefix, self, names, stored, assign)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        error_msgs.extend(errors)
        try:
            if stored is not None and assign:
                dtype = held.dtype_after(self, names, given, stored.weights, stored.dtype)
                self._freeze(stored._replace(dtype=dtype))
            elif self._frozen is not None:
                self._freeze(self._frozen.precision)
        except (RuntimeError, ValueError) as error:  # such as weights of several dtypes
            error_msgs.append(f"the weights {prefix}* cannot be packed: {error}")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._frozen is not None:
            state["_frozen"] = self._frozen._replace(layers=(), restored=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._frozen is not None:
            self._freeze(self._frozen.precision)


def _trained(module: Freezable) -> tuple[str, ...]:
    """Names of parameters that require gradients, or did before."""
    own = ((n, module._parameters.get(n)) for n in module._weight_names())
    trained = {n for n, p in own if p is not None and p.requires_grad}
    return tuple(sorted(trained.union(module._frozen.trained if module._frozen else ())))


def _by_layer(module: Freezable, entries: Sequence[_Entry]) -> list[Sequence[_Entry]]:
    scans = (2 if getattr(module, "bidirectional", False) else 1) * getattr(module, "heads", 1)
    return [entries[first : first + scans] for first in range(0, len(entries), scans)]


def _quantised(module: Freezable, precision: Precision) -> Frozen:
    names, passed = module._weight_names(), module._weights()
    if precision.keep_float:
        precision = precision._replace(dtype=passed[0].w_ih.dtype)
    recurrences = _rounded(module, precision)
    packed = [
        rounding.pack(module._cell(), layer, precision) for layer in _by_layer(module, recurrences)
    ]
    restored = None
    if not precision.keep_float:
        floats = None
        if not rounding.has_kernel(precision):
            passed = floats = [rounding.to_floats(r, precision.dtype) for r in recurrences]
        restored = Restored(floats, held.sources(module, names))
    # The fingerprint is of the weights that calls pass, and not of those that were packed.
    layers = [
        layer._replace(fingerprint=_C.fingerprint([t for group in side_by_side(w) for t in group]))
        for layer, w in zip(packed, _by_layer(module, passed), strict=True)
        if layer is not None
    ]
    if len(layers) < len(packed):
        return Frozen((), (), precision)
    return Frozen(tuple(layers), (), precision, restored)


def rounded_of(module: Freezable) -> list[Quantised]:
    """The weights of every recurrence as a quantised module rounds them; none for others."""
    precision = precision_of(module)
    return [] if precision is None else _rounded(module, precision)


def _rounded(module: Freezable, precision: Precision) -> list[Quantised]:
    """The weights of every recurrence of a quantised module."""
    matrices = held.rounded(module, module._weight_names(), precision)
    weights = module._weights({n: matrix for n, (matrix, _) in matrices.items()})
    if precision.weights != "int8":
        return [Quantised(w) for w in weights]
    scales = module._weights({n: scale for n, (_, scale) in matrices.items()})
    # A recurrence without recurrent rows has no scales for them.
    pairs = zip(weights, scales, strict=True)
    return [Quantised(w, (s.w_ih, s.w_hh.view(w.w_hh.size(0)), s.w_hr)) for w, s in pairs]


def precision_of(module: Freezable, *, stored: bool = False) -> Precision | None:
    """The precision of a quantised module; with `stored` only if it holds rounded matrices."""
    precision = None if module._frozen is None else module._frozen.precision
    return None if precision is None or (stored and precision.keep_float) else precision


def computed_anew(module: Freezable) -> list[str]:
    """Names of weights that every call computes anew."""
    rounded = {} if precision_of(module, stored=True) is None else module._buffers
    own = {**module._parameters, **rounded}
    return [n for n in module._weight_names() if n not in own]


def hold_rounded(module: Freezable, precision: Precision) -> None:
    """Put buffers with the rounded matrices in the place of Parameters; `_freeze` must follow."""
    module._frozen = Frozen((), _trained(module))
    held.hold_rounded(module, module._weight_names(), precision)


def hold_floats(module: Freezable) -> None:
    """Put Parameters in the place of rounded matrices."""
    stored = precision_of(module, stored=True)
    if stored is not None:
        names = module._weight_names()
        with torch.no_grad():
            held.hold_floats(module, names, held.in_floats(module, names, stored))


def in_floats(module: _Module) -> _Module:
    """A module whose Parameters are the weights that a quantised one computes with, for formats
    that know no others. Other modules are returned as they are."""
    precision = precision_of(module) if isinstance(module, Freezable) else None
    if precision is None:
        return module
    twin: Any = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(_parameters=module._parameters.copy(), _buffers=module._buffers.copy())
    del twin._frozen
    names = twin._weight_names()
    held.hold_floats(twin, names, held.in_floats(module, names, precision))
    result: _Module = twin
    return result


def floats_of(module: Freezable) -> list[Weights]:
    """The weights for all code that cannot read the prepacked ones."""
    precision = precision_of(module)
    if precision is None:
        return module._weights()
    return module._weights(held.in_floats(module, module._weight_names(), precision))


def stepper_of(module: Freezable, batch_size: int, threads: int, release_gil: bool) -> Stepper:
    """The stepper that `stream` returns."""
    weights, packing = _weights_for_steps(module)
    return stepper(module._cell(), weights, batch_size, threads, release_gil, **packing)


def slots_of(module: Freezable, capacity: int, threads: int, release_gil: bool) -> Slots:
    """The slots that `stream_slots` returns."""
    weights, packing = _weights_for_steps(module)
    return slots(module._cell(), weights, capacity, threads, release_gil, **packing)


def _weights_for_steps(module: Freezable) -> tuple[list[Weights], dict[str, Any]]:
    """Weights, and how a stepper packs those of a quantised module."""
    precision = precision_of(module)
    if precision is None or not rounding.has_kernel(precision):
        return floats_of(module), {}
    recurrences = _rounded(module, precision)
    scales = [rounding.scales_of(recurrence) for recurrence in recurrences]
    packing = {"format": precision.format, "scales": scales, "dtype": precision.dtype}
    return [recurrence.weights for recurrence in recurrences], packing


def operands(
    module: Freezable, input: Any
) -> tuple[list[Weights], tuple[ops.Prepacked | None, ...]]:
    """The weights for a call of a quantised module, and the prepacked ones."""
    frozen = module._frozen
    assert frozen is not None
    x = input.data if isinstance(input, PackedSequence) else input
    precision, compiling = precision_of(module), torch.compiler.is_compiling()
    wrong = precision is None or x.dtype != precision.dtype  # an error, but under autocast
    if wrong or (not compiling and device.asked_for() not in (None, "cpu")):
        return floats_of(module), ()
    if not frozen.layers or not ops._can_use_prepacked(x):
        # A view of a tensor of a subclass may be plain, and then the prepacked weights would run.
        return floats_of(module), frozen.layers if ops._plain(x) else ()
    if frozen.restored is None:
        return module._weights(), frozen.layers
    if not compiling and not held.unchanged(module, frozen.restored.sources):
        raise RuntimeError(
            "fastrnn: the weights of a quantised layer were changed or replaced after quantising. "
            "Call fastrnn.quantize_(model) again to use the new ones, or "
            "fastrnn.dequantize_(model) before changing them"
        )
    return frozen.restored.weights or module._weights(), frozen.layers


def freeze(module: _Module) -> _Module:
    """Prepack the weights of every fastrnn layer and cell in `module` for inference, in place.

    Calls then skip the packing, which takes most of the time for short sequences; the results stay
    the same. Parameters of these layers no longer require gradients, and the output has no
    derivative with respect to the input either. The prepacked copy needs about as much memory as
    the weights.

    `load_state_dict`, `.to`, `copy.deepcopy` and pickling prepack changed weights again. If weights
    change in any other way (in place, by an optimizer, by assigning a Parameter), the next call
    raises. torch does not count writes through `.data`, NumPy or DLPack. The next call finds those
    in biases of up to 16 KiB and weights of up to 4 KiB. It checks larger ones block by block, so
    that the check stays cheap: all blocks within 64 rows (time steps of all sequences).

    If the CPU kernel does not run (other devices, autocast, `torch.func`, a kernel forced by
    name), the layer works as before, from its Parameters.

    A quantised layer is frozen in floats again, as after `dequantize_`.

    Args:
        module: a layer, or a model that contains layers.

    Returns:
        `module`.

    Raises:
        TypeError: if `module` is not an `nn.Module`.
        ValueError: if `module` contains no fastrnn layer, or if every call computes the weights of
            one again (parametrized, pruned).
        RuntimeError: from a call of the frozen module, if weights changed after freezing, or if
            input or states require gradients while gradients are recorded.

    Example:
        >>> import torch, fastrnn
        >>> gru = fastrnn.freeze(fastrnn.GRU(8, 16))
        >>> output, h_n = gru(torch.randn(5, 3, 8))
    """
    layers = freezable_in(module)
    if not layers:
        raise ValueError(
            f"there is no fastrnn layer in this {type(module).__name__} to freeze; "
            "fastrnn.replace_(model) puts them in the place of torch.nn's"
        )
    for name, layer in layers:
        if computed := computed_anew(layer):
            raise ValueError(
                f"{computed[0]} of {name or 'the module'} is computed anew on every call, so it "
                "cannot be packed once: make it permanent first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
            )
    for _, layer in layers:
        hold_floats(layer)
        layer._freeze()
    return module


def unfreeze(module: _Module) -> _Module:
    """Undo `freeze`, in place.

    The prepacked weights are dropped, and parameters require gradients again if they did before.
    Layers that are not frozen stay as they are.

    Returns:
        `module`.

    Raises:
        TypeError: if `module` is not an `nn.Module`.
        ValueError: if a layer is quantised; `dequantize_` undoes that.
    """
    layers = freezable_in(module)
    for name, layer in layers:
        if precision_of(layer) is not None:
            raise ValueError(
                f"{name or 'the module'} is quantised, which fastrnn.dequantize_(model) undoes"
            )
    for _, layer in layers:
        layer._unfreeze()
    return module


def freezable_in(module: nn.Module) -> list[tuple[str, Freezable]]:
    """The layers and cells in `module`, by name.

    Raises:
        TypeError: if `module` is not an `nn.Module`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module should be a torch.nn.Module, got: {type(module).__name__}")
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Freezable)]
