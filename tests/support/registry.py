"""The registry of cells, which declarations in tests, pages and docstrings change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastrnn.cells import declare as declaration

__all__ = ["same_registry_afterwards"]


@pytest.fixture(autouse=True)
def same_registry_afterwards() -> Iterator[None]:
    """Each test leaves the registry as it was; a conftest that imports this makes it so."""
    before = dict(declaration._registry)
    yield
    declaration._registry.clear()
    declaration._registry.update(before)
