"""Which of a few plans runs fastest on a GPU: measured once for a kernel, and kept on disk.

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
from fastrnn.plan import Plan

__all__ = ["Tuner", "wanted"]

_TILES = ("batch_tile", "unit_tile", "depth_tile", "warps", "stages", "registers")


def wanted() -> bool:
    """Whether launches are to be timed."""
    return os.environ.get("FASTRNN_TUNE") == "1"


class Tuner:
    """Finds the fastest plans, and remembers them.

    Args:
        folder: gives the folder where they are kept.
    """

    def __init__(self, folder: Callable[[], Path] = cache.folder) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def best(
        self, key: Sequence[Any], plans: Sequence[Plan], seconds: Callable[[Plan], float] | None
    ) -> Plan:
        """The fastest of `plans` by what is known under `key`; the first where nothing is known and
        `seconds` is None. `key` says what a kernel is for, and on what it runs; `seconds` how long
        a launch takes with a plan, and raises RuntimeError where it cannot run."""
        name = hashlib.sha256(repr((*key, *map(_tiles, plans))).encode()).hexdigest()[:24]
        found = self._known.get(name) or self._read(name)
        if found is None:
            if seconds is None:
                return plans[0]
            found = _tiles(_fastest(plans, seconds))
            self._write(name, found)
        self._known[name] = found
        return replace(plans[0], **found)

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


def _tiles(plan: Plan) -> dict[str, int]:
    return {name: getattr(plan, name) for name in _TILES}


def _fastest(plans: Sequence[Plan], seconds: Callable[[Plan], float]) -> Plan:
    """A plan that comes later must be faster by a twentieth, so that chance decides less."""
    best, least = plans[0], float("inf")
    for plan in plans:
        try:
            took = seconds(plan)
        except RuntimeError:  # it needs more than this device has
            continue
        if took < 0.95 * least:
            best, least = plan, took
    return best
