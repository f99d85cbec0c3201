"""The choice of the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys


def test_an_unknown_instruction_set_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import torch, fastrnn; fastrnn.LSTM(1, 1)(torch.zeros(1, 1))"],
        env={**os.environ, "FASTRNN_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "FASTRNN_ISA=mmx" in result.stderr
