"""The kernels that run a scan as its plan says."""

from fastrnn.kernels import callbacks as callbacks  # the import registers them with the operator
from fastrnn.kernels.device import use

__all__ = ["use"]
