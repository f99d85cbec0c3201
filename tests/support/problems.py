"""A problem and a device that tests of plans vary."""

from __future__ import annotations

from fastrnn.plan import CpuFacts, Device, Problem

LSTM = Problem("lstm", steps=100, batch=1, inputs=64, hidden=64, gates=4, states=2)


def with_threads(threads: int) -> Device:
    return Device(cpu=CpuFacts(threads=threads, vector_bytes=64))


TWO = with_threads(2)
