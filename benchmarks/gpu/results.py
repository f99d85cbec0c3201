"""The JSON files that steps write, one row per line, and an archive of all files."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def save(
    path: Path, rows: Sequence[dict[str, Any]], conditions: dict[str, Any] | None = None
) -> None:
    """Replaces the file as a whole, so that a stopped step leaves the rows that it had."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(
        f'{{"conditions": {json.dumps(conditions or {})},\n"rows": [\n  {lines}\n]}}\n'
    )
    fresh.replace(path)


def pack(folder: Path, archive: Path) -> None:
    """Writes all files of the folder to an archive, which replaces the one before as a whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    fresh = archive.with_name(f".{archive.name}")
    with tarfile.open(fresh, "w:gz") as packed:
        packed.add(folder, arcname=folder.name)
    fresh.replace(archive)
