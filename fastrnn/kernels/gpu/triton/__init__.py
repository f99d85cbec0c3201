"""The sweeps in Triton."""
