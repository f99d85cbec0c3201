"""How a cell is declared, and found by its name.

A cell maps the projections of one time step and the previous states to the next states,
unit by unit. Its derivative, the values saved for the backward pass, the C++ and the GPU code
are all derived from this one function (`compiler/`); its arithmetic stands nowhere else.

`u = W·x + b_ih` and `v = R·h + b_hh` arrive with one attribute per gate, and learned numbers `p`
with one per parameter. State 0 is recurrent and is the output of the layer. A cell uses pointwise
functions of torch. Units of a row meet where it reduces over the last dimension (a mean, a norm, a
softmax), and where it multiplies another value by the recurrent weights: `v(x)` is R·x + b_hh.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastrnn.cells.arguments import Gates, Param, Params, Projection, kinds_of
from fastrnn.cells.checks import MAX_GATES, MAX_PARAMS, MAX_STATES, check
from fastrnn.cells.noise import MAX_DRAWS, Draw, drawing
from fastrnn.cells.pickling import Carrier, Saved, carrier_of, restored, saved

__all__ = [
    "MAX_GATES",
    "MAX_PARAMS",
    "MAX_STATES",
    "Cell",
    "Gates",
    "Param",
    "Params",
    "cell",
    "get",
    "get_published",
    "names",
    "publish",
    "seal",
]


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell.

    Attributes:
        name: unique name, the key of the registry and of `torch.ops.fastrnn.scan`.
        gates: names of the gates, in the order of the blocks of `weight_ih` and `weight_hh`.
        states: names of the states; the first is recurrent and is the output.
        function: `function(u, v, *states) -> states`; `function(u, v, p, *states)` if there are
            `params`.
        params: learned parameters by name; in a layer, `p.gain` is `weight_gain_l0` and so on.
        initialize: `initialize(u, v)`, or `initialize(u, v, p)` if there are `params`, which writes
            the initial values of a layer's weights; see `cell`. Cells that differ in it alone are
            equal: they compute the same.
        noise: whether the function draws random numbers, as in training; see `noisy`.
        made_by: a function and its arguments, if they make this cell of another one.
        inputs, recurrent: names of the gates that have rows in `weight_ih` and in `weight_hh`, in
            the order of `gates`; all of them, if they are not given.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    params: Mapping[str, Param] = field(default_factory=dict)
    initialize: Callable[..., object] | None = None
    noise: bool = False
    made_by: tuple[Callable[..., Cell], tuple[Any, ...]] | None = None
    inputs: tuple[str, ...] = cast(Any, None)
    recurrent: tuple[str, ...] = cast(Any, None)

    def __post_init__(self) -> None:
        for side in ("inputs", "recurrent"):
            if getattr(self, side) is None:
                object.__setattr__(self, side, self.gates)
        # A copy, so that nobody who has the dictionary changes the cell.
        object.__setattr__(self, "params", dict(self.params))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cell):
            return NotImplemented
        return self._identity() == other._identity()

    def _identity(self) -> tuple[object, ...]:
        # The order of the parameters is that of compiled code; how they begin is not part of it.
        rows = self.inputs, self.recurrent
        kinds = kinds_of(self.params)
        return self.name, self.gates, rows, self.states, self.function, kinds, self.noise

    def digested(self) -> tuple[tuple[object, ...], Callable[..., Any]]:
        """What the digest of a function that reads this cell takes of it."""
        names = self.gates, self.inputs, self.recurrent, self.states, kinds_of(self.params)
        return names, self.function

    def __hash__(self) -> int:
        # Every call of a layer looks up its cell; the dataclass would hash all fields each time.
        return hash(self.name)

    def step(
        self,
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        s: Sequence[Tensor],
        p: Sequence[Tensor] = (),
        apply: Callable[[Tensor], Sequence[Tensor]] | None = None,
        z: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """One time step on tensors: one per gate with input rows in `u`, per gate with recurrent
        rows in `v`, per state in `s`, and per learned parameter in `p`. `apply(x)` gives the
        recurrent projections of another value than state 0, for cells that call `v(x)`. `z` are the
        numbers of the draws, for a cell with noise.

        Raises:
            TypeError, ValueError: if the function returns no states, or another number of them than
                were declared.
        """
        params = (Params(self, p),) if self.params else ()
        arguments = (Gates(self, u), Projection(self, v, apply), *params, *s)
        if self.noise:
            given = _Given(self, z)
            with drawing(given):
                out = self.function(*arguments)
            given.check(not given.rest)
        else:
            out = self.function(*arguments)
        if not isinstance(out, (Tensor, tuple, list)):
            raise TypeError(
                f"cell {self.name!r} returned a {type(out).__name__}; its function returns a "
                f"tensor for each state, in order: {', '.join(self.states)}"
            )
        states = [out] if isinstance(out, Tensor) else list(out)
        if len(states) != len(self.states):
            raise ValueError(
                f"cell {self.name!r} returned {len(states)} states, "
                f"but was declared with {len(self.states)}: {', '.join(self.states)}"
            )
        return states

    def __call__(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(*args)

    @functools.cached_property
    def draws(self) -> tuple[Draw, ...]:
        """What the function draws in training, in order, by `fastrnn.dropout` and
        `fastrnn.bernoulli`."""
        return self._found_draws.draws

    @functools.cached_property
    def _found_draws(self) -> _Found:
        """The draws of a call with tensors [1, 2], or why that failed."""
        if self.is_built_in:
            return _Found()
        found: list[Draw] = []

        def record(draw: Draw) -> Tensor:
            found.append(draw)
            return rows[0]

        sizes = [param.size(2, len(self.gates)) for param in self.params.values()]
        rows = [torch.ones(1, 2, device="cpu")] * max(len(self.gates), len(self.states))
        u, v, s = (rows[: len(names)] for names in (self.inputs, self.recurrent, self.states))
        quiet = self._with_noise(False)
        try:
            # A layer may be made within the context of another device.
            with torch.no_grad(), torch.device("cpu"), drawing(record):
                quiet.step(u, v, s, [torch.ones(size, device="cpu") for size in sizes], lambda x: v)
        except Exception as error:  # such a function cannot be derived, so the reference calls it
            return _Found(failure=str(error) or type(error).__name__, error=error)
        if len(found) > MAX_DRAWS:
            raise ValueError(
                f"cell {self.name!r} draws {len(found)} random numbers for each unit, and the "
                f"kernels are made for at most {MAX_DRAWS}"
            )
        return _Found(tuple(found))

    @functools.cached_property
    def noisy(self) -> Cell:
        """The cell as it is in training: with random numbers, if the function draws any."""
        found = self._found_draws
        if self.noise or not (found.draws or found.error):
            return self
        made = self._with_noise(True)
        # In Python 3.11, torch.compile cannot trace the lock of a property that is not cached yet.
        vars(made).update(_found_draws=found, draws=found.draws)
        return made

    def _with_noise(self, noise: bool) -> Cell:
        if noise == self.noise:
            return self
        return Cell(
            self.name,
            self.gates,
            self.states,
            self.function,
            self.params,
            self.initialize,
            noise,
            self.made_by,
            self.inputs,
            self.recurrent,
        )

    @property
    def has_all_rows(self) -> bool:
        """Whether every gate has rows in both matrices, as those of torch.nn have."""
        return len(self.inputs) == len(self.recurrent) == len(self.gates)

    def hidden_size(self, w_ih: Tensor) -> int:
        """The number of hidden units of a recurrence with these input weights."""
        return w_ih.size(0) // len(self.inputs)

    def param_rows(self) -> dict[str, tuple[str, ...]]:
        """For each parameter, the names of its rows of numbers per unit: its own or, if it has a
        number for each gate, one for each."""
        return {
            name: tuple(f"{name}.{gate}" for gate in self.gates)
            if param.kind == "gates"
            else (name,)
            for name, param in self.params.items()
        }

    @property
    def is_built_in(self) -> bool:
        """Whether this is a cell of torch.nn, which the kernels have compiled in."""
        return self.name in _built_in and _registry[self.name] == self

    # A copied layer must compute the same, even if its cell's name has been declared again.

    def __copy__(self) -> Cell:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        return self

    def __reduce__(self) -> tuple[Callable[..., Cell], tuple[Any, ...]]:
        """Pickle the name, what identifies the cell that is later found under it, and a class
        that carries the function to processes that cannot import it."""
        if self.is_built_in:
            return get, (self.name,)
        if self.noise:
            return operator.attrgetter("noisy"), (self._with_noise(False),)
        if self.made_by is not None:
            return self.made_by
        return _restore, tuple(saved(self))

    @functools.cached_property
    def _carrier(self) -> Carrier:
        return carrier_of(self)


class _Found(NamedTuple):
    """The draws of a cell's function, or why it failed. Dynamo can read the text, and no error."""

    draws: tuple[Draw, ...] = ()
    failure: str = ""
    error: Exception | None = None


class _Given:
    """A source of draws that hands out given numbers, in the order of the cell's draws."""

    def __init__(self, cell: Cell, numbers: Sequence[Tensor]) -> None:
        self.cell, self.rest = cell, list(zip(cell.draws, numbers, strict=True))

    def __call__(self, draw: Draw) -> Tensor:
        if failure := (found := self.cell._found_draws).failure:
            raise ValueError(
                f"cell {self.cell.name!r} draws random numbers, but a call of its function with "
                "tensors of shape [1, 2], which would find the places of its draws, fails: "
                f"{failure}. A draw has a number for each unit; drop gates before torch.cat"
            ) from (None if torch.compiler.is_compiling() else found.error)
        self.check(bool(self.rest) and self.rest[0][0] == draw)
        return self.rest.pop(0)[1]

    def check(self, same: bool) -> None:
        if not same:
            raise ValueError(
                f"cell {self.cell.name!r} draws other random numbers each time it is called; "
                "draws must be the same for every step"
            )


_registry: dict[str, Cell] = {}
_built_in: set[str] = set()
_published: dict[str, str] = {}


def cell(
    function: object = None,
    /,
    *,
    gates: str | Sequence[str] = (),
    states: str | Sequence[str] = (),
    name: str | None = None,
    inputs: str | Sequence[str] | None = None,
    recurrent: str | Sequence[str] | None = None,
    params: Mapping[str, str | Param] | None = None,
    initialize: Callable[..., object] | None = None,
) -> Callable[[Callable[..., Tensor | tuple[Tensor, ...]]], Cell]:
    """Declare a cell from a function of one time step.

    Numbers that the function reads from elsewhere (globals, closed-over variables, defaults) are
    constants of the cell: they are fixed when it is first used, and later changes have no effect.
    Learned values come through `u`, `v` and `p`.

    Args:
        gates: gate names, one letter each as a string (`"ifgo"`) or a sequence of identifiers,
            in the order of the weight blocks; at most `cells.MAX_GATES`.
        states: state names in the same form, at most `cells.MAX_STATES`; the first is recurrent
            and is the output.
        name: registry name; the function's own by default.
        inputs, recurrent: the gates that have rows in `weight_ih` and in `weight_hh`; all of them
            by default. The others have no entry in `u` or `v`. A layer has no Parameter without
            rows: with `recurrent=""` it has neither `weight_hh_l0` nor `bias_hh_l0`.
        params: learned parameters besides the weights of `u` and `v`, at most `cells.MAX_PARAMS`
            numbers per unit: for each name a `Param`, or its kind, "unit", "one" or "gates". The
            function gets them as one more argument, `p`, and a layer has them as Parameters
            `weight_<name>_l0` and so on.
        initialize: `initialize(u, v)`, or `initialize(u, v, p)` with `params`, called once for each
            layer, direction and head when a layer is made and by its `reset_parameters`, after
            torch's uniform values were written. `u.f.weight` [H, I] and `u.f.bias` [H] are the rows
            of a gate `f` in `weight_ih` and `bias_ih`, `v.f.weight` [H, H] and `v.f.bias` [H] those
            in `weight_hh` and `bias_hh`, and `p.a` is a parameter `a`; biases are None in a layer
            without. A gate has the rows with which it was declared. The function writes into them,
            under `no_grad`. With heads, `H` is the width of one.

    Raises:
        TypeError: if the decorated object or `initialize` is not callable, or if `cell` was not
            called itself.
        ValueError: if names repeat, are not identifiers or are too many, if `inputs` or `recurrent`
            name no gate, or if a gate is in neither of them, if the function cannot be
            called as `(u, v, *states)` or `(u, v, p, *states)`, or has no name, if `initialize`
            cannot be called, if a parameter is of no known kind or is named like a matrix of a
            layer, or if the name is a built-in cell's. A custom cell of the same name is replaced,
            as a function is when it is redefined; existing layers keep the cell they have. A name
            of a published cell then means the one declared here.

    Example:
        >>> import torch, fastrnn
        >>> @fastrnn.cell(gates="fn", states="h")
        ... def minimal_gated_unit(u, v, h):  # Zhou et al. 2016, arXiv:1603.09420
        ...     f = torch.sigmoid(u.f + v.f)
        ...     return (1 - f) * h + f * torch.tanh(u.n + f * v.n)
        >>> @fastrnn.cell(gates="h", states="h", params={"r": "unit"})
        ... def with_own_past(u, v, p, h):  # a learned number for each unit
        ...     return torch.tanh(u.h + v.h + p.r * h)
        >>> @fastrnn.cell(gates="rzn", states="h")
        ... def gru_reset_before(u, v, h):  # Cho et al. 2014, arXiv:1406.1078
        ...     r, z = torch.sigmoid(u.r + v.r), torch.sigmoid(u.z + v.z)
        ...     return (1 - z) * torch.tanh(u.n + v(r * h).n) + z * h
        >>> @fastrnn.cell(gates="zk", recurrent="k", states="h")
        ... def star(u, v, h):  # Turkoglu et al. 2019, arXiv:1911.11033
        ...     return torch.tanh(h + torch.sigmoid(u.k + v.k) * (torch.tanh(u.z) - h))
        >>> fastrnn.Recurrent(star, 4, 8).weight_hh_l0.shape  # of the gate k alone
        torch.Size([8, 8])
    """
    if function is not None:
        raise TypeError(
            "cell needs the gates and the states as arguments; write "
            '@fastrnn.cell(gates="fn", states="h") above the function'
        )

    def declare(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Cell:
        if not callable(function):
            raise TypeError(f"a cell is made from a function, got {type(function).__name__}")
        if params is not None and not isinstance(params, Mapping):
            raise TypeError(
                'params should be a dict of names and kinds, as {"scale": "one"}, got '
                f"{type(params).__name__}"
            )
        learned = {n: Param(p) if isinstance(p, str) else p for n, p in (params or {}).items()}
        own = name or _own_name(function)
        rows = [gates if some is None else some for some in (inputs, recurrent)]
        declared = Cell(
            own,
            tuple(gates),
            tuple(states),
            function,
            learned,
            initialize,
            inputs=tuple(rows[0]),
            recurrent=tuple(rows[1]),
        )
        check(declared)
        for side in ("inputs", "recurrent"):
            own_order = tuple(g for g in declared.gates if g in getattr(declared, side))
            object.__setattr__(declared, side, own_order)
        if declared.name in _built_in:
            raise ValueError(
                f"{declared.name!r} is a built-in cell; choose another name with cell(name=...)"
            )
        home = _published.get(declared.name)
        if home is None or home != getattr(function, "__module__", None):
            _registry[declared.name] = declared
        return declared

    return declare


def get(name: str) -> Cell:
    """The cell with this name: a built-in cell, one declared here, or else a published cell.

    Raises:
        ValueError: if there is none; the message lists the known names.
    """
    if (found := _registry.get(name)) is not None:
        return found
    if name in _published:
        return get_published(name)
    known = ", ".join(dict.fromkeys([*_registry, *_published]))
    raise ValueError(f"no cell named {name!r}; there are: {known}")


def names() -> list[str]:
    """Names of the built-in cells and of those declared since, in order of declaration. The
    published cells are not among them, because they are declared when they are first asked for."""
    return list(_registry)


def get_published(name: str) -> Cell:
    """The published cell with this name, also where another cell was declared under it."""
    found: Cell = getattr(importlib.import_module(_published[name]), name)
    return found


def publish(modules: Mapping[str, str]) -> None:
    """Say which modules declare the published cells, by name. Importing such a module leaves the
    names to the cells that a user declared under them."""
    _published.update(modules)


def seal() -> None:
    """Make the cells declared so far the built-in ones, whose names cannot be declared again."""
    _built_in.update(_registry)


def _own_name(function: Callable[..., Any]) -> str:
    own: str = getattr(function, "__name__", "<none>")
    if own.startswith("<"):
        what = "a lambda" if own == "<lambda>" else f"{type(function).__name__} objects"
        raise ValueError(f"{what} cannot name the cell; pass cell(name=...)")
    return own


_Carrier = Carrier  # the name in pickles of older versions


def _restore(*parts: Any) -> Cell:
    """The cell of a pickle, which names this function."""
    return restored(Saved(*parts), _registry, Cell)
