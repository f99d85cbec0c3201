"""What all tests share: the tolerance rule, devices, dtypes, shapes, and twins of torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def largest_error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute error, in units of the largest exact value if that exceeds one.

    NaN in gives NaN.
    """
    if not exact.numel():
        return 0.0
    exact = exact.detach().double().cpu()
    difference = (result.detach().double().cpu() - exact).abs().amax()
    return (difference / exact.abs().amax().clamp_min(1)).item()


def rms_error(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square of the errors of all of them relative to that of the values.

    NaN in gives NaN.
    """
    wanted = torch.cat([t.detach().double().cpu().flatten() for t in exact])
    if not wanted.numel():
        return 0.0
    got = torch.cat([t.detach().double().cpu().flatten() for t in result])
    return ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


# The relative error of fewer numbers than this is luck: the rms is that of several tensors.
ENOUGH = 64


def assert_matches(
    ours: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    gradients: bool = False,
) -> None:
    """The tolerance rule: against the float64 reference `exact`, at most twice the error of
    torch.nn in the same dtype plus a floor, by the largest error of every tensor and by the
    relative root mean square of every tensor, small ones together."""
    assert list(ours) == list(torchs) == list(exact)
    for what in ours:
        assert ours[what].shape == torchs[what].shape == exact[what].shape, what
        assert ours[what].dtype == torchs[what].dtype, what
        floor = _floor(ours[what].dtype, gradients)
        error, reference = (largest_error(r[what], exact[what]) for r in (ours, torchs))
        _limit(f"largest error of {what}", error, reference, floor)
    large = [[what] for what in exact if exact[what].numel() >= ENOUGH]
    for group in (*large, list(exact)):
        results = [[r[what] for what in group] for r in (ours, torchs, exact)]
        error, reference = (rms_error(r, results[2]) for r in results[:2])
        floor = _floor(ours[group[0]].dtype, gradients)
        _limit(f"rms error of {', '.join(group)}", error, reference, floor)


def _floor(dtype: torch.dtype, gradients: bool) -> float:
    return FLOORS[dtype].gradients if gradients else FLOORS[dtype].values


def _limit(what: str, error: float, reference: float, floor: float) -> None:
    limit = 2 * reference + floor
    # Written so that NaN fails.
    assert error <= limit, (
        f"{what}: {error:.3g} exceeds {limit:.3g}, "
        f"twice torch.nn's {reference:.3g} plus {floor:.3g}"
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


def run(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and all gradients of a call, for random but reproducible output gradients.

    Tensors among `args` become leaves in the dtype of the module.
    """
    dtype = next(module.parameters()).dtype
    args = mapped(args, lambda t: t.detach().to(dtype).requires_grad_())
    module.zero_grad()
    values = {f"output {k}": y for k, y in enumerate(flatten(module(*args, **kwargs)))}
    weighted = [(y.double() * weights_like(y)).sum() for y in values.values()]
    torch.stack(weighted).sum().backward()
    gradients = {}
    for k, leaf in enumerate(flatten(args)):
        gradients[f"gradient of argument {k}"] = leaf.grad
    for name, parameter in module.named_parameters():
        gradients[f"gradient of {name}"] = parameter.grad
    missing = [what for what, g in gradients.items() if g is None]
    assert not missing, f"no {', '.join(missing)}"
    return values, gradients


def weights_like(y: Tensor) -> Tensor:
    """Random weights for a sum that every element of `y` matters in; the same for each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)


def compare(modules: Twins, *args: Any, **kwargs: Any) -> None:
    """`run` all three and hold ours to the tolerance rule, values and every gradient."""
    values, gradients = zip(*(run(m, *args, **kwargs) for m in modules), strict=True)
    assert_matches(*values)
    assert_matches(*gradients, gradients=True)


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
