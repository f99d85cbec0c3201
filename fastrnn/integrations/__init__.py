"""What packages need that go by the class of a layer: a module a package, imported on demand."""
