"""Layers whose weights are prepacked once, for inference, instead of on every call.

What a module keeps is a copy in the kernel's layout, made from its Parameters. So every way that
weights change has an answer here: what goes through the module (`load_state_dict`, `.to`, copies,
pickles) packs them again, and what does not is found out by the kernel at the next call.
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
    """What a frozen module remembers."""

    layers: tuple[ops.Prepacked | None, ...]  # None where another kernel than the CPU's will run
    trained: tuple[str, ...]  # parameters that required gradients before


class Freezable(nn.Module):
    """What layers and cells share: weights that can be packed for good."""

    _frozen: Frozen | None = None

    def _cell(self) -> Cell:
        raise NotImplementedError

    def _weights(self) -> list[Weights]:
        """Those of every layer, direction and head, as `functional.rnn` takes them."""
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
        for each in parameters.values():
            if each is not None:
                each.requires_grad_(False)

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
    """Pack the weights of every fastrnn layer and cell in `module`, for inference. In place.

    Calls then skip the packing, which for short sequences takes most of the time; results are
    those of before. Parameters of these layers no longer require gradients, and there is no
    derivative by the input either. The prepacked weights are a copy: about as much memory again.

    `load_state_dict`, `.to`, `copy.deepcopy` and pickling pack anew what they change. Weights that
    are changed in any other way (in place, by an optimizer, by assigning a Parameter) make the
    next call raise. What is written past torch's count of changes (through `.data`, NumPy, DLPack)
    the next call finds in biases of up to 16 KiB and weights of up to 4 KiB. Larger ones are read
    block by block, all of them within 64 rows (time steps of all sequences), so that looking stays
    cheap.

    Where the CPU kernel does not run (other devices, autocast, `torch.func`, a kernel forced by
    name), the layer works as before, from its Parameters.

    Args:
        module: a layer, or a model that has some inside.

    Returns:
        `module`.

    Raises:
        TypeError: if `module` is no `nn.Module`.
        ValueError: if there is no fastrnn layer inside, or the weights of one are computed anew on
            every call (parametrized, pruned).
        RuntimeError: from a call of the frozen module, when weights were changed after freezing,
            or when input or states require gradients while gradients are recorded.

    Example:
        >>> import torch, fastrnn
        >>> gru = fastrnn.freeze(fastrnn.GRU(8, 16))
        >>> output, h_n = gru(torch.randn(5, 3, 8))
    """
    found = _inside(module)
    if not found:
        raise ValueError(
            f"there is no fastrnn layer in this {type(module).__name__} to freeze; "
            "fastrnn.replace_(model) puts them in the place of torch.nn's"
        )
    for name, each in found:
        computed = [n for n in each._weight_names() if n not in each._parameters]
        if computed:
            raise ValueError(
                f"{computed[0]} of {name or 'the module'} is computed anew on every call, so it "
                "cannot be packed once: make it permanent first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
            )
    for _, each in found:
        each._freeze()
    return module


def unfreeze(module: _Module) -> _Module:
    """Undo `freeze`, in place: drop the prepacked weights, and train again what was trained before.

    Returns:
        `module`. Layers that are not frozen stay as they are.

    Raises:
        TypeError: if `module` is no `nn.Module`.
    """
    for _, each in _inside(module):
        each._unfreeze()
    return module


def _inside(module: nn.Module) -> list[tuple[str, Freezable]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module should be a torch.nn.Module, got: {type(module).__name__}")
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Freezable)]
