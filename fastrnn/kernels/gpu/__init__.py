"""Kernels for GPUs, which are launched from Python."""
