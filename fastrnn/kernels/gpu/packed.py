"""The tables of a packed batch on a GPU. They take time in the number of steps, so calls with the
same `batch_sizes` share them: the layers and directions of a model, both passes, a CUDA graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Tables", "tables"]

_MOST = 32  # batches that are remembered


class Tables(NamedTuple):
    """Where the rows of a packed batch lie.

    Attributes:
        sizes: `batch_sizes` as they were.
        first: [T+1], the first row of each step.
        on_device: int64 [T+1+B]: `first`, then the number of steps of each sequence.
        stream, ready: on NVIDIA's GPUs, the stream of the copy to the device and its end.
    """

    sizes: Tensor
    first: list[int]
    on_device: Tensor
    stream: Any = None
    ready: Any = None

    def first_on_device(self) -> Tensor:
        return self.on_device[: len(self.first)]

    def length(self) -> Tensor:
        return self.on_device[len(self.first) :]


_remembered: list[tuple[int, torch.device, Tables]] = []  # with the batch, the newest last
_captured: list[Tables] = []  # a CUDA graph has their addresses, and its end is unknown


def tables(sizes: Tensor, batch: int, device: torch.device) -> Tables:
    """The tables for `batch_sizes` on a device, in time for the current stream.

    A capture of a CUDA graph cannot copy from the host: a call before it must have made them.

    Raises:
        RuntimeError: if there are more sequences than before at a step, or than `batch` at the
            first: kernels read the rows that the tables name.
    """
    for of_batch, of_device, found in reversed(_remembered):
        # Comparing the numbers takes a microsecond, and notices sizes that were changed in place.
        if of_batch == batch and of_device == device and torch.equal(found.sizes, sizes):
            if device.type == "cuda":
                _await(found, device)
            return found
    made = _make(sizes, batch, device)
    _remembered.append((batch, device, made))
    del _remembered[:-_MOST]
    return made


def _make(sizes: Tensor, batch: int, device: torch.device) -> Tables:
    _check(sizes, batch)
    host = torch.zeros(sizes.numel() + 1 + batch, dtype=torch.int64, device="cpu")
    first, length = host[: sizes.numel() + 1], host[sizes.numel() + 1 :]
    torch.cumsum(sizes, 0, out=first[1:])
    # A sequence is as long as there are steps with more sequences than come before it.
    ends = torch.bincount(sizes, minlength=batch + 1).flip(0).cumsum(0).flip(0)
    length.copy_(ends[1 : batch + 1])
    made = Tables(sizes.clone(), first.tolist(), host)
    if device.type != "cuda":
        return made._replace(on_device=host.to(device))
    stream, ready = torch.cuda.current_stream(device), torch.cuda.Event()
    made = made._replace(on_device=host.to(device, non_blocking=True))
    ready.record(stream)
    return made._replace(stream=stream, ready=ready)


def _check(sizes: Tensor, batch: int) -> None:
    before = batch
    for step, size in enumerate(sizes.tolist()):
        if not 0 <= size <= before:
            raise RuntimeError(
                "scan: batch_sizes should not increase, nor exceed the batch "
                f"{batch}, got {size} at step {step}"
            )
        before = size


def _await(found: Tables, device: torch.device) -> None:
    if torch.cuda.is_current_stream_capturing():
        # torch waits for the whole device before a capture, so the copy has ended.
        if not any(each is found for each in _captured):
            _captured.append(found)
        return
    stream = torch.cuda.current_stream(device)
    if stream != found.stream:
        stream.wait_event(found.ready)
        found.on_device.record_stream(stream)
