"""Every test of cells leaves the registry as it was."""

from tests.support.registry import same_registry_afterwards

__all__ = ["same_registry_afterwards"]
