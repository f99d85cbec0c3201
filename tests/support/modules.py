"""Twins of torch.nn's modules, and their results side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from tests.support.tensors import flatten, mapped, weights_like
from tests.support.tolerance import assert_matches


@dataclass(frozen=True)
class Twins:
    """The same module three times, with equal weights: ours, torch.nn's, and the latter in
    float64 as the reference. A name gives the class, so no type says what attributes they have."""

    ours: Any
    torchs: Any
    exact: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ours, self.torchs, self.exact))


def twins(name: str, *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Twins:
    """Twins of the class of that name, from the same random numbers."""
    torchs = getattr(nn, name)(*args, dtype=dtype, **kwargs)
    ours = getattr(fastrnn, name)(*args, dtype=dtype, **kwargs)
    exact = getattr(nn, name)(*args, dtype=torch.float64, **kwargs)
    ours.load_state_dict(torchs.state_dict())
    exact.load_state_dict(torchs.state_dict())
    return Twins(ours, torchs, exact)


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
    gradients: dict[str, Any] = {}
    for k, leaf in enumerate(flatten(args)):
        gradients[f"gradient of argument {k}"] = leaf.grad
    for name, parameter in module.named_parameters():
        gradients[f"gradient of {name}"] = parameter.grad
    missing = [what for what, g in gradients.items() if g is None]
    assert not missing, f"no {', '.join(missing)}"
    return values, gradients


def compare(modules: Twins, *args: Any, **kwargs: Any) -> None:
    """Runs all three and checks ours by the tolerance rule: values and every gradient."""
    values, gradients = zip(*(run(m, *args, **kwargs) for m in modules), strict=True)
    assert_matches(*values)
    assert_matches(*gradients, gradients=True)


def same_error(ours: Callable[[], object], torchs: Callable[[], object]) -> tuple[str, str]:
    """Asserts that both raise the same type; returns the messages."""
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
