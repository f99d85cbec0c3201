"""Tables of packed batches: their numbers, and that calls share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import kernels
from fastrnn.kernels.gpu import packed
from tests.support import stub

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [[3, 3, 1], [1], [4, 2, 2, 2, 1], []])
@pytest.mark.parametrize("batch", [4, 6])
def test_tables(sizes: list[int], batch: int) -> None:
    made = packed.tables(torch.tensor(sizes, dtype=torch.int64), batch, CPU)
    first = [sum(sizes[:t]) for t in range(len(sizes) + 1)]
    assert made.first == first == made.first_on_device().tolist()
    assert made.length().tolist() == [sum(b < size for size in sizes) for b in range(batch)]


@pytest.mark.parametrize("sizes", [[3, 4], [5, 1], [4, 2, -1]])
def test_sizes_that_no_batch_has(sizes: list[int]) -> None:
    with pytest.raises(RuntimeError, match="batch_sizes should not increase, nor exceed"):
        packed.tables(torch.tensor(sizes), 4, CPU)


def test_tables_are_shared_and_follow_changes_in_place() -> None:
    sizes = torch.tensor([5, 4, 2])
    made = packed.tables(sizes, 5, CPU)
    assert packed.tables(sizes.clone(), 5, CPU) is made
    assert packed.tables(sizes, 7, CPU) is not made
    sizes.numpy()[0] = 4  # torch notices no such change
    changed = packed.tables(sizes, 5, CPU)
    assert changed.first == [0, 4, 8, 10]
    sizes[0] = 5
    assert packed.tables(sizes, 5, CPU) is made


def test_old_tables_are_forgotten() -> None:
    sizes = torch.tensor([9, 9, 1])
    made = packed.tables(sizes, 9, CPU)
    for n in range(2, 100):
        packed.tables(torch.full((n,), 3), 3, CPU)
    assert packed.tables(sizes, 9, CPU) is not made


def test_layers_directions_and_passes_share_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    cumsum, made = torch.cumsum, []

    def counted(*given: Any, **options: Any) -> torch.Tensor:
        made.append(1)
        return cumsum(*given, **options)

    monkeypatch.setattr(torch, "cumsum", counted)
    layer = fastrnn.LSTM(3, 4, num_layers=3, bidirectional=True)
    batch = pack_sequence([torch.randn(n, 3) for n in (17, 13, 5)])
    with stub.answering(), kernels.use("cuda"):
        for _ in range(2):
            y, _ = layer(batch)
            y.data.sum().backward()
    assert len(made) == 1
