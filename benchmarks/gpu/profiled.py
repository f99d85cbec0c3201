"""Two training steps of an LSTM in bfloat16, for a profiler.

python -m benchmarks.gpu.profiled BATCH HIDDEN STEPS
"""

from __future__ import annotations

import sys

import torch

import fastrnn


def main(device: str = "cuda") -> int:
    batch, hidden, steps = map(int, sys.argv[1:4])
    layer = fastrnn.LSTM(hidden, hidden, device=device, dtype=torch.bfloat16)
    x = torch.randn(steps, batch, hidden, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    for _ in range(2):
        layer(x)[0].float().sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
