"""How cells are pickled and found again.

A pickle has the name of a cell, and what tells whether the cell found under that name is the same.
"""

from __future__ import annotations

import copyreg
import importlib
import operator
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrnn.cells.arguments import Param, kinds_of
from fastrnn.cells.digest import digest_of

if TYPE_CHECKING:
    from fastrnn.cells.declare import Cell

__all__ = ["Carrier", "Saved", "carrier_of", "restored", "saved"]


class Carrier(type):
    """Type of a class that holds a cell's function, for libraries that pickle functions by value.

    A function can be pickled by name only if the name leads to it, but the name of a decorated
    function leads to the cell. So a cell is reduced to its own name and such a class. pickle finds
    the type in copyreg's table, which replaces the class by None, so that only the name counts.
    cloudpickle and the packages that bundle it (Ray, joblib, Spark) treat classes before that
    table: they pickle a class with its contents if it cannot be imported by name (script,
    notebook, function), or if the user registered its module for that.
    """

    function: Callable[..., Any]
    # Carriers of older versions have none of these.
    params: Mapping[str, Param] = MappingProxyType({})
    initialize: Callable[..., object] | None = None
    inputs: tuple[str, ...] | None = None
    recurrent: tuple[str, ...] | None = None


def _reduce_to_none(carrier: Carrier) -> Any:
    return type(None), ()


copyreg.pickle(Carrier, _reduce_to_none)

_carried: weakref.WeakKeyDictionary[Carrier, weakref.ref[Cell]] = weakref.WeakKeyDictionary()


class Saved(NamedTuple):
    """What a pickle has of a cell. Those of older versions lack the last fields.

    Attributes:
        name, gates, states, inputs, recurrent: as in `Cell`.
        digest: of the function.
        module, qualname: where the function was defined, if it says so.
        carrier: a class with the function, in a pickle that holds functions by value.
        kinds: names and kinds of the parameters.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    digest: str
    module: str | None
    qualname: str | None
    carrier: Carrier | None = None
    kinds: tuple[tuple[str, str], ...] = ()
    inputs: tuple[str, ...] | None = None
    recurrent: tuple[str, ...] | None = None

    def is_of(self, found: Cell) -> bool:
        """Whether this was made from a cell that computes what `found` computes."""
        rows = self.inputs or self.gates, self.gates if self.recurrent is None else self.recurrent
        named = self.gates, self.states, self.kinds, *rows
        if named != (
            found.gates,
            found.states,
            kinds_of(found.params),
            found.inputs,
            found.recurrent,
        ):
            return False
        own = digest_of(found.function)
        # Another version of Python compiles the same source to different byte code.
        return own == self.digest or own.split()[0] != self.digest.split()[0]


def saved(cell: Cell) -> Saved:
    """What to pickle of a cell, with its carrier for libraries that pickle by value."""
    function = cell.function
    return Saved(
        cell.name,
        cell.gates,
        cell.states,
        digest_of(function),
        getattr(function, "__module__", None),
        getattr(function, "__qualname__", None),
        cell._carrier,
        kinds_of(cell.params),
        cell.inputs,
        cell.recurrent,
    )


def carrier_of(cell: Cell) -> Carrier:
    """A new carrier of a cell, which is to be the cell's attribute `_carrier`."""
    # This qualified name is importable wherever the cell is, since it names its attribute.
    name = f"{getattr(cell.function, '__qualname__', cell.name)}._carrier"
    module = getattr(cell.function, "__module__", None)
    body = {"function": staticmethod(cell.function), "params": dict(cell.params)}
    body |= {"inputs": cell.inputs, "recurrent": cell.recurrent}
    body |= {"__module__": module, "__qualname__": name}
    if cell.initialize is not None:
        body["initialize"] = staticmethod(cell.initialize)
    return _register(Carrier("_carrier", (), body), cell)


def restored(saved: Saved, registry: MutableMapping[str, Cell], make: type[Cell]) -> Cell:
    """The saved cell: from its carrier, this process's registry, or the module that declares it.

    Raises:
        ValueError: if there is none of that name, or if it differs; the message says where the
            saved one was declared.
    """
    if saved.carrier is not None:
        return _unpacked(saved, saved.carrier, registry, make)

    def same(found: object) -> bool:
        return isinstance(found, make) and saved.is_of(found)

    name, module, qualname = saved.name, saved.module, saved.qualname
    found: object = registry.get(name)
    failure = ""
    if not same(found) and module and qualname:
        try:
            found = operator.attrgetter(qualname)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            failure = f" ({error})"
        if not same(found):
            found = registry.get(name)
    if isinstance(found, make) and same(found):
        return found
    where = f"in module {module}, as {qualname}"
    if module in (None, "__main__", "__mp_main__"):
        where = (
            "in the script or session that saved it, which cannot be imported (cloudpickle takes "
            "such a cell along)"
        )
    if found is None:
        raise ValueError(
            f"no cell named {name!r} is declared here{failure}. It was declared {where}: declare "
            "it before loading, preferably in a module that can be imported"
        )
    raise ValueError(
        f"the cell {name!r} declared here is not the one that was saved: its gates, their rows, "
        f"its states, parameters or function differ. That one was declared {where}: load where it "
        "is declared as it was; or, if the change is intended, create the layer again and load the "
        "saved state_dict"
    )


def _unpacked(
    saved: Saved, carrier: Carrier, registry: MutableMapping[str, Cell], make: type[Cell]
) -> Cell:
    """The cell of a carrier; the same carrier always gives the same cell."""
    reference = _carried.get(carrier)
    cell = reference() if reference else None
    if cell is None:
        rows: Any = {"inputs": carrier.inputs, "recurrent": carrier.recurrent}
        names, learned = (saved.name, saved.gates, saved.states), carrier.params
        cell = make(*names, carrier.function, learned, carrier.initialize, **rows)
        vars(cell)["_carrier"] = _register(carrier, cell)
        # A cell declared here under that name keeps it: this one may differ.
        registry.setdefault(saved.name, cell)
    return cell


def _register(carrier: Carrier, cell: Cell) -> Carrier:
    _carried[carrier] = weakref.ref(cell)  # weak, since the cell holds its carrier
    return carrier
