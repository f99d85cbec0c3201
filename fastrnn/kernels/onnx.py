"""The scan as `torch.onnx.export(dynamo=True)` records it: standard nodes of ONNX.

Built-in cells become `LSTM`, `GRU` and `RNN`. Everything that these nodes lack (custom cells,
resets, a projection, the states after every step, float64) becomes a `Scan` over the cell's
operations. Neither depends on the number of steps or sequences that the model is exported with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.cells import Cell
from fastrnn.kernels import reference
from fastrnn.kernels.operands import Operands

__all__ = ["Padding", "is_recording", "padding", "scan"]


class _Node(NamedTuple):
    """ONNX's node for a built-in cell.

    Attributes:
        name: of the node.
        gates: places of its gates among torch's.
        attributes: besides the sizes; lists have an entry for each direction.
    """

    name: str
    gates: tuple[int, ...]
    attributes: dict[str, Any]


_NODES = {
    "rnn_tanh": _Node("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": _Node("RNN", (0,), {"activations": ["Relu"]}),
    "lstm": _Node("LSTM", (0, 3, 1, 2), {}),
    "gru": _Node("GRU", (1, 0, 2), {"linear_before_reset": 1}),
}
# ONNX has no bfloat16 for these nodes, and ONNX Runtime no float64.
_DTYPES = (torch.float32, torch.float16)
_VERSION = 14  # the opset that gave these nodes their present form


def is_recording() -> bool:
    """Whether this call is recorded for ONNX by torch.export."""
    return torch.compiler.is_exporting() and _in_onnx_export()


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# torch.export(strict=True), which torch.onnx.export tries second, takes torch's function for False.
# This is what torch.compiler.assume_constant_result says of a function, without its import of
# torch._dynamo.
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Padding(NamedTuple):
    """How packed rows lie in padded ones.

    Attributes:
        lengths: [B], in the order of the packed rows.
        rows: [T, B], the row of each sequence at each step; any row past its end.
        places: [R], the place of each row in the [T*B] padded ones.
    """

    lengths: Tensor
    rows: Tensor
    places: Tensor

    def pad(self, data: Tensor) -> Tensor:
        """[T, B, *] from packed rows [R, *], with any rows past the ends."""
        return data[self.rows]

    def pack(self, padded: Tensor) -> Tensor:
        """The packed rows [R, *] of [T, B, *]."""
        return padded.flatten(0, 1)[self.places]


def padding(
    data: Tensor, batch_sizes: Tensor, order: Tensor | None, state: Tensor | None = None
) -> Padding:
    """The padding of a `PackedSequence` that a recorded program takes as its input. `order` [B] or
    a state [L, B, *] gives the number of sequences; else it is read from `batch_sizes`.

    Raises:
        NotImplementedError: if the program packs the sequences itself.
    """
    # torch's packing has no translation to ONNX, and in torch.export its results have wrong shapes
    # and dtypes.
    if batch_sizes.is_floating_point():
        raise NotImplementedError(
            "torch.onnx.export translates no pack_padded_sequence; give the layer the padded input "
            "and lengths= instead, and leave out pad_packed_sequence"
        )
    batch: Any
    if order is not None:
        batch = order.size(0)
    elif state is not None:
        batch = state.size(1)
    else:
        batch = batch_sizes[0].item()  # int() would ask for its value
        torch._check(batch > 0)
    batch_sizes = batch_sizes.to(data.device)
    ends = batch_sizes.cumsum(0)
    sequence = torch.arange(batch, device=data.device)
    rows = (ends - batch_sizes).unsqueeze(-1) + sequence
    row = torch.arange(data.size(0), device=data.device)
    step = (ends.unsqueeze(-1) <= row).sum(0)
    return Padding(
        lengths=(batch_sizes.unsqueeze(-1) > sequence).sum(0),
        rows=rows.clamp(max=data.size(0) - 1),
        places=step * batch + row - (ends - batch_sizes)[step],
    )


def scan(cell: Cell, operands: Operands, steps: bool) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The results of `ops.run`, recorded as nodes of ONNX.

    Raises:
        NotImplementedError: for packed input, which layers pad, and for cells that draw random
            numbers.
    """
    if operands.batch_sizes is not None:
        raise NotImplementedError(
            "ONNX has no packed sequences; pad the input and give the layer lengths= instead"
        )
    if operands.noise is not None:
        raise NotImplementedError(
            "the random numbers of training are not exported to ONNX; call eval() on the model"
        )
    if operands.x.dim() == 2:  # one step
        return *reference.scan(cell, operands), None
    lacking = steps or operands.w_hr or operands.resets is not None
    if lacking or operands.x.dtype not in _DTYPES or not cell.is_built_in:
        return _as_scans(cell, operands, steps)
    reverse = [bool(operands.reverse >> p & 1) for p in range(len(operands.w_hh))]
    groups = [[0, 1]] if reverse == [False, True] else [[p] for p in range(len(reverse))]
    made = [_as_node(_NODES[cell.name], operands, group, reverse[group[0]]) for group in groups]
    y = torch.cat([y for y, _ in made], -1)
    return y, [torch.cat(states) for states in zip(*(s for _, s in made), strict=True)], None


def _as_node(
    node: _Node, operands: Operands, group: Sequence[int], reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """Recurrences in one direction, or in both, as one node."""
    x, directions = operands.x, len(group)
    hidden = operands.w_hh[0].size(1)
    steps, batch = x.size(0), x.size(1)

    def ordered(weights: Sequence[Tensor]) -> Tensor:
        """[directions, G*H, *], with the gates in ONNX's order."""
        each = [weights[p].unflatten(0, (len(node.gates), hidden)) for p in group]
        return torch.stack([torch.cat([w[g] for g in node.gates]) for w in each])

    bias = None
    if operands.b_ih:
        bias = torch.cat([ordered(operands.b_ih), ordered(operands.b_hh)], 1)
    lengths = None if operands.lengths is None else operands.lengths.to(torch.int32)
    attributes = {
        name: value * directions if isinstance(value, list) else value
        for name, value in node.attributes.items()
    }
    attributes["hidden_size"] = hidden
    attributes["direction"] = (
        "bidirectional" if directions > 1 else "reverse" if reverse else "forward"
    )
    states = 2 if node.name == "LSTM" else 1
    before = [s[group[0] : group[-1] + 1] for s in operands.s0]
    after = (directions, batch, hidden)
    y, *last = torch.onnx.ops.symbolic_multi_out(
        node.name,
        [
            x,
            ordered(operands.w_ih),
            ordered(operands.w_hh),
            bias,
            lengths,
            *before,
        ],
        attributes,
        dtypes=[x.dtype] * (1 + states),
        shapes=[(steps, directions, batch, hidden), *[after] * states],
        version=_VERSION,
    )
    if operands.lengths is not None and operands.s0:
        # ONNX Runtime gives zeros for sequences without steps.
        has_steps = (operands.lengths > 0).unsqueeze(-1)
        last = [torch.where(has_steps, s, b) for s, b in zip(last, before, strict=True)]
    y = y.squeeze(1) if directions == 1 else y.transpose(1, 2).flatten(2)
    return y, last


def _as_scans(
    cell: Cell, operands: Operands, steps: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Every recurrence as a `Scan`."""
    made = [_as_scan(cell, operands, p) for p in range(len(operands.w_hh))]
    y = torch.cat([every[0] for every, _ in made], -1)
    last = [torch.stack(states) for states in zip(*(s for _, s in made), strict=True)]
    if not steps:
        return y, last, None
    each = [torch.stack(every[1:], -2).flatten(0, 1) for every, _ in made]
    return y, last, torch.stack(each, 1)


def _as_scan(cell: Cell, operands: Operands, p: int) -> tuple[list[Tensor], list[Tensor]]:
    """The states after every step, [T, B, *], with zeros past the end of a sequence, and the last
    states, of recurrence `p`."""
    x, w_hh = operands.x, operands.w_hh[p]
    b_ih = operands.b_ih[p] if operands.b_ih else None
    hidden, recurrent = cell.hidden_size(operands.w_ih[p]), w_hh.size(1)
    backward = bool(operands.reverse >> p & 1)
    widths = [recurrent] + [hidden] * (len(cell.states) - 1)
    if operands.s0:
        s0 = [s[p].clone() for s in operands.s0]
    else:
        s0 = [x.new_zeros(x.size(1), width) for width in widths]
    alive, cut = _flags(operands, backward)
    has_alive, has_cut = alive is not None, cut is not None
    over = [F.linear(x, operands.w_ih[p], b_ih), *(f for f in (alive, cut) if f is not None)]
    if backward:
        over = [each.flip(0) for each in over]

    # A body reads nothing from outside, so the weights of a step are arguments as well.
    recurs = operands.w_hh if cell.recurrent else (), operands.b_hh if cell.recurrent else ()
    weights = [group[p] for group in (*recurs, operands.w_hr) if group]
    # Copies, because what a body is given may share no memory.
    weights += [*(s[p].clone() for s in operands.reset_states), *operands.params_of(p)]
    given = *(bool(group) for group in (*recurs, operands.w_hr)), len(operands.reset_states)
    counts = len(s0), len(over), *given
    ends = list(itertools.accumulate(counts))

    def step(*every: Tensor) -> list[Tensor]:
        states, at, w_hh, b_hh, w_hr, begins, params = (
            every[a:b] for a, b in zip([0, *ends], [*ends, None], strict=True)
        )
        before = states
        if has_cut:
            instead: Any = begins or [0] * len(states)
            pairs = zip(instead, states, strict=True)
            before = tuple(torch.where(at[-1], begin, s) for begin, s in pairs)

        def apply(h: Tensor) -> Sequence[Tensor]:
            if not w_hh:
                return ()
            return F.linear(h, w_hh[0], b_hh[0] if b_hh else None).split(hidden, -1)

        u, v = at[0].split(hidden, -1), apply(before[0])
        after = _next(cell, u, v, before, params, apply)
        after = [a.expand(s.size(0), hidden) for a, s in zip(after, states, strict=True)]
        if w_hr:
            after = [F.linear(after[0], w_hr[0]), *after[1:]]
        shown = after
        if has_alive:
            shown = [torch.where(at[1], a, 0) for a in after]
            after = [torch.where(at[1], a, s) for a, s in zip(after, states, strict=True)]
        # No result may be an argument or another result.
        return [a.clone() for a in (*after, *shown)]

    # Without gradients, for which the operator would record a backward pass as well.
    s0, over, weights = ([t.detach() for t in group] for group in (s0, over, weights))
    made = torch.ops.higher_order.scan(step, s0, over, weights)
    last, every = made[: len(s0)], made[len(s0) :]
    return [each.flip(0) if backward else each for each in every], list(last)


def _next(
    cell: Cell,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    apply: Callable[[Tensor], Sequence[Tensor]],
) -> list[Tensor]:
    """One step. The cell's expressions are recorded if it has them: a function may write in place,
    which a body cannot."""
    from fastrnn.compiler.derive import Underivable, derive

    try:
        derived = derive(cell)
    except Underivable:
        return cell.step(u, v, states, params, apply)
    rows = [row for param in params for row in param.split(u[0].size(-1))]
    return derived.forward(u, v, states, rows, apply)[0]


def _flags(operands: Operands, backward: bool) -> tuple[Tensor | None, Tensor | None]:
    """Per step, [T, B, 1]: whether the sequence has not ended, and whether the states before this
    step are cut off. None if all or none are."""
    x, lengths, resets = operands.x, operands.lengths, operands.resets
    alive = None
    if lengths is not None:
        step = torch.arange(x.size(0), device=x.device).unsqueeze(-1)
        alive = (lengths.to(x.device) > step).unsqueeze(-1)
    if resets is None:
        return alive, None
    cut = resets.unsqueeze(-1)
    if alive is not None:
        cut = cut & alive
    if backward:  # the episode of step t ends before step t + 1
        cut = torch.cat([cut[1:], torch.zeros_like(cut[:1])])
    return alive, cut
