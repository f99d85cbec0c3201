"""Every test of cells leaves the registry as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastrnn.cells import declare as declaration


@pytest.fixture(autouse=True)
def same_registry_afterwards() -> Iterator[None]:
    before = dict(declaration._registry)
    yield
    declaration._registry.clear()
    declaration._registry.update(before)
