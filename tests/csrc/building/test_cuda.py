"""The ninja file of the CUDA kernels; nothing is compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from building import cuda, ninja

from tests.support.paths import ROOT


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The path of a fake nvcc, the only one to be found."""
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return str(fake)


def test_cuda_kernels_are_built_where_nvcc_is_and_torch_has_use_for_them(
    toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ROOT / "build" / "any"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.ninja_file(folder) == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = cuda.ninja_file(folder)
    assert f"command = {toolkit} " in text
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    linked = " ".join(ninja.object_of(path, ".cu.o") for path in sources)
    assert len(set(linked.split())) == len(sources) > 4
    assert f"build _cuda.so: cuda_link {linked}\n" in text
    assert "-cudart static" in text and "-fPIC" in text
    monkeypatch.setenv("FASTRNN_CUDA", "0")
    assert cuda.ninja_file(folder) == ""
    monkeypatch.setenv("FASTRNN_CUDA", "yes")
    with pytest.raises(SystemExit, match="auto, 0 or 1, not 'yes'"):
        cuda.ninja_file(folder)


def test_cuda_kernels_that_are_asked_for_need_nvcc(
    toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ROOT / "build" / "any"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    assert toolkit in cuda.ninja_file(folder)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"there is no nvcc: .* nvidia-cuda-nvcc"):
        cuda.ninja_file(folder)
    monkeypatch.setenv("FASTRNN_CUDA", "auto")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda.ninja_file(folder) == ""


def test_a_watchdog_is_built_in_where_it_is_asked_for(
    toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    for wanted, there in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("FASTRNN_WATCHDOG", wanted)
        assert ("-DFASTRNN_WATCHDOG" in cuda.ninja_file(ROOT / "build" / "any")) is there
    monkeypatch.setenv("FASTRNN_WATCHDOG", "yes")
    with pytest.raises(SystemExit, match="FASTRNN_WATCHDOG is 0 or 1, not 'yes'"):
        cuda.ninja_file(ROOT / "build" / "any")


def test_gpus_to_build_for(toolkit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def codes(architectures: str) -> list[str]:
        return [t.rpartition("code=")[2] for t in cuda.targets_of(architectures)]

    assert codes(cuda.ARCHITECTURES) == [
        *("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100f", "sm_120", "compute_120"),
    ]
    assert codes("7.5 8.0, 9.0+PTX") == ["sm_80", "sm_90a", "compute_90a"]
    for wrong, reason in (("7.0;7.5", "need compute capability 8.0"), ("Hopper", "has 'Hopper'")):
        with pytest.raises(SystemExit, match=reason):
            cuda.targets_of(wrong)
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    monkeypatch.setenv("MAX_JOBS", "1")
    text = cuda.ninja_file(ROOT / "build" / "any")
    assert "code=sm_89 " in text and "code=sm_80" not in text and "--threads 1 " in text
