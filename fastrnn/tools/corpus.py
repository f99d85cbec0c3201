"""The text that the demo trains on."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Corpus"]


@dataclass(frozen=True)
class Corpus:
    """A text as symbol numbers.

    Attributes:
        codes: int64 [characters].
        symbols: the alphabet; `symbols[code]` is the character.
    """

    codes: Tensor
    symbols: str

    @classmethod
    def of(cls, text: str) -> Corpus:
        """The printable ASCII and line ends of `text`; four spaces become one symbol."""
        text = "".join(c for c in text.replace("    ", "\t") if c in "\t\n" or " " <= c <= "~")
        symbols = "".join(sorted(set(text)))
        number = {c: k for k, c in enumerate(symbols)}
        return cls(
            torch.tensor([number[c] for c in text], dtype=torch.int64, device="cpu"), symbols
        )

    @classmethod
    def standard_library(cls) -> Corpus:
        """The source of the running Python's standard library.

        Raises:
            FileNotFoundError: if this Python was installed without its sources.
        """
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(folder.glob("*.py"))
        if len(files) < 50:
            raise FileNotFoundError(
                f"{folder} holds {len(files)} Python files, too few to train on: this Python came "
                "without the sources of its standard library; pass a text with --text FILE"
            )
        return cls.of("\n".join(f.read_text("utf-8", "replace") for f in files))

    def encode(self, text: str) -> Tensor:
        """The codes of `text`, int64 [1, characters], without those outside the alphabet."""
        codes = [self.symbols.index(c) for c in text if c in self.symbols]
        return torch.tensor([codes], device="cpu")

    def decode(self, codes: Sequence[int]) -> str:
        return "".join(self.symbols[c] for c in codes).replace("\t", "    ")
