"""fastrnn beside torch.nn on a grid of sizes: `python -m benchmarks.grid`."""
