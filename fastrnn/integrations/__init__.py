"""Adapters for packages that go by the class of a layer: one module each, imported on demand."""
