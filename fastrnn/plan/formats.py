"""The formats in which the CPU kernel multiplies: `Format` of csrc/core/storage.h."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FORMATS", "Format"]


class Format(NamedTuple):
    """What a plan needs to know about a format.

    Attributes:
        weight_bytes: bytes of a packed weight.
        products: multiply-adds in the time of one in float32, with the instructions that are made
            for the format; int8 without VNNI has one or two.
        in_torchs_layout: whether there is a kernel that reads weights in torch's layout.
    """

    weight_bytes: int
    products: int
    in_torchs_layout: bool


# The study of these numbers is in docs/cpu-notes.md.
FORMATS = {
    "float32": Format(4, 1, True),
    "float64": Format(8, 1, True),
    "bfloat16": Format(2, 2, False),
    "int8": Format(1, 4, False),
    "int16": Format(1, 2, False),
}
