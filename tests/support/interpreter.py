"""Triton's interpreter; a process uses it for all kernels or for none."""

from __future__ import annotations

import pytest

from fastrnn.kernels.gpu.triton import launch

INTERPRETED = launch.interpreted()


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
