"""Layers, cells and what is done with them, with the manners of torch.nn."""
