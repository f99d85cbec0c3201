"""What runs a scan where a plan says so."""

from fastrnn.kernels import callbacks as callbacks  # the operator's calls lead there from now on
from fastrnn.kernels.device import use

__all__ = ["use"]
