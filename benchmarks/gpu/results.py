"""What a step writes: JSON, one row a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def save(
    path: Path, rows: Sequence[dict[str, Any]], conditions: dict[str, Any] | None = None
) -> None:
    """At once and whole: a step that is stopped leaves what it had."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(
        f'{{"conditions": {json.dumps(conditions or {})},\n"rows": [\n  {lines}\n]}}\n'
    )
    fresh.replace(path)
