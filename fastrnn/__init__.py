"""Recurrent networks at hardware speed for PyTorch."""

from fastrnn.cells import Cell, cell

__all__ = ["Cell", "cell"]
