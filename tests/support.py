"""What all tests share: the tolerance rule, devices, dtypes, shapes, and twins of torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]

# 1, primes, and what lies around the widths of vectors and tiles; 4096 is for time steps.
SIZES = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 61, 64, 65]
LONG = 4096


@dataclass(frozen=True)
class Floor:
    """Error that is forgiven whatever torch.nn's own is, for values and for gradients."""

    values: float
    gradients: float


FLOORS = {
    torch.float64: Floor(1e-13, 1e-12),
    torch.float32: Floor(1e-6, 5e-6),
    torch.bfloat16: Floor(2e-3, 1e-2),
    torch.float16: Floor(5e-4, 2e-3),
}


def errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest absolute error, in units of the largest exact value if that exceeds one, and root
    mean square of the error relative to that of the exact values. NaN anywhere gives NaN."""
    assert result.shape == exact.shape, f"shape {result.shape} instead of {exact.shape}"
    if not exact.numel():
        return 0.0, 0.0
    exact = exact.detach().double().cpu()
    difference = result.detach().double().cpu() - exact
    largest = difference.abs().amax() / exact.abs().amax().clamp_min(1)
    scale = exact.square().mean().sqrt().clamp_min(1e-30)
    return largest.item(), (difference.square().mean().sqrt() / scale).item()


def assert_matches(
    ours: Tensor, torchs: Tensor, exact: Tensor, *, gradient: bool = False, what: str = "result"
) -> None:
    """The tolerance rule: against the float64 reference `exact`, at most twice the error of
    torch.nn in the same dtype plus a floor, by largest error and by relative root mean square."""
    assert ours.dtype == torchs.dtype, f"{what}: {ours.dtype} instead of {torchs.dtype}"
    floor = FLOORS[ours.dtype]
    allowed = floor.gradients if gradient else floor.values
    pairs = zip(errors(ours, exact), errors(torchs, exact), strict=True)
    for (error, reference), metric in zip(pairs, ("largest", "rms"), strict=True):
        limit = 2 * reference + allowed
        # Written so that NaN fails.
        assert error <= limit, (
            f"{what}: {metric} error {error:.3g} exceeds {limit:.3g}, twice torch.nn's "
            f"{reference:.3g} plus {allowed:.3g}"
        )


@dataclass(frozen=True)
class Twins:
    """The same module three times, with equal weights: ours, torch.nn's, and the latter in
    float64 as the reference."""

    ours: nn.Module
    torchs: nn.Module
    exact: nn.Module

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.ours, self.torchs, self.exact))


def twins(name: str, *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Twins:
    """Twins of the class of that name, from the same random numbers."""
    torchs = getattr(nn, name)(*args, dtype=dtype, **kwargs)
    ours = getattr(fastrnn, name)(*args, dtype=dtype, **kwargs)
    exact = getattr(nn, name)(*args, dtype=torch.float64, **kwargs)
    ours.load_state_dict(torchs.state_dict())
    exact.load_state_dict(torchs.state_dict())
    return Twins(ours, torchs, exact)


def flatten(value: Any) -> list[Tensor]:
    """All tensors of a nested result, in order; of a packed sequence the data."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    if value is None:
        return []
    return [t for v in value for t in flatten(v)]


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` of every tensor in it; of a packed sequence, of its data."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))
    if value is None:
        return None
    return tuple(mapped(v, function) for v in value)


def run(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Values and all gradients of a call, for random but reproducible output gradients.

    Floating-point tensors among `args` become leaves in the dtype of the module.
    """
    dtype = next(module.parameters()).dtype
    args = mapped(args, lambda t: t.detach().to(dtype).requires_grad_())
    module.zero_grad()
    outputs = flatten(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    weighted = []
    for y in outputs:
        weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        weighted.append((y.double() * weight.to(y.device)).sum())
    torch.stack(weighted).sum().backward()
    result = {f"output {k}": y for k, y in enumerate(outputs)}
    for k, leaf in enumerate(flatten(args)):
        assert leaf.grad is not None, f"no gradient for argument {k}"
        result[f"gradient of argument {k}"] = leaf.grad
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"
        result[f"gradient of {name}"] = parameter.grad
    return result


def compare(modules: Twins, *args: Any, **kwargs: Any) -> None:
    """`run` all three and hold ours to the tolerance rule, values and every gradient."""
    ours, torchs, exact = (run(m, *args, **kwargs) for m in modules)
    assert ours.keys() == torchs.keys()
    for what in ours:
        assert_matches(
            ours[what], torchs[what], exact[what], gradient=what.startswith("gradient"), what=what
        )


def same_error(ours: Callable[[], object], torchs: Callable[[], object]) -> tuple[str, str]:
    """Both must raise, and the same type; gives the messages."""
    raised: list[BaseException] = []
    for call in (ours, torchs):
        try:
            result = call()
        except Exception as error:
            raised.append(error)
        else:
            raise AssertionError(f"nothing raised, got {result}")
    mine, theirs = raised
    assert type(mine) is type(theirs), f"{mine!r} instead of {theirs!r}"
    return str(mine), str(theirs)


def batches(lengths: Sequence[int], width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Sequences of those lengths with `width` features."""
    return [torch.randn(n, width, dtype=dtype) for n in lengths]
