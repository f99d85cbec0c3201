"""Temporary: replaced by the real operator."""

from fastrnn.reference import scan

__all__ = ["scan"]
