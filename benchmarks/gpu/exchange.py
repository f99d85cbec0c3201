"""Compile exchange.cu for this GPU, run it, and keep the lines it prints.

python -m benchmarks.gpu.exchange FILE
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import results

SOURCE = Path(__file__).with_name("exchange.cu")
CSRC = SOURCE.parents[2] / "csrc"


def compile_command(architecture: str, program: Path) -> list[str]:
    """For an architecture as in "90a"."""
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    return [
        *("nvcc", "-std=c++17", "-O3", f"-gencode={code}", "-I", str(CSRC)),
        *("-cudart", "static", "-o", str(program), str(SOURCE)),
    ]


def main() -> int:
    from dataclasses import asdict

    import torch

    from benchmarks.gpu.baseline import NO_MACHINE
    from fastrnn.bench import store

    path = Path(sys.argv[1]).resolve()
    program = path.with_name("exchange")
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major == 9 else "")
    subprocess.run(compile_command(architecture, program), check=True)
    ran = subprocess.run([str(program)], stdout=subprocess.PIPE, text=True)
    program.unlink()
    print(ran.stdout, end="")
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    conditions = store.conditions(NO_MACHINE, "python -m benchmarks.gpu.exchange", "cuda")
    results.save(path, rows, asdict(conditions))
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
