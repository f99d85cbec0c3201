"""Quantises the layers of a model for inference on CPUs, in place, and undoes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastrnn.extension import _C
from fastrnn.kernels.prepare import on_cpu
from fastrnn.nn import held
from fastrnn.nn.freeze import (
    Freezable,
    Frozen,
    computed_anew,
    floats_of,
    freezable_in,
    hold_floats,
    hold_rounded,
    precision_of,
)
from fastrnn.nn.rounding import Precision, has_kernel
from fastrnn.plan import FORMATS

__all__ = ["Comparison", "LeftAlone", "QuantisedLayer", "Report", "dequantize_", "quantize_"]

_Module = TypeVar("_Module", bound=nn.Module)

Only = Collection[str] | Callable[[str, nn.Module], bool] | None

_ACTIVATIONS = {"int8": ("auto", "int8", "int16"), "bfloat16": ("auto",)}
_MOST_COLUMNS = 1 << 16  # of int8: products of more could overflow a sum in 32 bits
_CALLS = 5  # of the model with each kind of weights, for the ratio of times


class QuantisedLayer(NamedTuple):
    """A layer or cell that was quantised.

    Attributes:
        name: "" for the model itself.
        layer: class and sizes.
        format: weights x activations.
        bytes_before, bytes_after: its weights in floats, and in the format with scales and biases.
        kernel: the instruction set that runs, and whether the kernel reads floats.
    """

    name: str
    layer: str
    format: str
    bytes_before: int
    bytes_after: int
    kernel: str


class LeftAlone(NamedTuple):
    """A layer or cell that was not quantised, and why."""

    name: str
    layer: str
    reason: str


class Comparison(NamedTuple):
    """The model before and after, called on the sample.

    Attributes:
        max_error, rms_error: largest and root-mean-square difference of the first output.
        speedup: median time of a call before, divided by that after.
    """

    max_error: float
    rms_error: float
    speedup: float


@dataclass(frozen=True)
class Report:
    """The result of `quantize_`; `print` it for a table.

    Attributes:
        quantised: the layers that were quantised, in the order of `model.named_modules()`.
        left_alone: the fastrnn layers that were not, and why.
        sample: errors and times, if there was a sample.
    """

    quantised: tuple[QuantisedLayer, ...]
    left_alone: tuple[LeftAlone, ...]
    sample: Comparison | None = None

    def __str__(self) -> str:
        rows = [
            (
                "quantised",
                q.name or "(model)",
                f"{q.layer}: {q.format}, {_size(q.bytes_before)} -> {_size(q.bytes_after)}, "
                f"{q.kernel}",
            )
            for q in self.quantised
        ]
        rows += [
            ("left alone", s.name or "(model)", f"{s.layer}: {s.reason}") for s in self.left_alone
        ]
        if self.sample is not None:
            error, rms, speedup = self.sample
            text = f"max error {error:.1e}, RMS error {rms:.1e}, {speedup:.2f} times as fast"
            rows.append(("sample", "(model)", text))
        width = max(len(name) for _, name, _ in rows)
        return "\n".join(f"{kind:<10}  {name:<{width}}  {text}" for kind, name, text in rows)


def quantize_(
    model: nn.Module,
    weights: str = "int8",
    activations: str = "auto",
    only: Only = None,
    keep_float: bool = True,
    sample: Any = None,
) -> Report:
    """Quantise the fastrnn layers and cells in `model` for inference on a CPU, in place.

    Each matrix is rounded to int8 with one float32 scale per row (output channel): the scale is
    max|row| / 127. Or it is rounded to bfloat16. Biases stay as they are. There is no calibration.
    Processors without the instructions for a format restore the weights to floats when they pack
    them. The report names the kernel.

    The rules are those of `freeze`: Parameters no longer require gradients. `load_state_dict`,
    `.to`, `copy.deepcopy` and pickling quantise again, and a call raises if weights changed in any
    other way. Under autocast or `torch.func`, in exported programs, on other devices and with a
    kernel forced by name, a quantised layer computes in floats from its rounded weights. The
    steppers of `stream` have the numbers of the layer, except that several layers in 16 bits hand
    on h in float32.

    A quantised model may be quantised or frozen again. The last call counts.

    Args:
        model: a layer, or a model that contains layers.
        weights: "int8", or "bfloat16".
        activations: "int8", or "int16" for two digits of 8 bits, which are more exact; "auto" is
            "int8". With bfloat16 weights the activations are bfloat16, and only "auto" is valid.
        only: names of layers, or a function that is called as `only(name, module)` for every layer
            that can be quantised, and returns whether to do it. None for all.
        keep_float: whether the Parameters stay. `state_dict` then is unchanged, and `dequantize_`
            is exact. If not, the matrices become buffers of the same names: int8 [rows, columns]
            with `<name>_scale`, float32 [rows] ([heads, rows, columns] and [heads, rows] with
            heads), or bfloat16 without scales. `state_dict` is then a quarter (half) as large.
            Quantised and other layers load both kinds of `state_dict`.
        sample: an input, a tuple of inputs or a dict of keyword inputs. The report then says how
            the first tensor of the output changed, and the ratio of times. The model is called
            several times, without gradients and in the mode that it is in.

    Returns:
        A `Report` of the layers that were quantised, and of those that were left alone, with the
        reasons: weights that are computed anew on every call (parametrized, pruned), in float64 or
        not on the CPU, and cells that are not compiled.

    Raises:
        TypeError: if `model` is not an `nn.Module`, if `only` is not a collection or a function, or
            if the output for `sample` has no tensor.
        ValueError: if an argument is unknown, if a weight is NaN or infinite, or if no layer was
            quantised.

    Example:
        >>> import torch, fastrnn
        >>> gru = fastrnn.GRU(8, 16)
        >>> report = fastrnn.quantize_(gru)
        >>> [(q.layer, q.format, q.bytes_before, q.bytes_after) for q in report.quantised]
        [('GRU(8, 16)', 'int8 x int8', 4992, 1920)]
        >>> output, h_n = gru(torch.randn(5, 3, 8))

    The scheme is dynamic quantisation, in the numbers of Int8Tensor of torchao and of
    https://docs.pytorch.org/docs/stable/generated/torch.ao.quantization.quantize_dynamic.html
    """
    known = _known(weights, activations)
    layers = freezable_in(model)
    if not layers:
        raise ValueError(
            f"there is no fastrnn layer in this {type(model).__name__} to quantise; "
            "fastrnn.replace_(model) puts them in the place of torch.nn's"
        )
    chosen, left_alone = _chosen(layers, only, weights, known)
    if not chosen:
        reasons = "; ".join(f"{s.name or '(model)'}: {s.reason}" for s in left_alone)
        raise ValueError(f"no layer can be quantised: {reasons}")
    for name, layer in chosen:
        _check_finite(name, layer)
    before = [_State(layer) for _, layer in chosen]
    first = None if sample is None else _call(model, sample)
    comparison = None
    try:
        for _, layer in chosen:
            _quantise(layer, Precision(weights, known, keep_float, _dtype(layer)))
        quantised = [_entry(name, layer) for name, layer in chosen]
        if first is not None:
            after = [_State(layer) for _, layer in chosen]
            comparison = _compared(model, sample, first, before, after)
    except BaseException:
        for each in before:
            each.put_back()
            each.train()
        raise
    return Report(tuple(quantised), tuple(left_alone), comparison)


def dequantize_(model: _Module) -> _Module:
    """Undo `quantize_`, in place.

    Parameters require gradients again if they did before. With `keep_float=True` they never
    changed. With `keep_float=False` the new Parameters hold the rounded numbers.

    Layers that are not quantised stay as they are.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
    """
    for _, layer in freezable_in(model):
        if precision_of(layer) is not None:
            layer._unfreeze()
    return model


class _State:
    """What a layer holds at one time, which can be put back."""

    def __init__(self, layer: Freezable) -> None:
        self._layer = layer
        self._parameters = layer._parameters.copy()
        self._buffers = layer._buffers.copy()
        self._frozen: Frozen | None = layer._frozen
        own = self._parameters.values()
        self._trained = [p for p in own if p is not None and p.requires_grad]

    def put_back(self) -> None:
        for own, then in (
            (self._layer._parameters, self._parameters),
            (self._layer._buffers, self._buffers),
        ):
            own.clear()
            own.update(then)  # type: ignore[arg-type]
        self._layer._frozen = self._frozen

    def train(self) -> None:
        for parameter in self._trained:
            parameter.requires_grad_()


def _known(weights: str, activations: str) -> str:
    """The format of the kernel."""
    if weights not in _ACTIVATIONS:
        raise ValueError(f"weights should be 'int8' or 'bfloat16', got {weights!r}")
    if activations not in _ACTIVATIONS[weights]:
        raise ValueError(
            f"activations for {weights} weights should be one of "
            f"{', '.join(map(repr, _ACTIVATIONS[weights]))}, got {activations!r}"
        )
    return weights if activations == "auto" else activations


def _chosen(
    layers: list[tuple[str, Freezable]], only: Only, weights: str, format: str
) -> tuple[list[tuple[str, Freezable]], list[LeftAlone]]:
    if only is not None and not callable(only):
        if isinstance(only, str) or not isinstance(only, Collection):
            raise TypeError(
                "only should be a collection of names, or a function of a name and a module, got "
                f"{only!r}"
            )
        if unknown := sorted(set(only) - {name for name, _ in layers}):
            raise ValueError(f"only names {unknown[0]!r}, but no fastrnn layer has this name")
    chosen, left_alone = [], []
    for name, layer in layers:
        reason = _refusal(layer, weights, format)
        if callable(only):
            if reason is None and not only(name, layer):
                reason = "only returned False"
        elif only is not None and name not in only:
            reason = "only does not name it"
        if reason is None:
            chosen.append((name, layer))
        else:
            left_alone.append(LeftAlone(name, _described(layer), reason))
    return chosen, left_alone


def _refusal(layer: Freezable, rounded: str, format: str) -> str | None:
    """Why a layer cannot be quantised; None if it can."""
    if computed := computed_anew(layer):
        return (
            f"{computed[0]} is computed anew on every call: make it permanent first "
            "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
        )
    if getattr(layer, "_written_entries", dict)():
        return "it computes with entries that were written into _flat_weights"
    weights = floats_of(layer)
    matrices = [w for recurrence in weights for w in recurrence.present()]
    dtypes, devices = {w.dtype for w in matrices}, {w.device for w in matrices}
    if len(dtypes) > 1 or torch.float64 in dtypes:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"its weights are {names}: module.float() makes them float32"
    if elsewhere := [d for d in devices if d.type != "cpu"]:
        return f"its weights are on {elsewhere[0]}, and only CPUs have kernels for it"
    widest = max(w.size(-1) for w in matrices if w.dim() > 1)
    if rounded == "int8" and widest > _MOST_COLUMNS:
        return f"a matrix has {widest} columns, and int8 sums up to {_MOST_COLUMNS}: use bfloat16"
    precision = Precision(rounded, format, True, weights[0].w_ih.dtype)
    asked = format if has_kernel(precision) else None
    key, refusal, *_ = on_cpu(layer._cell(), weights[0], format=asked)
    if key is None:
        return f"its cell {layer._cell().name!r} is not compiled"
    return refusal


def _check_finite(name: str, layer: Freezable) -> None:
    for weight, matrix in ((n, getattr(layer, n)) for n in held.matrices(layer._weight_names())):
        if matrix.is_floating_point() and not matrix.isfinite().all():
            raise ValueError(
                f"{name + '.' if name else ''}{weight} has values that are NaN or infinite, which "
                "cannot be quantised"
            )


def _dtype(layer: Freezable) -> torch.dtype:
    """That of input and results."""
    stored = precision_of(layer, stored=True)
    return layer._weights()[0].w_ih.dtype if stored is None else stored.dtype


def _quantise(layer: Freezable, precision: Precision) -> None:
    stored = precision_of(layer, stored=True)
    same = not precision.keep_float and stored is not None and stored.weights == precision.weights
    if not same:  # otherwise rounding again might change the last bit of a scale
        hold_floats(layer)
        if not precision.keep_float:
            hold_rounded(layer, precision)
    layer._freeze(precision)


def _described(layer: Freezable) -> str:
    return f"{type(layer).__name__}({layer.extra_repr()})"


def _entry(name: str, layer: Freezable) -> QuantisedLayer:
    precision = precision_of(layer)
    assert precision is not None
    before = after = 0
    for weight in layer._weight_names():
        w = getattr(layer, weight)
        if w is None:
            continue
        before += w.numel() * precision.dtype.itemsize
        if weight not in held.matrices(layer._weight_names()):
            after += w.nbytes
            continue
        after += w.numel() * FORMATS[precision.format].weight_bytes
        if precision.weights == "int8":
            after += 4 * w.shape[:-1].numel()
    kernel = _C.isa()
    if not has_kernel(precision):
        kernel += f", {str(precision.dtype).removeprefix('torch.')} weights restored"
    formats = f"{precision.weights} x {precision.format}"
    return QuantisedLayer(name, _described(layer), formats, before, after, kernel)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count / 1e3:.2f} kB"


def _call(model: nn.Module, sample: Any) -> Tensor:
    """The first tensor of the output. The same random numbers are drawn in each call, and the
    caller's stay."""
    state = torch.get_rng_state()
    with torch.no_grad():
        if isinstance(sample, Mapping):
            output = model(**sample)
        elif type(sample) is tuple:  # a PackedSequence is another
            output = model(*sample)
        else:
            output = model(sample)
    torch.set_rng_state(state)
    found = _first_tensor(output)
    if found is None:
        raise TypeError(f"the output for the sample has no tensor: {type(output).__name__}")
    return found


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return None
    return next((t for v in value if (t := _first_tensor(v)) is not None), None)


def _compared(
    model: nn.Module, sample: Any, first: Tensor, before: list[_State], after: list[_State]
) -> Comparison:
    difference = _call(model, sample).double() - first.double()
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for _ in range(_CALLS):
            for state, measured in zip((before, after), times, strict=True):
                for each in state:
                    each.put_back()
                begin = time.perf_counter()
                _call(model, sample)
                measured.append(time.perf_counter() - begin)
    finally:
        for each in after:
            each.put_back()
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    rms = float(difference.square().mean().sqrt()) if difference.numel() else 0.0
    return Comparison(largest, rms, statistics.median(times[0]) / statistics.median(times[1]))
