"""Pages and docstrings declare cells, some with names of published ones. Other tests should not
find them."""

from tests.support.registry import same_registry_afterwards

__all__ = ["same_registry_afterwards"]
