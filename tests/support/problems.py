"""A problem and a device that tests of plans vary."""

from __future__ import annotations

from fastrnn.plan import Device, Problem

LSTM = Problem("lstm", steps=100, batch=1, inputs=64, hidden=64, gates=4, states=2)


TWO = Device(threads=2, vector_bytes=64)
