"""Prepacks the weights of layers once, for inference, instead of on every call.

A frozen module keeps a copy of its weights in the kernel's layout, which must follow every change
of its Parameters. Changes through the module (`load_state_dict`, `.to`, copies, pickles) prepack
the weights again; the kernel detects all other changes at the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastrnn import ops
from fastrnn.cells import Cell
from fastrnn.kernels.operands import Weights

__all__ = ["Freezable", "Frozen", "freeze", "unfreeze"]

_Module = TypeVar("_Module", bound=nn.Module)


class Frozen(NamedTuple):
    """The additional state of a frozen module."""

    layers: tuple[ops.Prepacked | None, ...]  # None for layers that the CPU kernel does not run
    trained: tuple[str, ...]  # parameters that required gradients before


class Freezable(nn.Module):
    """Base of layers and cells, whose weights can be prepacked once."""

    _frozen: Frozen | None = None

    def _cell(self) -> Cell:
        raise NotImplementedError

    def _weights(self) -> list[Weights]:
        """The weights of every layer, direction and head, as `functional.rnn` takes them."""
        raise NotImplementedError

    def _weight_names(self) -> list[str]:
        raise NotImplementedError

    def _freeze(self) -> None:
        parameters = {n: self._parameters[n] for n in self._weight_names()}
        trained = {n for n, p in parameters.items() if p is not None and p.requires_grad}
        if self._frozen is not None:
            trained.update(self._frozen.trained)
        scans = (2 if getattr(self, "bidirectional", False) else 1) * getattr(self, "heads", 1)
        weights = self._weights()
        with torch.no_grad():
            layers = tuple(
                ops.pack(self._cell(), weights[first : first + scans])
                for first in range(0, len(weights), scans)
            )
        self._frozen = Frozen(layers, tuple(sorted(trained)))
        for parameter in parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)

    def _unfreeze(self) -> None:
        if self._frozen is None:
            return
        for name in self._frozen.trained:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_()
        del self._frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._frozen is not None:
            self._freeze()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._frozen is not None:
            self._freeze()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._frozen is not None:
            state["_frozen"] = self._frozen._replace(layers=())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._frozen is not None:
            self._freeze()


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
    layers = _freezable_in(module)
    if not layers:
        raise ValueError(
            f"there is no fastrnn layer in this {type(module).__name__} to freeze; "
            "fastrnn.replace_(model) puts them in the place of torch.nn's"
        )
    for name, layer in layers:
        computed = [n for n in layer._weight_names() if n not in layer._parameters]
        if computed:
            raise ValueError(
                f"{computed[0]} of {name or 'the module'} is computed anew on every call, so it "
                "cannot be packed once: make it permanent first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
            )
    for _, layer in layers:
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
    """
    for _, layer in _freezable_in(module):
        layer._unfreeze()
    return module


def _freezable_in(module: nn.Module) -> list[tuple[str, Freezable]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module should be a torch.nn.Module, got: {type(module).__name__}")
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Freezable)]
