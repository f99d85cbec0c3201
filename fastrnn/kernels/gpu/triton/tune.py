"""Measures which of a few configurations of a kernel runs fastest on a GPU, and stores the result.

`plan` chooses from numbers alone, and `plan.alternatives` lists other configurations. With
`FASTRNN_TUNE=1`, the first launch of a kernel on a GPU times them all. The result holds for that
kind of device, cell, H and dtype, in later processes too. It does not depend on the number of steps
or the batch, so that a model always runs on the same kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrnn import cache
from fastrnn.plan import TritonConfig

__all__ = ["Tuner", "wanted"]

_TILES = ("batch_tile", "unit_tile", "depth_tile", "warps", "stages", "registers")


def wanted() -> bool:
    """Whether the user asks for launches to be timed."""
    return os.environ.get("FASTRNN_TUNE") == "1"


class Tuner:
    """Finds the fastest configurations and stores them.

    Args:
        folder: returns the folder in which they are stored.
    """

    def __init__(self, folder: Callable[[], Path] = cache.folder) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def best(
        self,
        key: Sequence[Any],
        configs: Sequence[TritonConfig],
        seconds: Callable[[TritonConfig], float] | None,
    ) -> TritonConfig:
        """The fastest of `configs`, from the stored result or measured now.

        Args:
            key: identifies the kernel, its cell and sizes, and the device.
            seconds: time of a launch with a configuration; it raises RuntimeError if that cannot
                run. If None, an unknown key gives the first configuration.
        """
        name = hashlib.sha256(repr((*key, *map(_tiles, configs))).encode()).hexdigest()[:24]
        tiles = self._known.get(name) or self._read(name)
        if tiles is None:
            if seconds is None:
                return configs[0]
            tiles = _tiles(_fastest(configs, seconds))
            self._write(name, tiles)
        self._known[name] = tiles
        return replace(configs[0], **tiles)

    def _path(self, name: str) -> Path:
        return self._folder() / f"tuned_{name}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            tiles = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing or damaged; it is measured again
            return None
        complete = isinstance(tiles, dict) and tuple(tiles) == _TILES
        return tiles if complete and all(type(n) is int for n in tiles.values()) else None

    def _write(self, name: str, tiles: dict[str, int]) -> None:
        cache.write(self._path(name), json.dumps(tiles))


def _tiles(config: TritonConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in _TILES}


def _fastest(
    configs: Sequence[TritonConfig], seconds: Callable[[TritonConfig], float]
) -> TritonConfig:
    """The fastest configuration. A later one must be faster by 5 %, so that chance decides less."""
    best, least = configs[0], float("inf")
    for config in configs:
        try:
            duration = seconds(config)
        except RuntimeError:  # it needs more than this device has
            continue
        if duration < 0.95 * least:
            best, least = config, duration
    return best
