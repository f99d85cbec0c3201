"""Initial values of recurrent layers, gate by gate.

The functions take a layer or a cell of fastrnn or torch.nn, write into its weights in place, and
return it. They see every layer, direction and head of it. A parametrized weight is assigned, so its
parametrization needs a `right_inverse`. A custom cell can have such values from the start: see
`fastrnn.cell(initialize=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastrnn import cells
from fastrnn.cells import Cell, Gates
from fastrnn.kernels.operands import heads_of, named
from fastrnn.nn.base import CELL_OF_MODE
from fastrnn.nn.freeze import Freezable, precision_of
from fastrnn.nn.initial import Rows, gates_of

__all__ = ["chrono_", "forget_gate_bias_", "identity_", "orthogonal_", "xavier_uniform_"]

_Module = TypeVar("_Module", bound=nn.Module)


def orthogonal_(module: _Module, gain: float = 1.0) -> _Module:
    """Make the recurrent matrix of each gate orthogonal, so that it has the norm of the state.

    `torch.nn.init.orthogonal_(layer.weight_hh_l0)` makes the whole of `weight_hh` [G*H, H]
    orthogonal, and with it no gate's block.

    Args:
        module: a layer or a cell.
        gain: a factor of each block. With a projection, the rows of a block [H, Q] are not
            orthogonal, but its columns are.

    Raises:
        TypeError: if `module` is neither layer nor cell.

    Saxe et al. 2014, arXiv:1312.6120.
    """
    from fastrnn.cells.published import fill  # published modules are loaded when they are used

    def write(cell: Cell, u: Gates, v: Gates) -> None:
        for name in cell.recurrent:
            fill.orthogonal(_rows(v, name).weight, gain)

    return _write(module, write)


def xavier_uniform_(module: _Module, gain: float = 1.0) -> _Module:
    """Fill the input matrix [H, I] of each gate from U(-a, a), `a = gain·√(6 / (I + H))`.

    `torch.nn.init.xavier_uniform_(layer.weight_ih_l0)` counts the rows of all gates, G*H, and so
    draws smaller values.

    Args:
        module: a layer or a cell.
        gain: a factor of the values.

    Raises:
        TypeError: if `module` is neither layer nor cell.

    Glorot & Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html.
    """

    def write(cell: Cell, u: Gates, v: Gates) -> None:
        for name in cell.inputs:
            nn.init.xavier_uniform_(_rows(u, name).weight, gain)

    return _write(module, write)


def forget_gate_bias_(module: _Module, value: float = 1.0, gate: str = "f") -> _Module:
    """Set the bias of the forget gate, which is the sum `b_ih + b_hh`, to `value`.

    A gate with a larger bias forgets less in the beginning, so that gradients reach back further.

    Args:
        module: an LSTM, or another layer or cell with such a gate and with biases.
        value: the sum; all of it is in `b_ih`, and the rows of `b_hh` are 0.
        gate: the name of the gate, `"z"` for a GRU, whose update gate keeps the state. Where this
            gate is open, the cell must keep its state: that of `mgu` has the opposite sense.

    Raises:
        TypeError: if `module` is neither layer nor cell.
        ValueError: if it has no gate of that name, or one that does not keep the state, or no
            biases.

    Example:
        >>> import torch, fastrnn
        >>> layer = fastrnn.init.forget_gate_bias_(torch.nn.LSTM(3, 2, num_layers=2), 1.0)
        >>> (layer.bias_ih_l1 + layer.bias_hh_l1)[2:4].tolist()  # the gates are i, f, g, o
        [1.0, 1.0]

    Gers et al. 2000, doi:10.1162/089976600300015015; Jozefowicz et al. 2015,
    https://proceedings.mlr.press/v37/jozefowicz15.html.
    """
    from fastrnn.cells.published import fill

    def write(cell: Cell, u: Gates, v: Gates) -> None:
        fill.bias(*_of_gate(cell, u, v, gate), value)

    _check_forget_gate(module, gate)
    return _write(module, write)


def chrono_(module: _Module, longest: float) -> _Module:
    """Draw the biases of the gates so that memories last between 1 and `longest` steps.

    The bias of the forget gate is log(U(1, longest - 1)), a number for each unit, and that of the
    input gate its negative. A GRU has the first in its update gate `z`, which keeps the state. As
    in `forget_gate_bias_`, `b_ih` has the value and `b_hh` is 0. Other biases do not change.

    Args:
        module: an LSTM or GRU, or another layer or cell with a gate `f`, with biases.
        longest: the longest dependency in steps, more than 2.

    Raises:
        TypeError: if `module` is neither layer nor cell.
        ValueError: if `longest` is at most 2, or as in `forget_gate_bias_`.

    Tallec & Ollivier 2018, arXiv:1804.11188.
    """
    from fastrnn.cells.published import fill

    keeping = "z" if _cell_of(module) == cells.gru else "f"

    def write(cell: Cell, u: Gates, v: Gates) -> None:
        forget = _of_gate(cell, u, v, keeping)
        fill.chrono(*forget, longest)
        if "i" in cell.gates:
            first, second = _of_gate(cell, u, v, "i")
            fill.bias(first, second, 0)
            cast(Tensor, first.bias).sub_(cast(Tensor, forget[0].bias))

    fill.check_longest(longest)
    _check_forget_gate(module, keeping)
    return _write(module, write)


def identity_(module: _Module) -> _Module:
    """Begin as the IRNN does: `weight_hh` is the identity, the biases are 0, and `weight_ih` is
    from N(0, 0.001²).

    With `relu` and without input, the state then stays as it is.

    Args:
        module: an `RNN` or `RNNCell`, or a `Recurrent` of a cell with one gate.

    Raises:
        TypeError: if `module` is neither layer nor cell.
        ValueError: if its cell has several gates, or no recurrent rows.

    Le et al. 2015, arXiv:1504.00941.
    """
    irnn, cell = cells.get("irnn"), _cell_of(module)
    if not cell.recurrent:
        raise ValueError(f"identity_ is for weight_hh, and cell {cell.name!r} has none")
    if len(cell.gates) > 1:
        raise ValueError(
            f"identity_ is for a cell with one gate, and {type(module).__name__} has "
            f"{', '.join(cell.gates)}; orthogonal_ is for any"
        )

    def write(cell: Cell, u: Gates, v: Gates) -> None:
        (name,) = cell.gates
        rows: Any = [[_rows(gates, name)] for gates in (u, v)]
        cast(Callable[..., None], irnn.initialize)(*(Gates(irnn, own) for own in rows))

    return _write(module, write)


def _rows(gates: Gates, name: str) -> Rows:
    return cast(Rows, getattr(gates, name))


def _of_gate(cell: Cell, u: Gates, v: Gates, name: str) -> tuple[Rows, Rows | None]:
    """The rows of a gate: those that have the sum of its biases, and the others, if it has both."""
    own = [_rows(g, name) for g, names in ((u, cell.inputs), (v, cell.recurrent)) if name in names]
    return own[0], own[1] if len(own) > 1 else None


def _cell_of(module: nn.Module) -> Cell:
    if isinstance(module, Freezable):
        if precision_of(module, stored=True) is not None:
            raise RuntimeError(
                "this module holds its matrices quantised: call fastrnn.dequantize_(module) first"
            )
        cell = module._cell()
        while cell.made_by is not None:  # the gates mean what they mean in the cell it is made of
            cell = cell.made_by[1][0]
        return cell
    if isinstance(module, nn.RNNBase):
        return CELL_OF_MODE[module.mode]
    if isinstance(module, nn.RNNCell):
        return CELL_OF_MODE[f"RNN_{module.nonlinearity.upper()}"]
    if isinstance(module, nn.LSTMCell):
        return cells.lstm
    if isinstance(module, nn.GRUCell):
        return cells.gru
    raise TypeError(
        f"expected a recurrent layer or cell of fastrnn or torch.nn, got {type(module).__name__}; "
        "for those of a model: for module in model.modules(): if isinstance(module, "
        "torch.nn.RNNBase): ..."
    )


def _check_forget_gate(module: nn.Module, gate: str) -> None:
    cell, kind = _cell_of(module), type(module).__name__
    if gate not in cell.gates:
        hint = "; a GRU's update gate is gate='z'" if cell == cells.gru else ""
        raise ValueError(
            f"{kind} has no gate {gate!r}: its gates are {', '.join(cell.gates)}{hint}"
        )
    if not module.bias:
        raise ValueError(f"this {kind} has no biases: it was made with bias=False")
    closed, opened = (_carried(cell, gate, value) for value in (-10.0, 10.0))
    if not abs(opened - 1) < 0.1 or closed > opened:
        raise ValueError(
            f"gate {gate!r} of cell {cell.name!r} is no forget gate: the derivative of a state to "
            f"itself a step before should be 1 where the gate is open, and is {opened:.2g}"
            f" ({closed:.2g} where it is closed)"
        )


def _carried(cell: Cell, gate: str, value: float) -> float:
    """The largest derivative of a state to the same state before, at 0, for a value of one gate."""
    zero = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
    given = torch.full_like(zero, value)
    u = [given if name == gate else zero for name in cell.inputs]
    own = gate not in cell.inputs
    v = [given if own and name == gate else zero for name in cell.recurrent]
    with torch.enable_grad():
        before = [torch.zeros_like(zero).requires_grad_() for _ in cell.states]
        after = cell.step(u, v, before, [zero[0]] * len(cell.params))
        pairs = [(new, old) for new, old in zip(after, before, strict=True) if new.requires_grad]
        found = [torch.autograd.grad(*pair, retain_graph=True, allow_unused=True) for pair in pairs]
    return max((d.abs().item() for (d,) in found if d is not None), default=0.0)


def _write(module: _Module, write: Callable[[Cell, Gates, Gates], None]) -> _Module:
    """Call `write` for each layer, direction and head with the arguments of a cell's `initialize`.
    Parametrized weights are copies there, and are assigned after."""
    cell = _cell_of(module)
    every: list[list[str]] = [["weight_ih", "weight_hh", "bias_ih", "bias_hh"]]
    if isinstance(module, nn.RNNBase):
        every = module._all_weights
    with torch.no_grad():
        for names in every:
            tensors = {name: getattr(module, name) for name in names}
            computed = [name for name in names if parametrize.is_parametrized(module, name)]
            tensors.update({name: tensors[name].clone() for name in computed})
            count = getattr(module, "heads", 1)
            weights = named(cell, [t for t in tensors.values() if t is not None], count)
            heads = heads_of(weights) if count > 1 else [weights]
            for head in heads:
                write(cell, *gates_of(cell, head))
            for name in computed:
                setattr(module, name, tensors[name])
    return module
