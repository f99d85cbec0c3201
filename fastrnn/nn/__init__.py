"""Layers, cells, and their conversion, freezing and streaming, with the behaviour of torch.nn."""
