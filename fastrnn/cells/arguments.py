"""The arguments of a cell's function, and what a parameter is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fastrnn.cells.declare import Cell

__all__ = ["KINDS", "Gates", "Param", "Params", "Projection", "as_written", "kinds_of"]

KINDS = ("unit", "one", "gates")


@dataclass(frozen=True)
class Param:
    """A learned parameter of a cell.

    Attributes:
        kind: "unit" for one number per hidden unit, [H]; "one" for one number in all, [1]; "gates"
            for one per gate and hidden unit, [G*H], as the gain of a norm over all gates.
        init: the number it begins with, or a function that fills the tensor in place, as those of
            `torch.nn.init`; None for torch's uniform distribution within 1/sqrt(H), as for weights.
    """

    kind: str = "unit"
    init: float | Callable[[Tensor], Any] | None = None

    def size(self, hidden: int, gates: int) -> int:
        """Numbers in a layer of `hidden` units whose cell has so many gates."""
        return {"unit": hidden, "one": 1, "gates": gates * hidden}[self.kind]

    def fill(self, tensor: Tensor) -> None:
        """Fill a tensor as `init` says, under `no_grad`; it stays as it is if that is None."""
        if callable(self.init):
            result = self.init(tensor)
            if isinstance(result, Tensor) and result.data_ptr() != tensor.data_ptr():
                raise TypeError(
                    f"init of a fastrnn.Param should fill the tensor in place, but {self.init!r} "
                    "returned another one"
                )
        elif self.init is not None:
            tensor.fill_(self.init)


def kinds_of(params: Mapping[str, Param]) -> tuple[tuple[str, str], ...]:
    """Names and kinds of parameters."""
    return tuple((name, param.kind) for name, param in params.items())


class _Named:
    """An argument of a cell's function: tensors as attributes, each looked up when it is read."""

    _kind = ""

    def __init__(self, cell: Cell, names: Sequence[str], values: Sequence[Tensor]) -> None:
        self.__cell, self.__names, self.__values = cell, names, values

    def __getattr__(self, name: str) -> Tensor:
        # On a half-made object, `self.__cell` would call this method again without end.
        mine = vars(self)
        names = mine.get("_Named__names", ())
        if name in names:
            value: Tensor = mine["_Named__values"][names.index(name)]
            setattr(self, name, value)
            return value
        cell = mine.get("_Named__cell")
        if cell and (lacks := self._lacks(cell, name)):
            raise AttributeError(lacks)
        raise AttributeError(
            f"cell {cell.name!r} has no {self._kind} {name!r}; its {self._kind}s are: "
            + ", ".join(names)
            if cell
            else name
        )

    def _lacks(self, cell: Cell, name: str) -> str:
        """Why a cell that has something of this name has none here."""
        return ""


class Gates(_Named):
    """The argument `u` of a cell's function: one tensor per gate with input rows, as attributes."""

    _kind = "gate"

    def __init__(self, cell: Cell, values: Sequence[Tensor]) -> None:
        super().__init__(cell, cell.inputs, values)

    def _lacks(self, cell: Cell, name: str) -> str:
        return _without_rows(cell, name, "u", "input", "inputs")


class Projection(Gates):
    """The argument `v` of a cell's function: one tensor per gate with recurrent rows, as
    attributes. `v(x)` is the same for another value than the state: the recurrent weights times
    x [..., H], with their bias."""

    def __init__(
        self,
        cell: Cell,
        values: Sequence[Tensor],
        apply: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        _Named.__init__(self, cell, cell.recurrent, values)
        self.__cell, self.__apply = cell, apply

    def _lacks(self, cell: Cell, name: str) -> str:
        return _without_rows(cell, name, "v", "recurrent", "recurrent")

    def __call__(self, x: Tensor) -> Projection:
        cell, apply = self.__cell, self.__apply
        if apply is None:
            raise TypeError(f"cell {cell.name!r} calls v(x), which needs the recurrent weights")
        return Projection(cell, apply(x), apply)


def _without_rows(cell: Cell, name: str, argument: str, rows: str, keyword: str) -> str:
    if name not in cell.gates:
        return ""
    declared = as_written(getattr(cell, keyword))
    return (
        f"cell {cell.name!r} reads {argument}.{name}, but its gate {name!r} has no {rows} rows: it "
        f"was declared with {keyword}={declared}; add {name!r} there, or do without "
        f"{argument}.{name}"
    )


def as_written(names: Sequence[str]) -> str:
    """Names of gates as they stand in `cell(...)`: letters in a string, longer names in a tuple."""
    short = all(len(name) == 1 for name in names)
    return repr("".join(names) if short else tuple(names)).replace("'", '"')


class Params(_Named):
    """The argument `p` of a cell's function: one tensor per learned parameter, as attributes."""

    _kind = "parameter"

    def __init__(self, cell: Cell, values: Sequence[Tensor]) -> None:
        super().__init__(cell, tuple(cell.params), values)
