"""What runs a scan where a plan says so."""

from fastrnn.kernels.callbacks import use

__all__ = ["use"]
