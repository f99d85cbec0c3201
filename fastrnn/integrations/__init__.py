"""Adapters for packages that decide by the class of a layer, one module each, loaded on demand."""
