"""Records what a function does with tensors as a graph of torch's basic operations.

torch's `make_fx` does so, too, but its first call imports torch's compiler, which takes longer than
all else that deriving a cell does.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["ValueRead", "record"]


class ValueRead(RuntimeError):
    """The function read the value of a tensor, which differs from call to call."""


def record(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    called: Callable[[], str] = str,
) -> fx.Graph:
    """The graph of `function(*inputs)`: its operations below autograd and torch.func, decomposed.

    `meta["val"]` of a node is its result in this call, `meta["called"]` what `called` gave then:
    the function of torch that the operation is a part of. A tensor from elsewhere is a `get_attr`,
    with the value that it had when it was read.

    Raises:
        ValueRead: if the function reads the value of a tensor that follows from its inputs.
    """
    recorder = _Recorder(called)
    for number, tensor in enumerate(inputs):
        recorder.keep(tensor, recorder.graph.placeholder(f"x{number}"))
    with recorder:
        results = function(*inputs)
    recorder.graph.output(tuple(map(recorder.node_of, results)))
    return recorder.graph


class _Recorder(TorchDispatchMode):
    def __init__(self, called: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called = called
        self.graph = fx.Graph()
        # By identity. The tensors stay alive, so that no other one has the identity of one of them.
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self.constants: set[int] = set()  # those that follow from no input
        self.decompositions = _decompositions()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks this. True would import its compiler, to tell that to leave the mode alone."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        simpler = self.decompositions.get(func)
        if simpler is None and not func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU):
            simpler = func.decompose
        if simpler is not None:
            with self:  # once more, for what it is made of
                result = simpler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        constant = bool(tensors) and all(
            id(t) in self.constants or id(t) not in self.nodes for t in tensors
        )
        if torch.Tag.data_dependent_output in func.tags:
            if not constant:
                raise ValueRead(str(func))
            return func(*args, **kwargs)
        recorded = tree_map_only(Tensor, self.node_of, (args, kwargs))
        node = self.graph.call_function(func, *recorded)
        result = func(*args, **kwargs)
        self.keep(result, node)
        results = set(map(id, tree_flatten(result)[0]))
        if constant and torch.Tag.nondeterministic_seeded not in func.tags:
            self.constants |= results
        else:  # an operation in place may have made it follow from an input
            self.constants -= results
        return result

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; a tensor from elsewhere gets one."""
        if id(tensor) not in self.nodes:
            node = self.graph.create_node("get_attr", "elsewhere")
            self.keep(tensor, node)
            node.meta["val"] = tensor.detach().clone()
            self.constants.add(id(tensor))
        return self.nodes[id(tensor)][1]

    def keep(self, value: Any, node: fx.Node) -> None:
        """Note that a node has this result, which has parts if it is a sequence."""
        node.meta.update(val=value, called=self.called())
        if isinstance(value, Tensor):
            self.nodes[id(value)] = value, node
        elif isinstance(value, tuple | list):
            for place, part in enumerate(value):
                self.keep(part, self.graph.call_function(operator.getitem, (node, place)))


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    activations = [aten.gelu, aten.elu, aten.leaky_relu, aten.hardtanh]
    return dict(core_aten_decompositions().items()) | get_decompositions(activations)
