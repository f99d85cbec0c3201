"""Compile exchange.cu for this GPU, run it, and save each line that it prints at once.

    python -m benchmarks.gpu.exchange FILE [PROGRAM]

PROGRAM is one that was compiled before (benchmarks/gpu/prebuild.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import results

SOURCE = Path(__file__).with_name("exchange.cu")
CSRC = SOURCE.parents[2] / "csrc"


def compile_command(architecture: str, program: Path) -> list[str]:
    """The command of nvcc for an architecture such as "90a"."""
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    return [
        *("nvcc", "-std=c++17", "-O3", f"-gencode={code}", "-I", str(CSRC)),
        *("-cudart", "static", "-o", str(program), str(SOURCE)),
    ]


def main() -> int:
    from dataclasses import asdict

    import torch

    from benchmarks.gpu.baseline import NO_MACHINE
    from fastrnn.tools.bench import store

    path = Path(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditions = asdict(store.conditions(NO_MACHINE, "python -m benchmarks.gpu.exchange", device))
    rows = []
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    architecture = f"{major}{minor}" + ("a" if major == 9 else "")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(folder) / "exchange"
        built = (
            len(sys.argv) > 2
            or not subprocess.run(compile_command(architecture, program)).returncode
        )
        if not built:
            return 1
        with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                rows.append(json.loads(line))
                results.save(path, rows, conditions)
    return running.returncode


if __name__ == "__main__":
    sys.exit(main())
