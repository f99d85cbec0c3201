"""Train on several processes, and show that the result is that of one process.

Each process has a part of every batch. DistributedDataParallel averages the gradients; FSDP2
(`fully_shard`) also splits the Parameters. A copy trains alone, on whole batches, and the weights
are compared. This runs on CPUs, with gloo.

    torchrun --nproc-per-node 2 examples/train_ddp.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastrnn


class Tagger(nn.Module):
    """From codes [T, B] to scores [T, B, 3] of a tag for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.rnn = fastrnn.LSTM(16, 32, num_layers=2, bidirectional=True)
        self.out = nn.Linear(64, 3)

    def forward(self, codes: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(codes))[0])


def batches(count: int) -> list[Tensor]:
    """Batches [T, B] = [12, 16], which every process draws alike. The tag of a code says whether
    it is less than the code before it, the same, or more."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (12, 16), generator=generator) for _ in range(count)]


def train(model: nn.Module, count: int, rank: int = 0, world: int = 1) -> float:
    """Train on part `rank` of `world` of every batch. Returns the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loss = torch.zeros(())
    for batch in batches(count):
        codes = batch.chunk(world, 1)[rank]
        tags = 1 + (codes - codes.roll(1, 0)).sign()
        loss = cross_entropy(model(codes).flatten(0, 1), tags.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def sharded(model: nn.Module) -> nn.Module:
    """The model with the Parameters of each part split among the processes."""
    # torch says so of every Linear with an input of three dimensions.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for part in (*model.children(), model):
        fully_shard(part)
    return model


def main(quick: bool = False) -> dict[str, float]:
    """Returns the largest difference of a weight to training alone, for each way."""
    if not dist.is_torchelastic_launched():
        sys.exit("start this script with torchrun --nproc-per-node 2")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    start = Tagger()
    count = 10 if quick else 150
    alone = copy.deepcopy(start)
    loss = train(alone, count)
    if rank == 0:
        print(f"1 process: loss {loss:.4f} after {count} batches")
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "DDP": DistributedDataParallel,
        "FSDP2": sharded,
    }
    differences = {}
    for name, wrap in ways.items():
        model = copy.deepcopy(start)
        train(wrap(model), count, rank, world)
        differences[name] = 0.0
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
            difference = (whole - theirs).abs().max().item()
            differences[name] = max(differences[name], difference)
        if rank == 0:
            print(f"{world} processes, {name}: largest difference {differences[name]:.1e}")
        assert differences[name] < 1e-3, name
    dist.destroy_process_group()
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train on 10 batches")
    main(parser.parse_args().quick)
