"""Packages that are not installed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

__all__ = ["without"]


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def refuse(wanted: str, *rest: Any) -> Any:
        if wanted.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(wanted, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
