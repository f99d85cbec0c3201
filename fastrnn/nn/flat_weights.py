"""The list `_flat_weights` of a layer, which torch.nn keeps and users write into.

torch.nn computes with the entries of this list, for instance with weights after dropout or with
those of another layer. Our layers read weights by name and create the list only when a user asks
for it. As in torch.nn, entries that a user writes count until one of the layer's own weights is
replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["FlatWeights", "written_entries"]


class Written(NamedTuple):
    """The list, and the layer's own weights when it was created."""

    entries: list[Tensor | None]
    own: list[Tensor | None]


class FlatWeights(nn.RNNBase):
    """An `RNNBase` that keeps a list of its weights only after a user asked for it."""

    _written: Written | None = None  # the default for layers converted from torch.nn

    def _own_weights(self) -> list[Tensor | None]:
        return [getattr(self, n, None) for n in self._flat_weights_names]

    def _written_entries(self) -> Mapping[str, Any]:
        """The entries of the list that are not the layer's own weights, by name."""
        if self._written is None:
            return {}
        entries, own = self._written
        if not all(map(is_, self._own_weights(), own)):
            return {}
        names = self._flat_weights_names
        if len(entries) != len(names):
            raise RuntimeError(
                f"_flat_weights should hold {len(names)} weights ({', '.join(names)}), "
                f"got {len(entries)}"
            )
        triples = zip(names, entries, own, strict=True)
        return {name: entry for name, entry, weight in triples if entry is not weight}

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        own = self._own_weights()
        if self._written is None or not all(map(is_, own, self._written.own)):
            self._written = Written(own.copy(), own)
        return self._written.entries

    @_flat_weights.setter
    def _flat_weights(self, values: list[Tensor | None]) -> None:
        self._written = Written(values, self._own_weights())

    # RNNBase's method would write each new Parameter into the list.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_written", None)

    def _weights_have_changed(self) -> bool:
        return False

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: no kernel here needs the weights in one buffer."""

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)  # type: ignore[no-untyped-call]
        self.__dict__.pop("_flat_weights", None)
        self._flat_weight_refs = []


def written_entries(layer: nn.RNNBase) -> Mapping[str, Tensor | None]:
    """Entries of `_flat_weights` that a user wrote, by name, for our layers and torch.nn's."""
    if isinstance(layer, FlatWeights):
        return layer._written_entries()
    # A parametrized weight is not read: computing it may change its state.
    computed = getattr(layer, "parametrizations", {})
    names = layer._flat_weights_names
    plain = {k: getattr(layer, n, None) for k, n in enumerate(names) if n not in computed}
    for k, own in plain.items():
        known = layer._flat_weight_refs[k]
        if own is not None and (known is None or known() is not own):
            return {}
    entries = layer._flat_weights
    return {names[k]: entries[k] for k, own in plain.items() if entries[k] is not own}
