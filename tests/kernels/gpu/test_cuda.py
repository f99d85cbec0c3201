"""The library of CUDA kernels in Python: its structures, and libraries that cannot be loaded."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import _C, plan
from fastrnn.kernels.gpu import cuda
from tests.support.paths import CSRC

STRUCTURES = (cuda.Sweep, cuda.CudaPlan, cuda.CudaRowGroup, cuda.CudaTables)


def test_structures_are_laid_out_as_in_c(tmp_path: Path) -> None:
    """The C++ compiler compares csrc/cuda/contract.h with its mirror in Python."""
    lines = []
    for structure in STRUCTURES:
        name = structure.__name__
        lines.append(f'printf("{name} %zu\\n", sizeof(fastrnn::{name}));')
        lines += [
            f'printf("{name}.{field} %zu %zu\\n", offsetof(fastrnn::{name}, {field}), '
            f"sizeof(fastrnn::{name}::{field}));"
            for field, *_ in structure._fields_
        ]
    enums = {"Precision": cuda.PRECISIONS, "Residency": cuda.RESIDENCIES}
    for kind, values in enums.items():
        lines += [
            f'printf("{kind}.{n} %d\\n", int(fastrnn::{kind}::k{n[0].upper()}{n[1:]}));'
            for n in values
        ]
    source = tmp_path / "layout.cpp"
    body = "\n  ".join(lines)
    source.write_text(
        f'#include "cuda/contract.h"\n#include <cstdio>\nint main() {{\n  {body}\n}}\n'
    )
    program = tmp_path / "layout"
    command = ["c++", "-std=c++17", "-w", "-iquote", f"{CSRC}", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    expected = []
    for structure in STRUCTURES:
        name = structure.__name__
        expected.append(f"{name} {ctypes.sizeof(structure)}")
        expected += [
            f"{name}.{field} {getattr(structure, field).offset} {getattr(structure, field).size}"
            for field, *_ in structure._fields_
        ]
    for kind, values in enums.items():
        expected += [f"{kind}.{n} {value}" for n, value in values.items()]
    assert said.splitlines() == expected


def test_no_library_and_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    monkeypatch.setenv("FASTRNN_CUDA_LIBRARY", str(broken))
    monkeypatch.setenv("FASTRNN_KERNEL", "cuda")
    found = cuda.library()
    assert isinstance(found, str) and "cannot be loaded" in found and str(broken) in found
    _C.forget_plans()
    with pytest.raises(plan.KernelRefused, match="asked for but refuses"):
        fastrnn.LSTM(2, 3)(torch.zeros(1, 1, 2))
    monkeypatch.undo()
    _C.forget_plans()
