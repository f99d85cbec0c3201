"""Which of a few configurations runs fastest on a GPU: measured once for a kernel, kept on disk.

`plan` chooses from numbers alone, and `plan.alternatives` names what else would do. On a GPU,
where `FASTRNN_TUNE=1` asks for it, the first launch of a kernel times them all, and what is found
holds for that kind of device, cell, H and dtype from then on, in later processes too: neither the
number of steps nor the batch is looked at, so that a model runs on the same kernels throughout.
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
    """Whether launches are to be timed."""
    return os.environ.get("FASTRNN_TUNE") == "1"


class Tuner:
    """Finds the fastest configurations, and remembers them.

    Args:
        folder: gives the folder where they are kept.
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
        """The fastest of `configs` by what is known under `key`; the first where nothing is known
        and `seconds` is None. `key` says what a kernel is for, and on what it runs; `seconds` how
        long a launch takes with one, and raises RuntimeError where it cannot run."""
        name = hashlib.sha256(repr((*key, *map(_tiles, configs))).encode()).hexdigest()[:24]
        found = self._known.get(name) or self._read(name)
        if found is None:
            if seconds is None:
                return configs[0]
            found = _tiles(_fastest(configs, seconds))
            self._write(name, found)
        self._known[name] = found
        return replace(configs[0], **found)

    def _path(self, name: str) -> Path:
        return self._folder() / f"tuned_{name}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or damaged: it is measured again
            return None
        whole = isinstance(found, dict) and tuple(found) == _TILES
        return found if whole and all(type(n) is int for n in found.values()) else None

    def _write(self, name: str, tiles: dict[str, int]) -> None:
        cache.write(self._path(name), json.dumps(tiles))


def _tiles(config: TritonConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in _TILES}


def _fastest(
    configs: Sequence[TritonConfig], seconds: Callable[[TritonConfig], float]
) -> TritonConfig:
    """One that comes later must be faster by a twentieth, so that chance decides less."""
    best, least = configs[0], float("inf")
    for config in configs:
        try:
            took = seconds(config)
        except RuntimeError:  # it needs more than this device has
            continue
        if took < 0.95 * least:
            best, least = config, took
    return best
