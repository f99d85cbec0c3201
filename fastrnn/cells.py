"""Every cell: one pure function each.

A cell maps the projections of one time step and the previous states to the next states,
unit by unit. Its derivative, what back-propagation keeps, the C++ and the GPU code are all
derived from the function here (`codegen.py`); its arithmetic stands nowhere else.

`u = W·x + b_ih` and `v = R·h + b_hh` arrive with one attribute per gate; state 0 is the
recurrent one and is the output of the layer. A cell may use torch's pointwise functions only,
so that every unit of the hidden state is independent of the others within a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor, relu, sigmoid, tanh

__all__ = ["Cell", "cell", "get", "names"]


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        name: unique name, the key of the registry and of `torch.ops.fastrnn.scan`.
        gates: names of the gates, in the order of the blocks of `weight_ih` and `weight_hh`.
        states: names of the states; the first is recurrent and is the output.
        function: `function(u, v, *states) -> states`, pointwise.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    function: Callable[..., Tensor | tuple[Tensor, ...]]

    def step(self, u: Sequence[Tensor], v: Sequence[Tensor], s: Sequence[Tensor]) -> list[Tensor]:
        """One time step on tensors: `u`, `v` one tensor per gate, `s` one per state."""
        named_u = SimpleNamespace(**dict(zip(self.gates, u, strict=True)))
        named_v = SimpleNamespace(**dict(zip(self.gates, v, strict=True)))
        out = self.function(named_u, named_v, *s)
        states = [out] if isinstance(out, Tensor) else list(out)
        if len(states) != len(self.states):
            raise ValueError(
                f"cell {self.name!r} returned {len(states)} states, "
                f"but was declared with {len(self.states)}: {', '.join(self.states)}"
            )
        return states

    def __call__(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(*args)

    def __reduce__(self) -> tuple[Callable[[str], Cell], tuple[str]]:
        return get, (self.name,)


_registry: dict[str, Cell] = {}
_built_in: frozenset[str] = frozenset()


def cell(
    *, gates: str | Sequence[str], states: str | Sequence[str], name: str | None = None
) -> Callable[[Callable[..., Tensor | tuple[Tensor, ...]]], Cell]:
    """Declare a cell from a function of one time step.

    Args:
        gates: gate names, one letter each as a string (`"ifgo"`) or a sequence of identifiers,
            in the order of the weight blocks.
        states: state names in the same form; the first is recurrent and is the output.
        name: registry name; the function's own by default.

    Raises:
        ValueError: for names that repeat or are no identifiers, for a function that does not
            take `(u, v, *states)`, or for the name of a built-in cell. Declaring another cell of
            one's own under the same name replaces it, as redefining a function does.

    Example:
        >>> import torch, fastrnn
        >>> @fastrnn.cell(gates="fn", states="h")
        ... def minimal_gated_unit(u, v, h):  # Zhou et al. 2016, arXiv:1603.09420
        ...     f = torch.sigmoid(u.f + v.f)
        ...     return (1 - f) * h + f * torch.tanh(u.n + f * v.n)
    """

    def declare(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Cell:
        made = Cell(name or function.__name__, tuple(gates), tuple(states), function)
        _check(made)
        if made.name in _built_in:
            raise ValueError(
                f"{made.name!r} is a built-in cell; choose another name with cell(name=...)"
            )
        _registry[made.name] = made
        return made

    return declare


def get(name: str) -> Cell:
    """The cell of that name; `ValueError` lists the known ones."""
    try:
        return _registry[name]
    except KeyError:
        raise ValueError(f"no cell named {name!r}; there are: {', '.join(_registry)}") from None


def names() -> list[str]:
    """Names of all cells, in order of declaration."""
    return list(_registry)


def _check(made: Cell) -> None:
    for kind, given in (("gates", made.gates), ("states", made.states)):
        if not given:
            raise ValueError(f"cell {made.name!r} needs at least one of {kind}")
        if len(set(given)) != len(given) or not all(n.isidentifier() for n in given):
            raise ValueError(f"{kind} of cell {made.name!r} must be distinct identifiers: {given}")
    parameters = inspect.signature(made.function).parameters.values()
    flexible = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if not flexible and len(parameters) != 2 + len(made.states):
        raise ValueError(
            f"cell {made.name!r} must be a function of (u, v, {', '.join(made.states)}), "
            f"got {inspect.signature(made.function)}"
        )


# The cells of torch.nn, in its gate order.


@cell(gates="h", states="h")
def rnn_tanh(u, v, h):  # type: ignore[no-untyped-def]
    """Elman network, https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html"""
    return tanh(u.h + v.h)


@cell(gates="h", states="h")
def rnn_relu(u, v, h):  # type: ignore[no-untyped-def]
    """Elman network with rectified units (Le et al. 2015, arXiv:1504.00941)."""
    return relu(u.h + v.h)


@cell(gates="ifgo", states="hc")
def lstm(u, v, h, c):  # type: ignore[no-untyped-def]
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000)."""
    i, f, o = sigmoid(u.i + v.i), sigmoid(u.f + v.f), sigmoid(u.o + v.o)
    c = f * c + i * tanh(u.g + v.g)
    return o * tanh(c), c


@cell(gates="rzn", states="h")
def gru(u, v, h):  # type: ignore[no-untyped-def]
    """Gated recurrent unit, reset after the product (Cho et al. 2014, arXiv:1406.1078v1)."""
    r, z = sigmoid(u.r + v.r), sigmoid(u.z + v.z)
    n = tanh(u.n + r * v.n)
    return n + z * (h - n)


_built_in = frozenset(_registry)
