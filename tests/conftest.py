"""Settings of every test: reproducible random numbers, and NaN in memory that was not written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.names import DEVICES, DTYPES
from tests.support.properties import hypothesis

# Custom cells compile in a fifth of the time. No number depends on the level of optimisation or
# on how many rows a tile has. Tests of tiles, in tests/csrc/cpu, and the test that compiles all
# kernels for a cell of a user take this away.
os.environ.setdefault("FASTRNN_CXXFLAGS", "-O0 -DFASTRNN_MAX_TILE_ROWS=2")

# The clients need packages of their own: `make clients` runs them.
collect_ignore = ["clients"]

if hypothesis is not None:
    hypothesis.settings.register_profile(
        "default",
        deadline=None,
        database=None,
        # In CI every run has the same examples, so that a failure comes from the change.
        derandomize="CI" in os.environ,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest tests, so that none ends alone while other workers are idle."""

    def seconds(item: pytest.Item) -> int:
        mark = item.get_closest_marker("takes")
        return mark.args[0] if mark else 0

    items.sort(key=seconds, reverse=True)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialised memory with NaN, in C++ too, and makes every test deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
