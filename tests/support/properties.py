"""hypothesis, if it is installed; otherwise its tests are skipped and the others still run."""

from __future__ import annotations

from typing import Any

import pytest

try:
    import hypothesis
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    hypothesis = None  # type: ignore[assignment]

    class _Absent:
        """Stands in for any strategy, so that modules that use strategies can be imported."""

        def __getattr__(self, name: str) -> _Absent:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
            return self

        __or__ = __call__

    st = _Absent()  # type: ignore[assignment]

    def given(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        def skipped(test: Any) -> Any:
            def needs_hypothesis() -> None:
                pytest.skip("needs hypothesis")

            needs_hypothesis.__name__ = test.__name__
            return needs_hypothesis

        return skipped

    def settings(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        return lambda test: test


__all__ = ["given", "hypothesis", "settings", "st"]
