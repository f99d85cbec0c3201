"""What a recorded graph holds, and that recording does without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastrnn.compiler.record import ValueRead, record

aten = torch.ops.aten


def targets(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[object]:
    nodes = record(function, inputs).nodes
    return [node.target for node in nodes if node.op == "call_function"]


def test_operations_are_recorded_in_order() -> None:
    graph = record(lambda x, y: [x * 2 + y, x], [torch.ones(3), torch.zeros(3)])
    x, y, double, total, output = graph.nodes
    assert (x.op, y.op, output.op) == ("placeholder", "placeholder", "output")
    assert (double.target, double.args) == (aten.mul.Tensor, (x, 2))
    assert (total.target, total.args) == (aten.add.Tensor, (double, y))
    assert torch.equal(total.meta["val"], torch.full([3], 2.0))
    assert output.args == ((total, x),)


def test_operations_of_autograd_are_recorded() -> None:
    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((x * x).sum(), x)

    assert aten.mul.Tensor in targets(gradient, torch.ones(3, requires_grad=True))[1:]


def test_operations_made_of_others_are_not_recorded() -> None:
    assert targets(lambda x: [torch.nn.functional.silu(x)], torch.ones(3)) == [
        aten.sigmoid.default,
        aten.mul.Tensor,
    ]
    with torch.inference_mode():  # where torch itself does not take this one apart
        assert targets(lambda x: [torch.square(x)], torch.ones(3)) == [aten.pow.Tensor_Scalar]


def test_parts_of_a_result_are_nodes() -> None:
    graph = record(lambda x: x.split(2), [torch.ones(5)])
    _, split, *parts, output = graph.nodes
    assert [part.args for part in parts] == [(split, 0), (split, 1), (split, 2)]
    assert [len(part.meta["val"]) for part in parts] == [2, 2, 1]
    assert output.args == (tuple(parts),)


def test_a_tensor_from_elsewhere_keeps_the_value_that_was_read() -> None:
    elsewhere = torch.ones(2)

    def function(x: Tensor) -> list[Tensor]:
        y = x + elsewhere
        elsewhere.zero_()
        return [y]

    (captured,) = (n for n in record(function, [torch.ones(2)]).nodes if n.op == "get_attr")
    assert torch.equal(captured.meta["val"], torch.ones(2))


def test_values_of_inputs_are_not_read() -> None:
    for read in (Tensor.item, bool, float, lambda x: torch.equal(x, x)):
        with pytest.raises(ValueRead):
            record(lambda x, read=read: [x * read(x * 2)], [torch.tensor(1.0)])


def test_a_constant_that_an_input_was_written_into_is_none() -> None:
    def function(x: Tensor) -> list[Tensor]:
        constant = torch.tensor(2.0)
        assert constant.item() == 2
        return [x * constant.add_(x).item()]

    with pytest.raises(ValueRead):
        record(function, [torch.tensor(1.0)])


def test_deriving_a_cell_imports_no_compiler() -> None:
    program = """
import sys, fastrnn
from fastrnn.compiler.derive import derive
derive(fastrnn.cells.get_published("layer_norm_lstm"))
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
