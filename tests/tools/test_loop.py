"""The loop computes what the layer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import cells
from fastrnn.tools.loop import Loop
from tests.support.shared import peepholes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_loop_computes_what_the_layer_does(batch_first: bool, bias: bool) -> None:
    layer: Any = fastrnn.Recurrent(
        peepholes, 3, 5, num_layers=2, bias=bias, batch_first=batch_first, dtype=torch.float64
    )
    loop, x = Loop(layer), torch.randn(4, 2, 3, dtype=torch.float64)
    found, right = loop(x), layer(x)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(loop(x, found[1]), layer(x, right[1]))


def test_a_cell_of_one_state_returns_a_tensor() -> None:
    layer = fastrnn.Recurrent(cells.gru, 3, 5)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(Loop(layer)(x), layer(x))


def test_products_of_other_values_are_computed() -> None:
    layer = fastrnn.GRUResetBefore(3, 5)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(Loop(layer)(x), layer(x))


@pytest.mark.parametrize(
    "options",
    [{"bidirectional": True}, {"heads": 2}, {"dropout": 0.5, "num_layers": 2}, {"zoneout": 0.1}],
)
def test_other_layers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot compute what Recurrent"):
        Loop(fastrnn.Recurrent(cells.gru, 4, 6, **options))
